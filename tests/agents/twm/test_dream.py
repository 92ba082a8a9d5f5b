"""Seen step by step with a memory that rolls, TWM's world model is what it is over whole windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twister_jax.agents import make_agent
from twister_jax.agents.base import Health, Trained
from twister_jax.agents.twm.agent import Twm, TwmState
from twister_jax.agents.twm.dream import make_dream
from twister_jax.agents.twm.observation import flat, to_float
from twister_jax.agents.twm.windows import gather_windows
from twister_jax.replay import store

from .conftest import ALGORITHM, CONFIG, GREY, MODEL, replay_of, stream

TWM = Twm(ALGORITHM, GREY, jnp.float32)
START = jnp.zeros(1, jnp.int32)


@pytest.fixture(scope="module")
def seen(params):
    """24 steps in a row, with several ends, seen one after the other."""
    replay = replay_of([stream(24, 3)], 24)
    state = TwmState(Trained(params, {}), Health.sound(TWM.terms))
    steps = store.gather(replay, START, START, 24)
    dream = make_dream(TWM)

    @jax.jit
    def see(steps):
        def step(mind, inputs):
            here, key = inputs
            mind = dream.observe(state, mind, here, key)
            return mind, (mind.latent, dream.look(state, mind))

        over_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps)
        keys = jax.random.split(jax.random.key(0), 24)
        return jax.lax.scan(step, dream.begin(state, 1), (over_time, keys))[1]

    return replay, see(steps), params


def test_predictions_step_by_step_are_those_of_whole_windows(seen):
    """Training drops an episode's last frame, and a dream sees it: neither looks across an end."""
    replay, (latent, glimpse), params = seen
    first = np.asarray(replay.is_first[0])
    observed = np.flatnonzero(~np.append(first[1:], True))  # not an episode's last frame
    count = len(observed) - 1
    windows = gather_windows(replay, START, START, count + 1, MODEL.frame_stack)
    encoder = TWM.observation(params["observation"]).encoder
    whole = flat(encoder(to_float(windows.frames)).mode())[:, :count]
    np.testing.assert_array_equal(whole[0], latent[observed[:count], 0])
    dynamics = TWM.dynamics(params["dynamics"])
    hidden = dynamics.hidden_states(whole, windows.action, windows.reward[:, :-1], windows.last[:, :-1], None)
    predicted = dynamics.predict(hidden).reward[0]
    outcomes = observed[:count] + 1
    np.testing.assert_allclose(glimpse.reward[outcomes, 0], predicted, atol=1e-4)
    assert np.ptp(predicted) > 0.01


def test_a_glimpse_is_of_the_newest_frame(seen):
    _, (latent, glimpse), params = seen
    decoded = TWM.observation(params["observation"]).decoder(latent[:, 0])
    np.testing.assert_allclose(glimpse.image[:, 0], decoded[..., -1:], atol=1e-5)
    assert bool(((glimpse.continues >= 0) & (glimpse.continues <= 1)).all())


def test_rewards_are_compared_as_they_are_learned():
    dream = make_agent(CONFIG, GREY).dream
    np.testing.assert_allclose(dream.learned_reward(jnp.array([0.0, 5.0])), np.tanh([0, 5]))
