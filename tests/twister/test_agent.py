"""The whole agent at a small size: learning, acting, and what must not happen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import SMALL, SPEC, filled_replay, random_steps
from twister_jax.agent import Observation
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.distributions import GivenSampler
from twister_jax.twister.agent import make_agent, make_networks
from twister_jax.twister.world_model import features, to_float, world_model_loss


@pytest.fixture(scope="module")
def store():
    return filled_replay()


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_an_update_is_a_function_of_its_arguments(small, store):
    one, _, metrics = small.update(small.state, store, jax.random.key(1))
    two, _, again = small.update(small.state, store, jax.random.key(1))
    assert leaves_equal(one, two)
    assert leaves_equal(metrics, again)
    other, _, _ = small.update(small.state, store, jax.random.key(2))
    assert not leaves_equal(one.world_model, other.world_model)
    assert int(one.updates) == 1
    assert all(np.isfinite(value) for value in metrics.values())


def test_every_network_learns_and_the_replay_is_returned_unchanged(small, store):
    state, after, _ = small.update(small.state, store, jax.random.key(1))
    assert leaves_equal(store, after)
    for name in ("world_model", "actor", "critic", "slow_critic"):
        assert not leaves_equal(getattr(state, name), getattr(small.state, name)), name
    # What stays would be dead. The second update also reaches what lies behind outputs that start at zero.
    state, _, _ = small.update(state, store, jax.random.key(2))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (path, not np.array_equal(a, b)), small.state.world_model, state.world_model
    )
    pairs = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
    still = [path for path, did in pairs if not did]
    assert not still


def test_slow_critic_follows_by_two_percent(small, store):
    state, _, _ = small.update(small.state, store, jax.random.key(1))
    state2, _, _ = small.update(state, store, jax.random.key(2))
    jax.tree.map(
        lambda old, slow, new: np.testing.assert_allclose(
            slow, 0.98 * old + 0.02 * new, rtol=1e-5, atol=1e-8
        ),
        state.slow_critic,
        state2.slow_critic,
        state2.critic,
    )


def test_updates_reduce_the_image_loss(small, store):
    state, first = small.state, None
    for i in range(60):
        state, store, metrics = small.update(state, store, jax.random.key(i))
        first = first if first is not None else float(metrics["losses/image"])
    assert float(metrics["losses/image"]) < first


def test_a_reward_that_is_not_finite_leaves_no_trace(small, store):
    broken = store.replace(reward=jnp.full_like(store.reward, jnp.nan))
    state, _, _ = small.update(small.state, broken, jax.random.key(0))
    assert leaves_equal(state.world_model, small.state.world_model)
    assert leaves_equal(state.world_model_optimizer, small.state.world_model_optimizer)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    health = small.agent.health(state)
    assert (int(health.skipped), int(health.consecutive), int(health.longest)) == (1, 1, 1)
    assert small.agent.loss_names[int(health.first_bad)] == "reward"
    state, _, _ = small.update(state, broken, jax.random.key(1))
    state, _, _ = small.update(state, store, jax.random.key(2))
    health = small.agent.health(state)
    assert (int(health.skipped), int(health.consecutive), int(health.longest)) == (2, 0, 2)


def test_a_broken_actor_is_named_and_everything_else_goes_on(small, store):
    bias = small.state.actor["head"]["output"]["bias"]
    actor = {"head": {**small.state.actor["head"], "output": {**small.state.actor["head"]["output"]}}}
    actor["head"]["output"]["bias"] = jnp.full_like(bias, jnp.inf)
    state, _, _ = small.update(small.state.replace(actor=actor), store, jax.random.key(0))
    assert small.agent.loss_names[int(state.health.first_bad)] in ("critic", "actor")
    assert not leaves_equal(state.world_model, small.state.world_model)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state.critic, state.world_model)))


def test_seeds_are_a_batch_axis(small, store):
    """Several seeds in one program give what each gives alone; in turn they take the memory of one."""
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(small.agent.init), keys))
    stores = [store, filled_replay(seed=1), filled_replay(seed=2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stores)
    scratch = {}
    for update in (jax.vmap(small.agent.update), small.agent.update_in_turn):
        program = jax.jit(update).lower(states, stacked, keys).compile()
        scratch[update] = program.memory_analysis().temp_size_in_bytes
        together, after, metrics = program(states, stacked, keys)
        assert leaves_equal(after, stacked)
        for i in range(3):
            alone, _, own = small.update(jax.tree.map(lambda x, i=i: x[i], states), stores[i], keys[i])
            for name in own:
                np.testing.assert_allclose(metrics[name][i], own[name], rtol=2e-3, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(together.updates[i], alone.updates)
            for kernels, kernel in zip(*map(jax.tree.leaves, (together.actor, alone.actor)), strict=True):
                np.testing.assert_allclose(kernels[i], kernel, atol=1e-5)
    side_by_side, in_turn = scratch.values()
    assert in_turn < 0.6 * side_by_side


def test_acting_computes_the_states_that_training_computes(small):
    """Step by step with the ring, over resets, against the training pass given the same latents."""
    steps = random_steps(10, streams=3)
    steps = steps._replace(is_first=steps.is_first | (np.arange(10) == 0)[:, None])
    model = make_networks(SMALL.algorithm, SPEC, jnp.float32).merge("world_model", small.state.world_model)

    carry = small.agent.init_carry(small.state, 3)
    latents, rings = [], []
    for t in range(10):
        carry = carry.replace(action=jnp.asarray(steps.action[t]))  # as if these actions had been chosen
        observation = Observation(jnp.asarray(steps.image[t]), jnp.asarray(steps.is_first[t]))
        before = carry
        _, carry = small.act(small.state, carry, observation, jax.random.key(t))
        latents.append(carry.latent)
        rings.append((before, carry))

    windows = jax.tree.map(lambda x: jnp.swapaxes(jnp.asarray(x), 0, 1), steps)
    sample = jnp.stack(latents, axis=1).reshape(3, 10, 4, 5)
    draws = GivenSampler({"posterior": sample, "prior": sample, "augmented": sample})
    _, out = world_model_loss(model, windows, SMALL.algorithm, draws, to_float(windows.image), None)
    slots = SMALL.algorithm.model.attention_context + 1
    for block, keys in enumerate(out.observed.cache[0]):
        for t in range(10):
            ours = rings[t][1].ring.keys[block][:, :, t % slots]
            np.testing.assert_allclose(ours.reshape(3, -1), keys[:, t], rtol=1e-3, atol=1e-4)
    # What the actor is fed: acting evaluated by the mode chooses what the training pass would choose.
    evaluate = jax.jit(small.agent.act_evaluate)
    actor = jax.tree.map(lambda x: x * 20.0, small.state.actor)  # far from ties
    policy = make_networks(SMALL.algorithm, SPEC, jnp.float32).merge("actor", actor)
    mode = policy(features(out.observed.latent, out.observed.deter)).mode()
    for t in range(10):
        observation = Observation(jnp.asarray(steps.image[t]), jnp.asarray(steps.is_first[t]))
        chosen, _ = evaluate(small.state.replace(actor=actor), rings[t][0], observation, jax.random.key(t))
        np.testing.assert_array_equal(chosen, mode[:, t])


def test_a_reset_forgets_everything(small):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 256, (1, 64, 64, 3)), jnp.uint8)
    fresh = small.agent.init_carry(small.state, 1)
    used = fresh
    for t in range(5):
        other = jnp.asarray(rng.integers(0, 256, (1, 64, 64, 3)), jnp.uint8)
        _, used = small.act(small.state, used, Observation(other, jnp.asarray([t == 0])), jax.random.key(t))
    for key in range(4):
        observation = Observation(image, jnp.asarray([True]))
        a, one = small.act(small.state, fresh, observation, jax.random.key(key))
        b, two = small.act(small.state, used, observation, jax.random.key(key))
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one.latent, two.latent)


def test_evaluation_takes_the_mode_and_training_samples(small):
    observation = Observation(jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.asarray([True]))
    carry = small.agent.init_carry(small.state, 1)
    sampled = {
        int(small.act(small.state, carry, observation, jax.random.key(k))[0].argmax()) for k in range(40)
    }
    assert len(sampled) > 1
    evaluate = jax.jit(small.agent.act_evaluate)
    flat = jax.tree.map(lambda x: x * 0.0, small.state.actor)
    bias = flat["head"]["output"]["bias"].at[2].set(0.1)
    flat = {"head": {**flat["head"], "output": {**flat["head"]["output"], "bias": bias}}}
    state = small.state.replace(actor=flat)
    modes = {int(evaluate(state, carry, observation, jax.random.key(k))[0].argmax()) for k in range(40)}
    assert modes == {2}


CONTINUOUS = EnvSpec(image_shape=(64, 64, 3), num_actions=2, discrete=False)


def test_continuous_actions_have_an_agent():
    agent = make_agent(SMALL, CONTINUOUS)

    def learn_and_act(key):
        state, _, metrics = agent.update(agent.init(key), filled_replay(spec=CONTINUOUS), key)
        observation = Observation(jnp.zeros((3, 64, 64, 3), jnp.uint8), jnp.ones(3, bool))
        return metrics, agent.act(state, agent.init_carry(state, 3), observation, key)[0]

    metrics, action = jax.eval_shape(learn_and_act, jax.random.key(0))
    assert action.shape == (3, 2)
    assert {value.shape for value in metrics.values()} == {()}


@pytest.mark.slow
def test_continuous_actions_train_and_act():
    spec = CONTINUOUS
    agent = make_agent(SMALL, spec)
    state = jax.jit(agent.init)(jax.random.key(0))
    store = filled_replay(spec=spec)
    store = store.replace(action=jax.random.normal(jax.random.key(0), store.action.shape) * 2)
    state, _, metrics = jax.jit(agent.update)(state, store, jax.random.key(0))
    assert all(np.isfinite(value) for value in metrics.values())
    carry = agent.init_carry(state, 3)
    observation = Observation(jnp.zeros((3, 64, 64, 3), jnp.uint8), jnp.ones(3, bool))
    action, _ = jax.jit(agent.act)(state, carry, observation, jax.random.key(0))
    assert action.shape == (3, 2)


def test_actions_beyond_magnitude_one_are_clipped(small):
    model = make_networks(SMALL.algorithm, SPEC, jnp.float32).merge("world_model", small.state.world_model)
    latent = jnp.zeros((1, 20))
    np.testing.assert_allclose(
        model.mix(latent, jnp.asarray([[3.0, -5.0, 0.5, 0.0]])),
        model.mix(latent, jnp.asarray([[1.0, -1.0, 0.5, 0.0]])),
        rtol=1e-6,
    )


def test_report_is_a_picture(small, store):
    picture = jax.jit(small.agent.report)(small.state, store, jax.random.key(0))["open_loop"]
    assert picture.dtype == jnp.uint8
    assert picture.shape == (4 * 3 * 64, 6 * 64, 3)


def test_paper_sizes_are_the_published_ones():
    """41.25 M parameters in the world model for four actions, 1.05 M in the actor, 1.18 M in the critic."""
    config = dataclasses.replace(SMALL, algorithm=type(SMALL.algorithm)())
    state = jax.eval_shape(make_agent(config, SPEC).init, jax.random.key(0))
    count = lambda tree: sum(np.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    masked = 10 * 9 * 4 * 512 - 45 * 4 * 512  # rows that pad the stacked action weights
    assert round((count(state.world_model) - masked) / 1e6, 2) == 41.25
    assert round(count(state.actor) / 1e6, 2) == 1.05
    assert round(count(state.critic) / 1e6, 2) == 1.18
