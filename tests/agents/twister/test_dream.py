"""Seen step by step, TWISTER's world model is what it is over whole windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import SMALL, SPEC, random_steps
from twister_jax.agents.open_loop import open_loop
from twister_jax.agents.twister.agent import Twister
from twister_jax.nn.distributions import GivenSampler
from twister_jax.replay.store import Transition

TWISTER = Twister(SMALL.algorithm, SPEC, jnp.float32)


@pytest.fixture(scope="module")
def windows():
    steps = random_steps(7, streams=3)
    steps = jax.tree.map(lambda x: jnp.swapaxes(jnp.asarray(x), 0, 1), steps)
    return steps._replace(is_first=steps.is_first.at[:, 0].set(True))


@pytest.fixture(scope="module")
def minds(small, windows):
    """The minds of all steps, over time."""
    dream = small.agent.dream

    @jax.jit
    def see(windows: Transition):
        def step(mind, inputs):
            here, key = inputs
            mind = dream.observe(small.state, mind, here, key)
            return mind, mind

        over_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), windows)
        keys = jax.random.split(jax.random.key(0), 7)
        return jax.lax.scan(step, dream.begin(small.state, 3), (over_time, keys))[1]

    return see(windows)


def test_what_is_seen_step_by_step_is_what_training_sees(small, windows, minds):
    model = TWISTER.world_model(small.state.trained.params["world_model"])
    latent = jnp.swapaxes(minds.latent, 0, 1).reshape(3, 7, 4, 5)
    posterior = model.posterior(windows.image / 255.0 - 0.5)
    given = GivenSampler({"posterior": latent, "prior": latent})
    seen = model.observe(posterior, windows.action, windows.is_first, given, None)
    np.testing.assert_allclose(jnp.swapaxes(minds.deter, 0, 1), seen.deter, atol=1e-5)


def test_a_glimpse_is_of_the_same_state(small, minds):
    dream, params = small.agent.dream, small.state.trained.params
    mind = jax.tree.map(lambda x: x[-1], minds)
    glimpse = dream.look(small.state, mind)
    model = TWISTER.world_model(params["world_model"])
    np.testing.assert_allclose(glimpse.image, model.decoder(mind.latent) + 0.5, atol=1e-6)
    here = jnp.concatenate([mind.latent, mind.deter], -1)
    np.testing.assert_allclose(glimpse.reward, model.reward(here).mean(), atol=1e-6)
    np.testing.assert_allclose(glimpse.value, TWISTER.critic(params["critic"])(here).mean(), atol=1e-6)
    np.testing.assert_allclose(glimpse.continues, jax.nn.sigmoid(model.continues(here).logit), atol=1e-6)
    action = dream.policy(small.state, mind, jax.random.key(1))
    np.testing.assert_array_equal(action.sum(-1), 1.0)


def test_what_is_foreseen_follows_from_the_context_and_the_actions(small, windows):
    dream = small.agent.dream
    foresee = jax.jit(lambda windows: open_loop(dream, small.state, windows, 3, jax.random.key(0)).foreseen)
    known = foresee(windows)
    unseen = foresee(windows._replace(image=windows.image.at[:, 3:].set(0)))
    np.testing.assert_array_equal(known.image, unseen.image)
    other = foresee(windows._replace(image=windows.image.at[:, 2].set(0)))
    assert float(jnp.abs(known.image - other.image)[:, 3:].max()) > 0
    action = windows.action.at[:, 4:].set(jnp.roll(windows.action[:, 4:], 1, axis=-1))
    turned = foresee(windows._replace(action=action))
    np.testing.assert_array_equal(known.continues[:, :4], turned.continues[:, :4])
    assert float(jnp.abs(known.continues - turned.continues)[:, 4:].max()) > 0
