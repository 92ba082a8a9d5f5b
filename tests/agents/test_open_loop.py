"""What an agent's world model foresees depends on what it was shown, and on nothing later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import filled_replay
from twister_jax.agents.base import Dream, Glimpse
from twister_jax.agents.open_loop import open_loop, open_loop_picture
from twister_jax.replay.store import Transition


def begin(state, count):
    return jnp.zeros(count)


def look(state, mind):
    zeros = jnp.zeros_like(mind)
    image = jnp.broadcast_to(mind[:, None, None, None] / 255.0, (*mind.shape, 64, 64, 3))
    return Glimpse(image, mind, jnp.ones_like(mind), zeros)


COUNTING = Dream(
    begin=begin,
    observe=lambda state, mind, step, key: jnp.where(step.is_first, 0.0, mind) + step.image[:, 0, 0, 0],
    imagine=lambda state, mind, action, key: mind + 100.0 * action[:, 0],
    look=look,
    policy=lambda state, mind, key: jnp.ones((*mind.shape, 1)),
    learned_reward=lambda reward: reward,
)
"""A mind that adds up the brightness it is shown, and an action's hundredfold when it dreams."""


def windows(length, first_at=()):
    image = jnp.ones((2, length, 64, 64, 3), jnp.uint8)
    is_first = jnp.zeros((2, length), bool)
    for time in first_at:
        is_first = is_first.at[1, time].set(True)
    steps = jnp.zeros((2, length))
    return Transition(image, jnp.ones((2, length, 1)), steps, steps > 0, is_first)


def test_the_context_is_seen_and_the_rest_is_foreseen():
    found = open_loop(COUNTING, None, windows(5), 2, jax.random.key(0))
    np.testing.assert_array_equal(found.seen.reward[0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(found.foreseen.reward[0], [1, 2, 102, 202, 302])
    assert bool(found.known.all())


def test_what_lies_behind_the_episodes_end_is_not_held_against_the_model():
    found = open_loop(COUNTING, None, windows(5, first_at=(1, 4)), 2, jax.random.key(0))
    np.testing.assert_array_equal(found.known, [[True] * 5, [True] * 4 + [False]])
    np.testing.assert_array_equal(found.seen.reward[1], [1, 1, 2, 3, 1])


@pytest.mark.parametrize(("stored", "columns"), [(6, 6), (40, 16)])
def test_the_picture_has_labels_four_rows_a_window_and_a_line(stored, columns):
    replay = filled_replay(40)
    picture = open_loop_picture(COUNTING, None, replay, jax.random.key(0), stored)
    assert picture.dtype == jnp.uint8
    labels = picture.shape[1] - columns * 64
    assert picture.shape[0] == 4 * 4 * 64
    assert 0 < labels < 128
    assert bool((picture[:, 0] == 255).all())
    line = np.flatnonzero((np.asarray(picture) == [255, 80, 80]).all(axis=(0, 2)))
    assert list(line) == [labels + columns // 2 * 64, labels + columns // 2 * 64 + 1]
