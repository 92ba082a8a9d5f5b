import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.twm.conftest import ALGORITHM, CONFIG, GREY, replay_of, stream
from twister_jax.agent import Observation
from twister_jax.config import Config, TwmConfig
from twister_jax.training.checkpoint import Checkpointer, Snapshot
from twister_jax.twm.agent import NETWORKS, make_agent
from twister_jax.twm.windows import is_observation, may_start, stack_frames


@pytest.fixture(scope="module")
def agent():
    return make_agent(CONFIG, GREY)


@pytest.fixture(scope="module")
def state(agent):
    return jax.jit(agent.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def update(agent):
    return jax.jit(agent.update)


@pytest.fixture(scope="module")
def act(agent):
    return jax.jit(agent.act)


def changed(before, after) -> set[str]:
    def differs(a, b):
        return any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    return {name for name in NETWORKS if differs(before.params[name], after.params[name])}


def test_an_update_learns_and_counts(agent, update, state, filled):
    after, replay, metrics = jax.device_get(update(state, filled, jax.random.key(1)))
    assert all(np.isfinite(value) for value in metrics.values())
    assert {f"losses/{name}" for name in agent.loss_names if not name.endswith("_gradient")} <= set(metrics)
    assert changed(state, after) == set(NETWORKS)
    assert replay.visits.sum() == ALGORITHM.batch_size
    assert after.updates == 1
    assert agent.health(after).skipped == 0
    again, *_ = jax.device_get(update(state, filled, jax.random.key(1)))
    assert changed(after, again) == set()


def test_an_update_returns_what_it_takes(agent, filled):
    """Same shapes and types, weakness included, or the loop would compile the update twice."""

    def kinds(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)

    def start(key):
        return agent.init(key), filled

    before = jax.eval_shape(start, jax.random.key(0))
    after = jax.eval_shape(lambda key: agent.update(*start(key), key)[:2], jax.random.key(0))
    assert kinds(before) == kinds(after)


def test_a_checkpoint_between_updates_changes_nothing(update, state, filled, tmp_path):
    """Bit for bit, and the visit counts that balanced sampling goes by with it."""
    keys = jax.random.split(jax.random.key(3), 4)
    through, store = state, filled
    for key in keys:
        through, store, _ = update(through, store, key)

    half, half_store = state, filled
    for key in keys[:2]:
        half, half_store, _ = update(half, half_store, key)
    checkpoints = tmp_path / "checkpoints"
    Checkpointer(checkpoints).save(2, Snapshot(half, half_store, b"", {}))
    found = Checkpointer(checkpoints).restore(half, jax.tree.map(jnp.zeros_like, half_store))
    assert found is not None
    resumed, resumed_store = found.state, found.replay
    for key in keys[2:]:
        resumed, resumed_store, _ = update(resumed, resumed_store, key)

    jax.tree.map(np.testing.assert_array_equal, (resumed, resumed_store), (through, store))
    assert int(store.visits.sum()) == 4 * ALGORITHM.batch_size


def test_decoder_loss_falls_on_repeated_updates(update, state, filled):
    replay, losses = filled, []
    for index in range(12):
        state, replay, metrics = update(state, replay, jax.random.key(index))
        losses.append(float(metrics["losses/decoder"]))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert int(replay.visits.sum()) == 12 * ALGORITHM.batch_size


def test_what_is_not_finite_is_held_back(agent, update, state, filled):
    """NaN rewards are tokens of the dynamics model, and its predictions reach every loss."""
    poisoned = filled.replace(reward=jnp.full_like(filled.reward, jnp.nan))
    after, *_ = jax.device_get(update(state, poisoned, jax.random.key(1)))
    assert changed(state, after) == set()
    assert after.updates == 1
    health = agent.health(after)
    assert health.skipped == 1
    assert agent.loss_names[int(health.first_bad)] == "consistency"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_the_sound_half_of_an_update_is_kept(agent, update, state, filled):
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params["critic"])
    bad_state = state.replace(params={**state.params, "critic": broken})
    after, *_ = jax.device_get(update(bad_state, filled, jax.random.key(1)))
    assert changed(state, after) == {"observation", "dynamics", "critic"}
    assert np.isnan(jax.tree.leaves(after.params["critic"])[0]).all()
    health = agent.health(after)
    assert agent.loss_names[int(health.first_bad)] == "critic"
    assert health.consecutive == 1


def test_pretraining_phases_train_their_own_networks(agent, state, filled):
    phases = {phase.name: phase for phase in agent.pretraining}
    assert [(phase.name, phase.updates) for phase in agent.pretraining] == [
        ("observation", 2),
        ("dynamics", 1),
        ("behavior", 1),
    ]
    expected = {"observation": {"observation"}, "dynamics": {"dynamics"}, "behavior": {"critic", "actor"}}
    for name, networks in expected.items():
        after, replay, metrics = jax.device_get(
            jax.jit(phases[name].update)(state, filled, jax.random.key(2))
        )
        assert changed(state, after) == networks
        assert replay.visits.sum() == 0
        assert after.updates == 0
        assert all(np.isfinite(value) for value in metrics.values())


def test_published_budgets():
    agent = make_agent(Config(agent="twm", algorithm=TwmConfig()), GREY)
    assert [phase.updates for phase in agent.pretraining] == [18_750, 9_375, 834]
    assert agent.tokens_per_update == 1_600
    assert agent.min_replay_steps <= 5_000
    shapes = jax.eval_shape(agent.init, jax.random.key(0)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(21.6e6, rel=3e-3)


def test_acting_stacks_frames_and_starts_over_at_a_reset(agent, act, state):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 2, 64, 64, 1), dtype=np.uint8)
    first = [[True, True], [False, False], [False, True], [False, False], [False, False]]
    carry = agent.init_carry(state, 2)
    for index in range(5):
        observation = Observation(jnp.asarray(images[index]), jnp.asarray(first[index]))
        action, carry = act(state, carry, observation, jax.random.key(index))
        assert action.shape == (2, 3)
        np.testing.assert_array_equal(action.sum(-1), 1)
    frames = np.asarray(carry.frames)
    for env, steps in ((0, [1, 2, 3, 4]), (1, [2, 2, 3, 4])):
        np.testing.assert_array_equal(frames[env], np.moveaxis(images[steps, env, :, :, 0], 0, -1))


def test_acting_sees_what_training_sees(agent, act, state):
    """The carry's stack is the replay's stack of the same step."""
    steps = stream(20, 7)
    carry = agent.init_carry(state, 1)
    index = jnp.arange(20)
    stacks = stack_frames(replay_of([steps], 20), jnp.zeros_like(index), index, 4)
    for step in range(20):
        image = jnp.asarray(steps["frame"][step].reshape(1, 64, 64, 1))
        observation = Observation(image, jnp.asarray(steps["first"][step : step + 1]))
        _, carry = act(state, carry, observation, jax.random.key(0))
        np.testing.assert_array_equal(carry.frames[0], stacks[step])


def test_evaluation_samples_actions_of_the_most_likely_latent(agent, state):
    """The latent is not sampled, so many keys give the policy's own frequencies."""
    observation = Observation(jnp.full((1, 64, 64, 1), 99, jnp.uint8), jnp.ones(1, bool))
    carry = agent.init_carry(state, 1)
    many = jax.jit(jax.vmap(lambda key: agent.act_evaluate(state, carry, observation, key)[0]))
    frequency = np.asarray(many(jax.random.split(jax.random.key(0), 400)))[:, 0].mean(0)
    assert (frequency > 0).sum() > 1
    mode_config = dataclasses.replace(
        CONFIG, evaluation=dataclasses.replace(CONFIG.evaluation, sample_actions=False)
    )
    mode = jax.jit(
        jax.vmap(lambda key: make_agent(mode_config, GREY).act_evaluate(state, carry, observation, key)[0])
    )
    assert (np.asarray(mode(jax.random.split(jax.random.key(0), 5)))[:, 0].mean(0) > 0).sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", ["side by side", "in turn"])
def test_seeds_are_a_batch_axis(agent, update, state, filled, way):
    """Two seeds in one program give what each gives alone; each counts the visits of its own replay."""
    together = jax.vmap(agent.update) if way == "side by side" else agent.update_in_turn
    keys = jax.random.split(jax.random.key(5), 2)
    other = jax.jit(agent.init)(jax.random.key(1)), update(state, filled, keys[0])[1]
    each = [(state, filled), other]
    many = jax.tree.map(lambda *x: jnp.stack(x), *each)
    states, replays, metrics = jax.jit(together)(*many, keys)
    for index in range(2):
        one, replay, single = update(*each[index], keys[index])
        np.testing.assert_array_equal(replays.visits[index], replay.visits)
        np.testing.assert_allclose(metrics["losses/decoder"][index], single["losses/decoder"], rtol=1e-5)
        np.testing.assert_allclose(
            states.params["actor"]["layers"][0]["kernel"][index],
            one.params["actor"]["layers"][0]["kernel"],
            atol=1e-5,
        )


def test_a_batch_that_fits_in_the_smallest_allowed_replay(agent):
    """min_replay_steps is enough however often episodes end."""
    count = agent.min_replay_steps
    first = np.arange(count) % 2 == 0  # episodes of a single action: every other step is no observation
    steps = {
        "frame": np.zeros((count, 64 * 64), np.uint8),
        "action": np.zeros((count, 3), np.float32),
        "reward": np.zeros(count, np.float32),
        "terminal": ~first,
        "first": first,
    }
    replay = replay_of([steps], count)
    assert int(may_start(replay, ALGORITHM.batch_length + 2).sum()) >= ALGORITHM.batch_size
    assert int(may_start(replay, ALGORITHM.imagination_horizon + 1).sum()) >= ALGORITHM.imagination_batch
    assert int(is_observation(replay).sum()) >= ALGORITHM.batch_size * ALGORITHM.batch_length


def test_report_draws_a_picture(agent, state, filled):
    picture = jax.jit(agent.report)(state, filled, jax.random.key(0))["open_loop"]
    assert picture.dtype == jnp.uint8
    assert picture.shape == (4 * 3 * 64, (ALGORITHM.batch_length + 1) * 64, 3)
