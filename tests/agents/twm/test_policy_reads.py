"""Policies that read the state (z, h), or frames: what they see, and that nothing else differs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.twm.conftest import ALGORITHM, CONFIG, GREY, replay_of, stream
from twister_jax.agents.base import Health, Observation, Trained
from twister_jax.agents.twm import behavior as B
from twister_jax.agents.twm.agent import Twm, TwmState, make_agent
from twister_jax.agents.twm.history import History, TwmCarry
from twister_jax.agents.twm.observation import flat, to_float
from twister_jax.agents.twm.windows import gather_windows
from twister_jax.envs.base import EnvStep
from twister_jax.presets import make_config
from twister_jax.training.state import RunState, observe

LATENT = ALGORITHM.model.stoch_groups * ALGORITHM.model.stoch_classes
VARIANTS = ("state", "frames")


def config_of(reads):
    model = dataclasses.replace(CONFIG.algorithm.model, policy_reads=reads)
    return dataclasses.replace(CONFIG, algorithm=dataclasses.replace(CONFIG.algorithm, model=model))


def twm_of(reads):
    return Twm(config_of(reads).algorithm, GREY, jnp.float32)


def state_of(twm):
    """Random parameters; networks of the same shapes get the same."""
    shapes = jax.eval_shape(twm.networks.init, jax.random.key(0))
    params = {}
    for name, shape in shapes.items():
        draw = partial(np.random.default_rng(0).normal, 0.0, 0.3)
        params[name] = jax.tree.map(lambda s, draw=draw: jnp.asarray(draw(s.shape), jnp.float32), shape)
    return TwmState(Trained.begin(params, twm.optimizers), Health.sound(twm.terms))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    twm = twm_of(request.param)
    return request.param, twm, state_of(twm)


def test_the_flag_is_a_field_with_three_values():
    assert make_config("twm").algorithm.model.policy_reads == "latent"
    for reads in VARIANTS:
        changed = make_config("twm", **{"algorithm.model.policy_reads": reads})
        assert changed.algorithm.model.policy_reads == reads


def test_h_while_acting_is_that_of_training():
    """Step by step over episodes that end, and over one that is longer than the memory."""
    twm, seen = twm_of("state"), replay_of([stream(24, 3)], 24)
    params = state_of(twm).trained.params
    first = np.asarray(seen.is_first[0])
    observed = np.flatnonzero(~np.append(first[1:], True))  # not an episode's last frame
    start = jnp.zeros(1, jnp.int32)
    windows = gather_windows(seen, start, start, len(observed), twm.stack)
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(24, LATENT)), jnp.float32)

    @jax.jit
    def whole(params):
        return twm.dynamics(params["dynamics"]).hidden_states(
            latents[observed][None, :-1], windows.action, windows.reward[:, :-1], windows.last[:, :-1], None
        )

    @jax.jit
    def see(params):
        dynamics = twm.dynamics(params["dynamics"])

        def step(history, inputs):
            image, is_first, reward, latent, action = inputs
            history = history.answered(Observation(image[None], is_first[None], reward[None]))
            return history.after(latent[None], action[None]), history.hidden(dynamics)[0]

        taken = jnp.concatenate([seen.action[0, 1:], jnp.zeros((1, 3))])
        inputs = (seen.frames[0], seen.is_first[0], seen.reward[0], latents, taken)
        return jax.lax.scan(step, History.empty(twm.config.model, 1, 3), inputs)[1]

    hidden, expected = see(params), whole(params)[0]
    for at, step in enumerate(observed):
        if first[step]:
            np.testing.assert_array_equal(hidden[step], 0.0)
        else:
            np.testing.assert_allclose(hidden[step], expected[at - 1], atol=1e-5)
    longest = np.diff(np.flatnonzero(np.append(first, True))).max()
    assert longest > twm.config.model.memory_steps + 2


def test_a_random_action_takes_the_place_of_the_chosen_one():
    agent, twm = make_agent(config_of("state"), GREY), twm_of("state")
    carry = twm.init_carry(state_of(twm), 2)
    chosen = carry.replace(history=carry.history.after(jnp.ones((2, LATENT)), jnp.eye(3)[:2]))
    after = agent.took(chosen, jnp.eye(3)[1:])
    np.testing.assert_array_equal(after.history.action[:, -1], jnp.eye(3)[1:])
    np.testing.assert_array_equal(after.history.action[:, :-1], chosen.history.action[:, :-1])
    assert make_agent(CONFIG, GREY).took(TwmCarry(carry.frames), jnp.eye(3)[:2]).history is None


def most_likely(_):
    """A sampler that takes the mode."""
    return lambda name, distribution: distribution.mode()


def test_imagination_shows_the_policy_what_it_is_to_see(variant):
    reads, twm, state = variant
    params, rng = state.trained.params, np.random.default_rng(3)
    start = B.StartStates(
        latents=jnp.asarray(rng.normal(size=(4, 2, LATENT)), jnp.float32),
        action=jax.nn.one_hot(rng.integers(0, 3, 4), 3),
        reward=jnp.zeros(4),
        last=jnp.array([False, True, False, False]),
    )
    restarts = jnp.asarray(rng.normal(size=(6, 3, LATENT)), jnp.float32)
    noise = jnp.zeros((6, 1))
    twm.config = dataclasses.replace(twm.config, restart_threshold=0.45)

    @jax.jit
    def run(params):
        trajectory, hidden = twm.imagine(params, start, restarts, noise, most_likely)
        policy = twm.actor(params["actor"])(trajectory.view[:, :-1])
        return trajectory, hidden, policy, twm.observation(params["observation"]).decoder(trajectory.latent)

    trajectory, hidden, policy, decoded = jax.device_get(run(params))
    np.testing.assert_array_equal(trajectory.action.argmax(-1), policy.argmax(-1))
    if reads == "frames":
        np.testing.assert_allclose(trajectory.view, decoded, atol=1e-5)
        return
    ended = np.concatenate([np.asarray(start.last)[:, None], trajectory.done], axis=1)
    assert ended[:, 1:].any()
    assert not ended[:, 1:].all()
    np.testing.assert_array_equal(trajectory.view[..., :LATENT], trajectory.latent)
    np.testing.assert_allclose(
        trajectory.view[..., LATENT:], np.where(ended[..., None], 0, hidden), atol=1e-6
    )


def test_acting_shows_the_policy_real_frames_or_the_state(variant):
    reads, twm, state = variant
    rng = np.random.default_rng(4)
    params, carry = state.trained.params, twm.init_carry(state, 2)
    act = jax.jit(partial(twm.act, sample_actions=False))
    for step in range(4):
        observation = Observation(
            image=jnp.asarray(rng.integers(0, 256, (2, 64, 64, 1), dtype=np.uint8)),
            is_first=jnp.array([step == 0, step in (0, 2)]),
            reward=jnp.asarray(rng.normal(size=2), jnp.float32),
        )
        before = carry
        action, carry = act(state, carry, observation, jax.random.key(0))
        frames = to_float(carry.frames)
        if reads == "frames":
            seen = frames
        else:
            history = before.history.answered(observation)
            latent = flat(twm.observation(params["observation"]).encoder(frames).mode())
            hidden = history.hidden(twm.dynamics(params["dynamics"]))
            assert bool(hidden[0].any()) == (step > 0)
            assert bool(hidden[1].any()) == (step in (1, 3))
            seen = jnp.concatenate([latent, hidden], -1)
        expected = twm.actor(params["actor"])(seen).argmax(-1)
        np.testing.assert_array_equal(action.argmax(-1), expected)


def test_only_actor_and_critic_are_other_networks(variant):
    """Rewards are shown to those alone who read them, and an update returns what it takes."""
    reads, twm, state = variant
    agent, plain = make_agent(config_of(reads), GREY), make_agent(CONFIG, GREY)
    for name in ("observation", "dynamics"):
        shapes = [
            jax.tree.map(jnp.shape, each.trained.params[name]) for each in (state, state_of(twm_of("latent")))
        ]
        assert shapes[0] == shapes[1]
    inputs = {"state": LATENT + twm.config.model.hidden_size, "frames": 8 * 2 * 4}[reads]
    for name in ("actor", "critic"):
        layers = state.trained.params[name].get("mlp", state.trained.params[name])["layers"]
        assert layers[0]["kernel"].shape[0] == inputs
    assert (agent.reads_reward, plain.reads_reward) == (reads == "state", False)
    shown = RunState.shapes(agent, GREY, 2).observation
    assert (shown.reward is None) == (reads != "state")
    assert RunState.shapes(plain, GREY, 2).observation.reward is None


@pytest.mark.slow
def test_learning_moves_every_network_and_the_world_model_as_before(variant, filled):
    reads, _, state = variant
    agent, plain = make_agent(config_of(reads), GREY), make_agent(CONFIG, GREY)
    theirs = state_of(twm_of("latent"))
    after, _, metrics = jax.device_get(jax.jit(agent.update)(state, filled, jax.random.key(1)))
    assert all(np.isfinite(value) for value in metrics.values())
    for name in ("actor", "critic"):
        moved = jax.tree.map(
            lambda x, y: bool((x != y).any()), state.trained.params[name], after.trained.params[name]
        )
        assert any(jax.tree.leaves(moved))
    expected = jax.device_get(jax.jit(plain.update)(theirs, filled, jax.random.key(1)))[0]
    for name in ("observation", "dynamics"):
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            after.trained.params[name],
            expected.trained.params[name],
        )
    behavior = agent.pretraining[-1]
    _, _, metrics = jax.jit(behavior.update)(state, filled, jax.random.key(2))
    assert all(np.isfinite(value) for value in metrics.values())
    assert not set(metrics) & {"losses/decoder", "losses/latent"}


def test_observations_carry_rewards_to_those_who_read_them():
    nothing = np.zeros(1, bool)
    step = EnvStep(np.zeros((1, 64, 64, 1), np.uint8), np.array([2.5], np.float32), nothing, nothing, ())
    assert observe(make_agent(CONFIG, GREY), step).reward is None
    np.testing.assert_array_equal(observe(make_agent(config_of("state"), GREY), step).reward, [2.5])
