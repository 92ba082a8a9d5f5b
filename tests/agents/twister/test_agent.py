"""The whole agent at a small size: learning, acting, and what must not happen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import SMALL, SPEC, filled_replay, random_steps
from twister_jax.agents.base import Observation
from twister_jax.agents.twister.agent import Twister, make_agent
from twister_jax.agents.twister.world_model import augment, features, to_float, world_model_loss
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.distributions import GivenSampler
from twister_jax.training.seeds import update_all

TWISTER = Twister(SMALL.algorithm, SPEC, jnp.float32)


@pytest.fixture(scope="module")
def replay():
    return filled_replay()


def indifferent(actor, to_action_2=0.0):
    """An actor to whom all states are alike, and all actions but for a small preference."""
    zeros = jax.tree.map(jnp.zeros_like, actor)
    zeros["head"]["output"]["bias"] = zeros["head"]["output"]["bias"].at[2].set(to_action_2)
    return zeros


def assert_independent(first, second, sigmas=5):
    """Two sequences of uniform draws of 4: every pair is as frequent as every other."""
    counts = np.bincount(4 * np.ravel(first) + np.ravel(second), minlength=16)
    expected = counts.sum() / 16
    assert np.abs(counts - expected).max() < sigmas * np.sqrt(expected), counts


def with_actor(state, actor):
    """The state with another actor's parameters."""
    return state.replace(trained=state.trained.replace(params=state.trained.params | {"actor": actor}))


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_an_update_is_a_function_of_its_arguments(small, replay):
    one, _, metrics = small.update(small.state, replay, jax.random.key(1))
    two, _, again = small.update(small.state, replay, jax.random.key(1))
    assert leaves_equal(one, two)
    assert leaves_equal(metrics, again)
    other, _, _ = small.update(small.state, replay, jax.random.key(2))
    assert not leaves_equal(one.trained.params["world_model"], other.trained.params["world_model"])
    assert int(one.trained.optimizers["world_model"].adam[1].count) == 1
    assert all(np.isfinite(value) for value in metrics.values())


def test_every_network_learns_and_the_replay_is_returned_unchanged(small, replay):
    state, after, _ = small.update(small.state, replay, jax.random.key(1))
    assert leaves_equal(replay, after)
    before, learned = small.state.trained.params, state.trained.params
    assert learned.keys() == {"world_model", "actor", "critic"}
    for name in learned:
        assert not leaves_equal(learned[name], before[name]), name
    assert not leaves_equal(state.slow_critic, small.state.slow_critic)
    # What stays would be dead. The second update also reaches what lies behind outputs that start at zero.
    state, _, _ = small.update(state, replay, jax.random.key(2))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (path, not np.array_equal(a, b)),
        before["world_model"],
        state.trained.params["world_model"],
    )
    pairs = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
    still = [path for path, did in pairs if not did]
    assert not still


def test_slow_critic_follows_by_two_percent(small, replay):
    state, _, _ = small.update(small.state, replay, jax.random.key(1))
    state2, _, _ = small.update(state, replay, jax.random.key(2))
    jax.tree.map(
        lambda old, slow, new: np.testing.assert_allclose(
            slow, 0.98 * old + 0.02 * new, rtol=1e-5, atol=1e-8
        ),
        state.slow_critic,
        state2.slow_critic,
        state2.trained.params["critic"],
    )


def test_updates_reduce_the_image_loss(small, replay):
    state, first = small.state, None
    for i in range(60):
        state, replay, metrics = small.update(state, replay, jax.random.key(i))
        first = first if first is not None else float(metrics["losses/image"])
    assert float(metrics["losses/image"]) < first


def test_a_reward_that_is_not_finite_leaves_no_trace(small, replay):
    broken = replay.replace(reward=jnp.full_like(replay.reward, jnp.nan))
    state, _, _ = small.update(small.state, broken, jax.random.key(0))
    for ours, before in (
        (state.trained.params, small.state.trained.params),
        (state.trained.optimizers, small.state.trained.optimizers),
    ):
        assert leaves_equal(ours["world_model"], before["world_model"])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    health = small.agent.health(state)
    assert (int(health.skipped), int(health.consecutive), int(health.longest)) == (1, 1, 1)
    assert health.first_bad_name == "reward"
    state, _, _ = small.update(state, broken, jax.random.key(1))
    state, _, _ = small.update(state, replay, jax.random.key(2))
    health = small.agent.health(state)
    assert (int(health.skipped), int(health.consecutive), int(health.longest)) == (2, 0, 2)


def test_a_broken_actor_is_named_and_everything_else_goes_on(small, replay):
    actor = jax.tree.map(jnp.copy, small.state.trained.params["actor"])
    actor["head"]["output"]["bias"] = jnp.full_like(actor["head"]["output"]["bias"], jnp.inf)
    state, _, _ = small.update(with_actor(small.state, actor), replay, jax.random.key(0))
    assert state.health.first_bad_name in ("critic", "actor")
    params = state.trained.params
    assert not leaves_equal(params["world_model"], small.state.trained.params["world_model"])
    assert leaves_equal(params["actor"], actor)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params["critic"], params["world_model"])))


def test_every_loss_and_gradient_is_watched(small, replay, monkeypatch):
    recorded = []

    def record(health, finite):
        recorded.append(set(finite))
        return health

    monkeypatch.setattr("twister_jax.agents.base.Health.record", record)
    metrics = jax.eval_shape(make_agent(SMALL, SPEC).update, small.state, replay, jax.random.key(0))[2]
    assert recorded == [set(TWISTER.terms)]
    losses = {name.removeprefix("losses/") for name in metrics if name.startswith("losses/")}
    gradients = {name.removeprefix("gradient_norm/") for name in metrics if name.startswith("gradient_norm/")}
    assert set(TWISTER.terms) == losses - {"contrastive"} | {f"{name}_gradient" for name in gradients}


@pytest.mark.slow
def test_seeds_are_a_batch_axis(small, replay):
    """Several seeds in one program give what each gives alone; in turn they take the memory of one."""
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(small.agent.init), keys))
    replays = [replay, filled_replay(seed=1), filled_replay(seed=2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *replays)
    active = jnp.array([True, False, True])
    scratch = {}
    for way in ("side by side", "in turn"):
        update = update_all(small.agent, way == "in turn")
        program = jax.jit(update).lower(states, stacked, keys, active).compile()
        scratch[way] = program.memory_analysis().temp_size_in_bytes
        together, after, metrics = program(states, stacked, keys, active)
        assert leaves_equal(after, stacked)
        for i in range(3):
            before = jax.tree.map(lambda x, i=i: x[i], states)
            if not active[i]:
                assert leaves_equal(jax.tree.map(lambda x, i=i: x[i], together), before)
                continue
            alone, _, own = small.update(before, replays[i], keys[i])
            for name in own:
                np.testing.assert_allclose(metrics[name][i], own[name], rtol=2e-3, atol=1e-4, err_msg=name)
            actors = (jax.tree.leaves(each.trained.params["actor"]) for each in (together, alone))
            for kernels, kernel in zip(*actors, strict=True):
                np.testing.assert_allclose(kernels[i], kernel, atol=1e-5)
    assert scratch["in turn"] < 0.6 * scratch["side by side"]


def test_acting_computes_the_states_that_training_computes(small):
    """Step by step with the cache, over resets, against the training pass given the same latents."""
    steps = random_steps(10, streams=3)
    steps = steps._replace(is_first=steps.is_first | (np.arange(10) == 0)[:, None])
    model = TWISTER.world_model(small.state.trained.params["world_model"])

    carry = small.agent.init_carry(small.state, 3)
    latents, carries = [], []
    for t in range(10):
        carry = carry.replace(action=jnp.asarray(steps.action[t]))  # as if these actions had been chosen
        observation = Observation(jnp.asarray(steps.image[t]), jnp.asarray(steps.is_first[t]))
        before = carry
        _, carry = small.act(small.state, carry, observation, jax.random.key(t))
        latents.append(carry.latent)
        carries.append((before, carry))

    windows = jax.tree.map(lambda x: jnp.swapaxes(jnp.asarray(x), 0, 1), steps)
    sample = jnp.stack(latents, axis=1).reshape(3, 10, 4, 5)
    draws = GivenSampler({"posterior": sample, "prior": sample, "augmented": sample})
    _, out = world_model_loss(model, windows, SMALL.algorithm, draws, to_float(windows.image), None)
    slots = SMALL.algorithm.model.attention_context + 1
    for block, keys in enumerate(out.observed.cache[0]):
        for t in range(10):
            ours = carries[t][1].cache.keys[block][:, :, t % slots]
            np.testing.assert_allclose(ours.reshape(3, -1), keys[:, t], rtol=1e-3, atol=1e-4)
    # What the actor is fed: acting evaluated by the mode chooses what the training pass would choose.
    evaluate = jax.jit(small.agent.act_evaluate)
    actor = jax.tree.map(lambda x: x * 20.0, small.state.trained.params["actor"])  # far from ties
    state = with_actor(small.state, actor)
    mode = TWISTER.actor(actor)(features(out.observed.latent, out.observed.deter)).mode()
    for t in range(10):
        observation = Observation(jnp.asarray(steps.image[t]), jnp.asarray(steps.is_first[t]))
        chosen, _ = evaluate(state, carries[t][0], observation, jax.random.key(t))
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


def test_another_action_that_was_taken_is_what_acting_remembers(small):
    image = jnp.zeros((2, 64, 64, 3), jnp.uint8)
    carry = small.agent.init_carry(small.state, 2)
    _, carry = small.act(small.state, carry, Observation(image, jnp.ones(2, bool)), jax.random.key(0))
    observation = Observation(image + 90, jnp.asarray([False, True]))

    def after(action):
        taken = small.agent.took(carry, jax.nn.one_hot(jnp.full(2, action), SPEC.num_actions))
        return small.act(small.state, taken, observation, jax.random.key(1))[1].cache.keys[0]

    one, other = after(0), after(1)
    assert not np.array_equal(one[0], other[0])  # keys are of (z, a)
    np.testing.assert_array_equal(one[1], other[1])  # but for an episode's first


def test_evaluation_takes_the_mode_where_the_configuration_says_so(small):
    observation = Observation(jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.asarray([True]))
    carry = small.agent.init_carry(small.state, 1)
    actor = indifferent(small.state.trained.params["actor"], to_action_2=0.1)
    state = with_actor(small.state, actor)
    evaluation = dataclasses.replace(SMALL.evaluation, sample_actions=True)
    sampling = make_agent(dataclasses.replace(SMALL, evaluation=evaluation), SPEC)

    def chosen(act):
        act = jax.jit(act)
        return {int(act(state, carry, observation, jax.random.key(k))[0].argmax()) for k in range(40)}

    assert not SMALL.evaluation.sample_actions
    assert chosen(small.agent.act_evaluate) == {2}
    assert chosen(small.agent.act) == {0, 1, 2, 3}
    assert chosen(sampling.act_evaluate) == {0, 1, 2, 3}


def test_every_action_is_drawn_by_itself(small):
    """Environments that show the same, from the same carry: what differs is drawn, and by nothing else."""
    state = with_actor(small.state, indifferent(small.state.trained.params["actor"]))
    image = jnp.broadcast_to(jnp.arange(64, dtype=jnp.uint8)[:, None, None], (2, 64, 64, 3))
    carry = small.agent.init_carry(state, 2)

    @jax.jit
    @jax.vmap
    def act(key):
        """Two steps in a row, as the loop takes them: a key for each."""
        keys = jax.random.split(key)
        first, after = small.agent.act(state, carry, Observation(image, jnp.ones(2, bool)), keys[0])
        second, _ = small.agent.act(state, after, Observation(image, jnp.zeros(2, bool)), keys[1])
        return first.argmax(-1), second.argmax(-1), after.latent.reshape(2, 4, 5).argmax(-1)

    first, second, latent = jax.tree.map(np.asarray, act(jax.random.split(jax.random.key(0), 1_000)))
    assert_independent(first[:, 0], first[:, 1])  # two environments
    assert_independent(first, second)  # two steps
    assert_independent(first[:-1], first[1:])  # two keys
    differ = np.mean(latent[:, 0] != latent[:, 1], axis=0)  # of five classes; at random 0.8 do
    assert np.all(differ > 0.6)
    # The latent and the action are drawn apart.
    assert all(len(np.unique(first[:, 0][latent[:, 0, 0] == each])) == 4 for each in range(5))


def test_what_an_update_draws_it_draws_by_itself(small, replay, monkeypatch):
    """A key for each of: the second views, the latents, dropout, and both draws of every imagined step."""
    seen = {}

    class Watched(Twister):
        def world_model_gradients(self, params, windows, view, sampler, dropout_key):
            seen["latents"], seen["dropout"] = sampler._key, dropout_key
            return super().world_model_gradients(params, windows, view, sampler, dropout_key)

        def imagine(self, params, observed, windows, noise, sampler):
            seen["imagination"] = noise
            start, seen["trajectory"] = super().imagine(params, observed, windows, noise, sampler)
            return start, seen["trajectory"]

    def watched_augment(key, windows, config):
        seen["view"] = key
        return augment(key, windows, config)

    monkeypatch.setattr("twister_jax.agents.twister.agent.augment", watched_augment)
    twister = Watched(SMALL.algorithm, SPEC, jnp.float32)
    state = with_actor(small.state, indifferent(small.state.trained.params["actor"]))
    windows, _ = twister.sample(replay, jax.random.key(0))

    @jax.jit
    def watch(key):
        twister.learn(state, windows, key)
        parts = [seen[name] for name in ("view", "latents", "dropout", "imagination")]
        keys = [jax.random.key_data(each) for each in jax.tree.leaves(parts)]
        return jnp.concatenate([jnp.atleast_2d(each) for each in keys]), seen["trajectory"].action.argmax(-1)

    actions = []
    for seed in range(12):
        keys, action = watch(jax.random.key(seed))
        assert len(np.unique(keys, axis=0)) == 3 + 2 * SMALL.algorithm.imagination_horizon
        actions.append(np.asarray(action))
    actions = np.stack(actions)  # [update, step, sequence]
    assert_independent(actions[:, :-1], actions[:, 1:])
    assert_independent(actions[:, :, :-1], actions[:, :, 1:])
    assert_independent(actions[:-1], actions[1:])


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
    replay = filled_replay(spec=spec)
    replay = replay.replace(action=jax.random.normal(jax.random.key(0), replay.action.shape) * 2)
    state, _, metrics = jax.jit(agent.update)(state, replay, jax.random.key(0))
    assert all(np.isfinite(value) for value in metrics.values())
    carry = agent.init_carry(state, 3)
    observation = Observation(jnp.zeros((3, 64, 64, 3), jnp.uint8), jnp.ones(3, bool))
    action, _ = jax.jit(agent.act)(state, carry, observation, jax.random.key(0))
    assert action.shape == (3, 2)


def test_actions_beyond_magnitude_one_are_clipped(small):
    model = TWISTER.world_model(small.state.trained.params["world_model"])
    latent = jnp.zeros((1, 20))
    np.testing.assert_allclose(
        model.mix(latent, jnp.asarray([[3.0, -5.0, 0.5, 0.0]])),
        model.mix(latent, jnp.asarray([[1.0, -1.0, 0.5, 0.0]])),
        rtol=1e-6,
    )


def test_report_is_a_picture(small, replay):
    picture = jax.jit(small.agent.report)(small.state, replay, jax.random.key(0))["open_loop"]
    assert picture.dtype == jnp.uint8
    assert picture.shape == (4 * 4 * 64, 92 + 6 * 64, 3)


def test_paper_sizes_are_the_published_ones():
    """41.25 M parameters in the world model for four actions, 1.05 M in the actor, 1.18 M in the critic."""
    config = dataclasses.replace(SMALL, algorithm=type(SMALL.algorithm)())
    state = jax.eval_shape(make_agent(config, SPEC).init, jax.random.key(0))
    params = state.trained.params
    count = lambda tree: sum(np.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    masked = 10 * 9 * 4 * 512 - 45 * 4 * 512  # rows that pad the stacked action weights
    assert round((count(params["world_model"]) - masked) / 1e6, 2) == 41.25
    assert round(count(params["actor"]) / 1e6, 2) == 1.05
    assert round(count(params["critic"]) / 1e6, 2) == 1.18
