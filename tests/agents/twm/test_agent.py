"""The whole agent at a small size: learning, acting, and what must not happen."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.twm.conftest import ALGORITHM, CONFIG, GREY, MODEL, replay_of, stream
from twister_jax.agents.base import Observation
from twister_jax.agents.twm.agent import Twm, TwmState, make_agent
from twister_jax.agents.twm.behavior import actor_loss, critic_loss
from twister_jax.agents.twm.observation import to_float
from twister_jax.agents.twm.windows import is_observation, stack_frames, valid_starts
from twister_jax.agents.twm.world_model import start_states
from twister_jax.envs.base import EnvSpec
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.save import Snapshot
from twister_jax.training.seeds import update_all


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

    old, new = before.trained.params, after.trained.params
    return {name for name in old if differs(old[name], new[name])}


def test_an_update_learns_and_counts_its_draws(agent, update, state, filled):
    after, replay, metrics = jax.device_get(update(state, filled, jax.random.key(1)))
    assert all(np.isfinite(value) for value in metrics.values())
    health = agent.health(after)
    assert {f"losses/{term}" for term in health.terms if not term.endswith("_gradient")} <= set(metrics)
    assert agent.headline in metrics
    assert changed(state, after) == {"observation", "dynamics", "critic", "actor"}
    assert replay.visits.sum() == ALGORITHM.batch_size
    assert health.skipped == 0
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


def with_uniform_policy(state: TwmState) -> TwmState:
    """Its draws show the random numbers behind them."""
    params = state.trained.params
    layers = dict(params["actor"]["layers"])
    output = max(layers)
    layers[output] = jax.tree.map(jnp.zeros_like, layers[output])
    return state.replace(trained=state.trained.replace(params=params | {"actor": {"layers": layers}}))


class Recorded(Twm):
    """Keeps what passes between the parts of `learn`."""

    def world_model_gradients(self, *arguments):
        gradients, self.out = super().world_model_gradients(*arguments)
        return gradients, self.out

    def imagine(self, params, start, restarts, noise, sampler):
        self.imagined_with, self.start, self.restarts = params, start, restarts
        self.trajectory, hidden = super().imagine(params, start, restarts, noise, sampler)
        return self.trajectory, hidden


@dataclasses.dataclass
class Learned:
    """One call of `learn`, and what passed between its parts."""

    twm: Recorded
    before: TwmState
    after: TwmState
    batch: Any
    metrics: dict[str, Any]


@pytest.fixture(scope="module")
def learned(filled):
    """With steps so large that nothing computed before one can be taken for what is computed after it."""
    algorithm = dataclasses.replace(
        CONFIG.algorithm,
        **{
            f"{name}_optimizer": dataclasses.replace(CONFIG.algorithm.actor_optimizer, learning_rate=rate)
            for name, rate in {"observation": 1.0, "dynamics": 0.05, "critic": 0.5, "actor": 0.05}.items()
        },
    )
    twm = Recorded(algorithm, GREY, jnp.float32)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiled in half the time
    def run(replay, key):
        before = with_uniform_policy(twm.init(key))
        batch, _ = twm.sample(replay, key)
        after, metrics = twm.learn(before, batch, jax.random.fold_in(key, 1))
        recorded = {name: getattr(twm, name) for name in RECORDED}
        return before, after, batch, metrics, recorded

    before, after, batch, metrics, recorded = run(filled, jax.random.key(4))
    vars(twm).update(recorded)
    return Learned(twm, before, after, batch, metrics)


RECORDED = ("out", "imagined_with", "start", "restarts", "trajectory")


def test_imagination_starts_from_different_steps_of_the_batch(learned):
    candidates = start_states(learned.twm.out.latent, learned.batch.windows)
    ours, theirs = (
        np.concatenate([np.asarray(leaf, np.float32).reshape(len(leaf), -1) for leaf in tree], axis=1)
        for tree in (learned.twm.start, candidates)
    )
    (found,) = np.nonzero((theirs[:, None] == ours).all(-1).any(1))
    assert len(found) == len(ours) == ALGORITHM.imagination_batch


def test_imagination_uses_the_new_models_and_the_policy_of_before(learned):
    used, old, new = learned.twm.imagined_with, learned.before.trained.params, learned.after.trained.params
    for name, expected in {"observation": new, "dynamics": new, "critic": old, "actor": old}.items():
        jax.tree.map(np.testing.assert_array_equal, used[name], expected[name])
    # The restarts come of the new encoder too, whose posteriors are all but certain after such a step.
    frames, shape = to_float(learned.batch.fresh), (-1, MODEL.stoch_groups, MODEL.stoch_classes)
    likely, unlikely = (
        learned.twm.observation(params["observation"])
        .encoder(frames)
        .log_prob(learned.twm.restarts.reshape(shape))
        .sum()
        for params in (new, old)
    )
    assert likely > unlikely + 10


def test_imagined_actions_are_drawn_independently(learned):
    actions = np.asarray(learned.twm.trajectory.action.argmax(-1))
    assert (actions != actions[:, :1]).any(1).sum() >= len(actions) - 2  # with one key for every step: 0
    assert (actions != actions[:1]).any(0).all()


def test_the_actor_learns_from_the_advantages_of_the_critic_it_was_imagined_with(learned):
    twm, before, trajectory = learned.twm, learned.before.trained, learned.twm.trajectory

    @jax.jit
    def expected(critic):
        _, out = critic_loss(twm.critic(critic), trajectory, ALGORITHM.gae_lambda)

        def loss(params):
            return actor_loss(twm.actor(params), trajectory, out.advantages, ALGORITHM)[0]

        loss, gradient = jax.value_and_grad(loss)(before.params["actor"])
        stepped, norm, _ = before.step("actor", twm.optimizers["actor"], gradient, {"actor": loss})
        return stepped.params["actor"], loss, norm

    actor, loss, norm = expected(before.params["critic"])
    np.testing.assert_allclose(learned.metrics["losses/actor"], loss, rtol=1e-4)
    np.testing.assert_allclose(learned.metrics["gradient_norm/actor"], norm, rtol=1e-4)
    for ours, wanted in zip(
        *map(jax.tree.leaves, (learned.after.trained.params["actor"], actor)), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    # With the critic of after the update it would be another step.
    _, _, other = expected(learned.after.trained.params["critic"])
    assert abs(float(other / norm) - 1) > 1e-3


def test_what_is_not_finite_is_held_back(agent, update, state, filled):
    """NaN rewards are tokens of the dynamics model, and its predictions reach every loss."""
    poisoned = filled.replace(reward=jnp.full_like(filled.reward, jnp.nan))
    after, *_ = jax.device_get(update(state, poisoned, jax.random.key(1)))
    assert changed(state, after) == set()
    health = agent.health(after)
    assert health.skipped == 1
    assert health.first_bad_name == "consistency"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_the_sound_half_of_an_update_is_kept(agent, update, state, filled):
    params = state.trained.params
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params["critic"])
    bad_state = state.replace(trained=state.trained.replace(params=params | {"critic": broken}))
    after, *_ = jax.device_get(update(bad_state, filled, jax.random.key(1)))
    assert changed(state, after) == {"observation", "dynamics", "critic"}
    assert np.isnan(jax.tree.leaves(after.trained.params["critic"])[0]).all()
    health = agent.health(after)
    assert health.first_bad_name == "critic"
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
        assert all(np.isfinite(value) for value in metrics.values())


def test_published_budgets():
    agent = make_agent(make_config("twm", "paper"), GREY)
    assert [phase.updates for phase in agent.pretraining] == [18_750, 9_375, 834]
    assert agent.tokens_per_update == 1_600
    assert agent.min_replay_steps <= 5_000
    shapes = jax.eval_shape(agent.init, jax.random.key(0)).trained.params
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


def test_each_environment_and_each_step_has_a_draw_of_its_own(agent, act, state):
    """Under a uniform policy; with one random number for all, they would play the same actions."""
    uniform = with_uniform_policy(state)
    observation = Observation(jnp.full((16, 64, 64, 1), 99, jnp.uint8), jnp.ones(16, bool))
    carry = agent.init_carry(state, 16)
    one, other = (act(uniform, carry, observation, jax.random.key(seed))[0] for seed in (0, 1))
    assert (np.asarray(one).sum(0) > 0).all()
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EnvSpec((64, 64, 1), 3, discrete=False), "discrete actions only"),
        (EnvSpec((64, 64, 3), 3), "3 channels.*env.grayscale"),
    ],
)
def test_environments_it_cannot_play_are_refused(spec, message):
    with pytest.raises(UserError, match=f"^TWM .*{message}"):
        make_agent(CONFIG, spec)


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
    together = update_all(agent, way == "in turn")
    keys = jax.random.split(jax.random.key(5), 2)
    other = jax.jit(agent.init)(jax.random.key(1)), update(state, filled, keys[0])[1]
    each = [(state, filled), other]
    many = jax.tree.map(lambda *x: jnp.stack(x), *each)
    states, replays, metrics = jax.jit(together)(*many, keys, jnp.ones(2, bool))
    for index in range(2):
        one, replay, single = update(*each[index], keys[index])
        np.testing.assert_array_equal(replays.visits[index], replay.visits)
        np.testing.assert_allclose(metrics["losses/decoder"][index], single["losses/decoder"], rtol=1e-5)
        np.testing.assert_allclose(
            states.trained.params["actor"]["layers"][0]["kernel"][index],
            one.trained.params["actor"]["layers"][0]["kernel"],
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
    assert int(valid_starts(replay, ALGORITHM.batch_length + 2).sum()) >= ALGORITHM.batch_size
    assert int(valid_starts(replay, ALGORITHM.imagination_horizon + 1).sum()) >= ALGORITHM.imagination_batch
    assert int(is_observation(replay).sum()) >= ALGORITHM.batch_size * ALGORITHM.batch_length


def test_report_draws_a_picture(agent, state, filled):
    picture = jax.jit(agent.report)(state, filled, jax.random.key(0))["open_loop"]
    assert picture.dtype == jnp.uint8
    assert picture.shape == (4 * 4 * 64, 92 + min(16, ALGORITHM.min_replay_steps) * 64, 3)
