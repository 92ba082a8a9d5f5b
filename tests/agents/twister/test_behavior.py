"""Returns, weights and losses of behaviour against second implementations."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SMALL, SPEC
from twister_jax.agents.twister.agent import Twister
from twister_jax.agents.twister.behavior import (
    ReturnScale,
    StartStates,
    Targets,
    Trajectory,
    actor_loss,
    critic_loss,
    lambda_returns,
)
from twister_jax.nn.distributions import BoundedNormal, OneHot, SymlogTwoHot

ALGORITHM = SMALL.algorithm


def slow_lambda_return(reward, discount, value, lam, t):
    """As a mixture of n-step returns, (1−λ) Σ λ^{n−1} G_n, the last one taking what is left."""
    horizon = len(reward) - t
    total = 0.0
    for n in range(1, horizon + 1):
        n_step, factor = 0.0, 1.0
        for i in range(n):
            n_step += factor * reward[t + i]
            factor *= discount[t + i]
        n_step += factor * value[t + n - 1]
        total += n_step * (lam ** (n - 1) * (1 - lam) if n < horizon else lam ** (n - 1))
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_lambda_returns_against_mixed_n_step_returns(seed, lam):
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(2, 6, 3))
    discount = 0.997 * (rng.random((6, 3)) < 0.8)
    ours = lambda_returns(*(jnp.asarray(x, jnp.float32) for x in (reward, discount, value)), lam)
    for t in range(6):
        for i in range(3):
            expected = slow_lambda_return(reward[:, i], discount[:, i], value[:, i], lam, t)
            assert float(ours[t, i]) == pytest.approx(expected, abs=1e-4)


def test_return_scale_is_a_moving_average_from_zero_and_never_below_one():
    returns = jnp.linspace(-10.0, 10.0, 201)
    scale = ReturnScale.zero()
    low = high = 0.0
    for _ in range(3):
        scale = scale.update(returns, (0.05, 0.95), 0.99)
        low, high = 0.99 * low + 0.01 * -9.0, 0.99 * high + 0.01 * 9.0
        assert float(scale.low) == pytest.approx(low, rel=1e-4)
        assert float(scale.high) == pytest.approx(high, rel=1e-4)
    assert float(scale.scale) == 1.0
    assert float(ReturnScale(jnp.asarray(-3.0), jnp.asarray(4.0)).scale) == 7.0


def targets(steps=4, sequences=5):
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.normal(size=(n, sequences)), jnp.float32)  # noqa: E731
    return Targets(
        returns=draw(steps),
        value=draw(steps + 1),
        reward=draw(steps + 1),
        continues=jnp.ones((steps + 1, sequences)),
        weight=jnp.abs(draw(steps + 1)),
        return_scale=ReturnScale(jnp.asarray(-1.0), jnp.asarray(2.0)),
    )


def test_actor_loss_is_reinforce_with_entropy():
    goal = targets()
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
    action = jax.nn.one_hot(rng.integers(3, size=(4, 5)), 3)
    policy = OneHot.of(logits, 0.01)
    loss, _ = actor_loss(policy, action, goal, ALGORITHM)
    advantage = (goal.returns - goal.value[:-1]) / 3.0
    log_prob = np.sum(np.asarray(policy.logits) * np.asarray(action), -1)
    expected = -np.mean(goal.weight[:-1] * (log_prob * advantage + 3e-4 * policy.entropy()))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_actor_gradient_raises_the_probability_of_good_actions_discrete_and_continuous():
    goal = targets().replace(returns=targets().value[:-1] + 1.0)

    def discrete(logits):
        return actor_loss(OneHot.of(logits, 0.01), jax.nn.one_hot(jnp.full((4, 5), 2), 3), goal, ALGORITHM)[0]

    gradient = jax.grad(discrete)(jnp.zeros((4, 5, 3)))
    assert np.all(gradient[..., 2] < 0)
    assert np.all(gradient[..., :2] > 0)

    def continuous(raw):
        return actor_loss(BoundedNormal.of(raw), jnp.full((4, 5, 1), 0.7), goal, ALGORITHM)[0]

    assert np.all(jax.grad(continuous)(jnp.zeros((4, 5, 2)))[..., 0] < 0)


def test_the_actor_learns_from_the_action_it_drew_beyond_the_bounds_too():
    """Continuous control: the density of the unclipped sample, summed over dimensions, and no correction."""
    goal, rng = targets(), np.random.default_rng(4)
    raw = rng.normal(size=(4, 5, 4))
    mean, std = np.tanh(raw[..., :2]), 0.9 / (1 + np.exp(-(raw[..., 2:] + 2))) + 0.1
    action = mean + 3 * std  # far beyond 1
    assert np.abs(action).max() > 1.5
    policy = BoundedNormal.of(jnp.asarray(raw, jnp.float32))
    loss, mean_entropy = actor_loss(policy, jnp.asarray(action, jnp.float32), goal, ALGORITHM)
    log_prob = np.sum(-0.5 * 3.0**2 - np.log(std) - 0.5 * np.log(2 * np.pi), -1)
    entropy = np.sum(np.log(std) + 0.5 * np.log(2 * np.pi * np.e), -1)
    advantage = (goal.returns - goal.value[:-1]) / goal.return_scale.scale
    expected = -np.mean(goal.weight[:-1] * (log_prob * advantage + 3e-4 * entropy))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(mean_entropy) == pytest.approx(entropy.mean(), rel=1e-5)


def test_no_gradient_reaches_the_world_through_action_or_target():
    goal = targets()
    policy = BoundedNormal.of(jnp.zeros((4, 5, 2)))
    to_action = jax.grad(lambda a: actor_loss(policy, a, goal, ALGORITHM)[0])(jnp.full((4, 5, 1), 0.3))
    np.testing.assert_array_equal(to_action, 0.0)
    value = SymlogTwoHot(jnp.zeros((4, 5, 255)))
    to_slow = jax.grad(lambda s: critic_loss(value, s, goal, ALGORITHM))(jnp.ones((4, 5)))
    np.testing.assert_array_equal(to_slow, 0.0)


def test_critic_loss_ignores_what_comes_after_an_end():
    """Weights are zero after an imagined end; such states must not count."""
    goal = targets().replace(weight=targets().weight.at[2:].set(0.0))
    logits = jax.random.normal(jax.random.key(0), (4, 5, 255))
    slow = jnp.zeros((4, 5))
    gradient = jax.grad(lambda x: critic_loss(SymlogTwoHot(x), slow, goal, ALGORITHM))(logits)
    np.testing.assert_array_equal(gradient[2:], 0.0)
    assert np.all(np.abs(gradient[:2]).sum(-1) > 0)


def test_the_actor_learns_with_the_return_scale_of_after_the_update():
    """The returns that the advantages are made of have a say in what the advantages are divided by."""
    config = dataclasses.replace(ALGORITHM, return_scale_decay=0.5)
    twister = Twister(config, SPEC, jnp.float32)
    params = twister.networks.init(jax.random.key(0))
    head = params["world_model"]["reward_head"]["output"]
    head["kernel"] = 8.0 * jax.random.normal(jax.random.key(1), head["kernel"].shape)  # large rewards
    steps, sequences, model = 4, 30, config.model
    rng = np.random.default_rng(0)
    classes = rng.integers(model.stoch_classes, size=(steps + 1, sequences, model.stoch_groups))
    latent = jax.nn.one_hot(classes, model.stoch_classes).reshape(steps + 1, sequences, model.latent_size)
    deter = jnp.asarray(rng.normal(size=(steps + 1, sequences, model.hidden_size)), jnp.float32)
    action = jax.nn.one_hot(rng.integers(4, size=(steps, sequences)), 4)
    cache = twister.world_model(params["world_model"]).transformer.empty_cache(sequences)
    start = StartStates(latent[0], deter[0], cache, jnp.ones(sequences))
    trajectory = Trajectory(latent, deter, action)
    old = ReturnScale(jnp.asarray(-1.0), jnp.asarray(4.0))
    behavior = jax.jit(twister.behavior_gradients)(params, params["critic"], start, trajectory, old)

    targets = behavior.targets
    quantiles = np.quantile(np.asarray(targets.returns), config.return_quantiles)
    new = 0.5 * np.array([old.low, old.high]) + 0.5 * quantiles
    np.testing.assert_allclose([targets.return_scale.low, targets.return_scale.high], new, rtol=1e-4)
    assert new[1] - new[0] > 2 * float(old.scale)

    @jax.jit
    @jax.grad
    def gradient(params, scale):
        policy = twister.actor(params)(trajectory.features[:-1])
        advantage = (targets.returns - targets.value[:-1]) / scale
        gain = policy.log_prob(action) * advantage + config.entropy_scale * policy.entropy()
        return -jnp.mean(targets.weight[:-1] * gain)

    def distance(scale):
        expected, _ = jax.flatten_util.ravel_pytree(gradient(params["actor"], jnp.float32(scale)))
        found, _ = jax.flatten_util.ravel_pytree(behavior.gradients["actor"])
        return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))

    assert distance(new[1] - new[0]) < 1e-4
    assert distance(old.scale) > 0.3
