import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.twm.conftest import MODEL
from twister_jax.agents.twm import dynamics as D
from twister_jax.nn.distributions import Bernoulli, OneHot
from twister_jax.runtime import tracing_for

BATCH, STEPS = 3, 8
LATENT = MODEL.stoch_groups * MODEL.stoch_classes


@pytest.fixture(scope="module")
def sequence():
    rng = np.random.default_rng(1)
    last = rng.random((BATCH, STEPS - 1)) < 0.3
    last[0] = False
    return {
        "latent": jnp.asarray(rng.normal(size=(BATCH, STEPS, LATENT)), jnp.float32),
        "action": jax.nn.one_hot(rng.integers(0, 3, (BATCH, STEPS)), 3),
        "reward": jnp.asarray(rng.normal(size=(BATCH, STEPS - 1)), jnp.float32),
        "last": jnp.asarray(last),
    }


@pytest.fixture(scope="module")
def hidden_states(networks, params):
    def run(**inputs):
        return networks.merge("dynamics", params["dynamics"]).hidden_states(**inputs, dropout_key=None)

    return jax.jit(run)


def test_visible_tokens_one_by_one():
    memory, steps = 2, 6
    last = np.array([0, 0, 1, 0, 0, 0], bool)
    episode = np.concatenate([[0], np.cumsum(last)[:-1]])[None]
    positions = jnp.arange(3 * steps - 1)
    seen = np.asarray(D.visible(positions, positions, jnp.asarray(episode), memory))[0]
    for query in range(positions.size):
        for key in range(positions.size):
            step_q, kind = divmod(query, 3)
            step_k = key // 3
            # A reward token joins the memory's step with the tokens before it, so it sees one position less.
            oldest = query - 3 * (memory + 1) if kind != 2 else 3 * (step_q - memory)
            same = not last[step_k:step_q].any()
            assert seen[query, key] == (oldest <= key <= query and same), (query, key)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_memory_gives_what_the_whole_sequence_gives(device, networks, params, sequence, hidden_states):
    """Longer than the memory, with episode ends inside."""
    whole = hidden_states(**sequence)
    dynamics = networks.merge("dynamics", params["dynamics"])
    episode = jnp.pad(jnp.cumsum(sequence["last"], axis=1), ((0, 0), (1, 0)))
    memory = dynamics.empty_memory(BATCH, STEPS)
    position_keys = dynamics.position_keys(memory.keys[0].shape[2])
    latent, action, reward = sequence["latent"], sequence["action"], sequence["reward"]

    @jax.jit
    def one_step(memory, step):
        # Later steps are not numbered yet, as in imagination.
        known = jnp.where(jnp.arange(STEPS) <= step, episode, episode[:, step, None])
        return dynamics.step(
            memory, position_keys, step, reward[:, step - 1], latent[:, step], action[:, step], known
        )

    with tracing_for(device):
        hidden, memory = dynamics.step(
            memory, position_keys, 0, None, latent[:, 0], action[:, 0], episode * 0
        )
    for step in range(STEPS):
        if step:
            with tracing_for(device):
                hidden, memory = one_step(memory, step)
        chex.assert_trees_all_close(hidden, whole[:, step], atol=2e-5, rtol=2e-5)


def changed_steps(hidden_states, sequence, name, step):
    """Steps whose h changes when one input of one step does."""
    before = hidden_states(**sequence)
    bumped = {**sequence, name: sequence[name].at[0, step].add(1.0)}
    difference = jnp.abs(hidden_states(**bumped) - before).max(-1)
    assert not difference[1:].any()
    return np.flatnonzero(difference[0] > 1e-6).tolist()


def test_nothing_is_seen_across_an_episode_end(hidden_states, sequence):
    last = jnp.zeros_like(sequence["last"]).at[0, 3].set(True)
    cut = {**sequence, "last": last}
    assert changed_steps(hidden_states, cut, "latent", 2) == [2, 3]
    assert changed_steps(hidden_states, cut, "reward", 3) == []  # of the end itself: nobody comes after it
    assert changed_steps(hidden_states, cut, "latent", 4) == [4, 5, 6, 7]


def test_memory_reaches_as_far_as_it_should(hidden_states, sequence):
    """One layer sees memory_steps + 1 steps back from the action token, two layers twice as far."""
    no_end = {**sequence, "last": jnp.zeros_like(sequence["last"])}

    reach = MODEL.memory_steps + 1
    changed = changed_steps(hidden_states, no_end, "action", 0)
    assert changed == list(range(2 * reach + 1))


def test_rewards_come_after_the_prediction_they_belong_to(hidden_states, sequence):
    no_end = {**sequence, "last": jnp.zeros_like(sequence["last"])}
    assert changed_steps(hidden_states, no_end, "reward", 1)[0] == 2
    assert changed_steps(hidden_states, no_end, "action", 1)[0] == 1


def test_dropout_only_where_a_key_is_given(networks, params, sequence):
    dynamics = networks.merge("dynamics", params["dynamics"])
    run = jax.jit(lambda key: dynamics.hidden_states(**sequence, dropout_key=key))
    one, again, other = (run(key) for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1)))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3


def test_losses_against_plain_sums():
    rng = np.random.default_rng(2)
    logits = OneHot.of(jnp.asarray(rng.normal(size=(2, 3, 3, 4)), jnp.float32))
    target = OneHot.of(jnp.asarray(rng.normal(size=(2, 3, 3, 4)), jnp.float32))
    reward, predicted = rng.normal(size=(2, 2, 3)).astype(np.float32)
    logit = rng.normal(size=(2, 3)).astype(np.float32)
    last = np.array([[False, True, False], [False, False, True]])
    discount = np.array([[0.99, 0.0, 0.99], [0.99, 0.99, 0.99]], np.float32)
    losses = D.dynamics_losses(
        D.Predictions(logits, jnp.asarray(predicted), Bernoulli(jnp.asarray(logit))),
        target,
        jnp.asarray(reward),
        jnp.asarray(discount),
        jnp.asarray(last),
    )
    probability = 1 / (1 + np.exp(-logit))
    cross_entropy = -(np.asarray(target.probs) * np.asarray(logits.logits)).sum((-1, -2))
    np.testing.assert_allclose(losses["latent"], cross_entropy[~last].mean(), rtol=1e-5)
    normal = -np.log(np.exp(-0.5 * (reward - predicted) ** 2) / np.sqrt(2 * np.pi))
    np.testing.assert_allclose(losses["reward"], normal.mean(), rtol=1e-5)
    bernoulli = -(discount * np.log(probability) + (1 - discount) * np.log(1 - probability))
    np.testing.assert_allclose(losses["discount"], bernoulli.mean(), rtol=1e-5)


def test_a_batch_of_episode_ends_alone_has_no_latent_loss():
    logits = OneHot.of(jnp.ones((1, 1, 3, 4)))
    losses = D.dynamics_losses(
        D.Predictions(logits, jnp.zeros((1, 1)), Bernoulli(jnp.zeros((1, 1)))),
        logits,
        jnp.zeros((1, 1)),
        jnp.zeros((1, 1)),
        jnp.ones((1, 1), bool),
    )
    assert float(losses["latent"]) == 0.0
