import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.twm.conftest import ALGORITHM, MODEL
from twister_jax.agents.twm import behavior as B
from twister_jax.nn.distributions import GivenSampler, KeySampler

ROLLOUTS, HORIZON, POOL = 4, 6, 3
LATENT = MODEL.stoch_groups * MODEL.stoch_classes


def test_advantages_against_their_definition():
    """A_t = sum over k of the product of (c λ) up to k, times δ."""
    rng = np.random.default_rng(0)
    reward, discount = rng.normal(size=(3, 5)), rng.uniform(0.3, 1, size=(3, 5))
    done, value = rng.random((3, 5)) < 0.3, rng.normal(size=(3, 6))
    gae_lambda = 0.9
    advantages = B.generalized_advantages(
        *(jnp.asarray(x, jnp.float32) for x in (reward, discount)),
        jnp.asarray(done),
        jnp.asarray(value, jnp.float32),
        gae_lambda,
    )
    for row in range(3):
        for t in range(5):
            expected, factor = 0.0, 1.0
            for k in range(t, 5):
                bootstrap = 0.0 if done[row, k] else discount[row, k] * value[row, k + 1]
                expected += factor * (reward[row, k] + bootstrap - value[row, k])
                if done[row, k]:
                    break
                factor *= discount[row, k] * gae_lambda
            np.testing.assert_allclose(advantages[row, t], expected, rtol=2e-5, atol=1e-6)


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(3)
    return B.StartStates(
        latents=jnp.asarray(rng.normal(size=(ROLLOUTS, 2, LATENT)), jnp.float32),
        action=jax.nn.one_hot(rng.integers(0, 3, ROLLOUTS), 3),
        reward=jnp.asarray(rng.normal(size=ROLLOUTS), jnp.float32),
        last=jnp.array([False, True, False, False]),
    )


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(4)
    latent = rng.integers(0, MODEL.stoch_classes, (HORIZON, ROLLOUTS, MODEL.stoch_groups))
    return {
        "action": jax.nn.one_hot(rng.integers(0, 3, (HORIZON, ROLLOUTS)), 3),
        "latent": jax.nn.one_hot(latent, MODEL.stoch_classes),
    }


RESTARTS = jnp.asarray(np.random.default_rng(5).normal(size=(HORIZON, POOL, LATENT)), jnp.float32)


@pytest.fixture(scope="module")
def roll(networks, params):
    def run(start, draws, threshold):
        config = dataclasses.replace(ALGORITHM, restart_threshold=threshold)
        dynamics, actor = (networks.merge(name, params[name]) for name in ("dynamics", "actor"))
        return B.imagine(dynamics, actor, start, RESTARTS, draws, GivenSampler, config)

    return jax.jit(run, static_argnums=2)


def test_weights_and_cuts_step_by_step(roll, start, draws):
    threshold = 0.45
    trajectory, _ = jax.device_get(roll(start, draws, threshold))
    assert 0 < trajectory.done.sum() < trajectory.done.size
    taken = 0
    cumulative, ended = np.ones(ROLLOUTS), np.asarray(start.last)
    for t in range(HORIZON):
        weight = np.where(ended, 1.0, cumulative)
        np.testing.assert_allclose(trajectory.weight[:, t], weight, rtol=1e-5)
        cumulative = weight * trajectory.discount[:, t]
        ended = cumulative < threshold
        np.testing.assert_array_equal(trajectory.done[:, t], ended)
        for row in range(ROLLOUTS):
            if ended[row]:
                expected = RESTARTS[
                    t, taken % POOL
                ]  # those of the step; in turn where there are more restarts
                taken += 1
            else:
                expected = draws["latent"][t, row].reshape(-1)
            np.testing.assert_array_equal(trajectory.latent[row, t + 1], expected)
    assert taken > POOL


def test_nothing_is_remembered_across_a_cut(roll, start, draws):
    """After a cut a rollout depends on what comes then, not on where it started."""
    threshold = 0.45
    other = start._replace(latents=start.latents.at[:, 0].add(1.0), reward=start.reward + 1.0)
    (one, hidden), (two, hidden_other) = (roll(s, draws, threshold) for s in (start, other))
    np.testing.assert_array_equal(one.done, two.done)
    difference = np.abs(np.asarray(hidden - hidden_other)).max(-1)
    cut = np.cumsum(np.asarray(one.done), axis=1)
    for row in range(ROLLOUTS):
        assert difference[row, 0] > 1e-6
        assert difference[row, 1] > 1e-6 or bool(start.last[row])
        for t in range(1, HORIZON):
            if cut[row, t - 1]:
                assert difference[row, t + 1] < 1e-6
    # The rollout whose start was an episode's last step never sees that step.
    assert np.all(difference[1, 1:] < 1e-6)


def test_without_a_threshold_nothing_is_cut(roll, start, draws):
    trajectory, _ = roll(start._replace(last=jnp.zeros(ROLLOUTS, bool)), draws, 0.0)
    assert not trajectory.done.any()
    weight = jnp.cumprod(trajectory.discount, axis=1)[:, :-1]
    np.testing.assert_allclose(trajectory.weight[:, 1:], weight, rtol=1e-5)
    np.testing.assert_array_equal(trajectory.weight[:, 0], 1.0)


def test_drawn_rollouts_are_one_hot_and_repeatable(networks, params, start):
    def run(key):
        dynamics, actor = (networks.merge(name, params[name]) for name in ("dynamics", "actor"))
        keys = jax.random.split(key, HORIZON)
        return B.imagine(dynamics, actor, start, RESTARTS, keys, KeySampler, ALGORITHM)[0]

    run = jax.jit(run)
    one, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one.latent, again.latent)
    assert float(jnp.abs(one.latent - other.latent).max()) > 0
    np.testing.assert_array_equal(one.action.sum(-1), 1.0)


def test_actor_loss_pushes_towards_advantageous_actions_and_entropy_only_when_low(networks, params):
    rng = np.random.default_rng(6)
    trajectory = B.Trajectory(
        latent=jnp.asarray(rng.normal(size=(2, 4, LATENT)), jnp.float32),
        action=jax.nn.one_hot(rng.integers(0, 3, (2, 3)), 3),
        reward=jnp.zeros((2, 3)),
        discount=jnp.ones((2, 3)),
        done=jnp.zeros((2, 3), bool),
        weight=jnp.asarray(rng.random((2, 3)), jnp.float32),
    )
    advantages = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    actor = networks.merge("actor", params["actor"])
    loss, normalized_entropy = B.actor_loss(actor, trajectory, advantages, ALGORITHM)
    log_policy = jax.nn.log_softmax(actor(trajectory.latent[:, :-1]))
    chosen = (log_policy * trajectory.action).sum(-1)
    reinforce = -(trajectory.weight * chosen * advantages).mean()
    np.testing.assert_allclose(loss, reinforce, rtol=1e-5)
    entropy = -(jnp.exp(log_policy) * log_policy).sum(-1) * trajectory.weight
    np.testing.assert_allclose(normalized_entropy, entropy.mean() / np.log(3), rtol=1e-5)
    assert float(normalized_entropy) > ALGORITHM.actor_entropy_threshold

    low = dataclasses.replace(ALGORITHM, actor_entropy_threshold=0.9)
    loss, _ = B.actor_loss(actor, trajectory, advantages, low)
    np.testing.assert_allclose(loss, reinforce + 0.01 * (0.9 - normalized_entropy), rtol=1e-5)
