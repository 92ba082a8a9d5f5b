"""The replay store against a plain list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twister_jax.replay import store
from twister_jax.replay.store import Replay, Transition

SHAPE, ACTIONS, CAPACITY, STREAMS, LENGTH = (2, 2, 3), 3, 13, 2, 5

insert = jax.jit(store.insert, donate_argnums=0)
sample = jax.jit(store.sample, static_argnums=(2, 3))


def numbered(index: int) -> Transition:
    """Step `index` of every stream; what is stored can be told from it."""
    streams = np.arange(STREAMS)
    return Transition(
        image=np.broadcast_to(
            ((index + 100 * streams) % 256).astype(np.uint8)[:, None, None, None], (STREAMS, *SHAPE)
        ),
        action=np.full((STREAMS, ACTIONS), (index + 0.5) / 128, np.float32),
        reward=(1000 * streams + index).astype(np.float32),
        terminal=np.full(STREAMS, index % 7 == 6),
        is_first=np.full(STREAMS, index % 7 == 0),
    )


def filled(count: int) -> Replay:
    replay = store.init(STREAMS, CAPACITY, SHAPE, ACTIONS)
    for index in range(count):
        replay = insert(replay, numbered(index))
    return replay


@settings(max_examples=25, deadline=None)
@given(st.integers(LENGTH, 4 * CAPACITY), st.integers(0, 2**31 - 1))
def test_windows_are_consecutive_and_never_cross_the_write_head(count, seed):
    windows = sample(filled(count), jax.random.key(seed), 64, LENGTH)
    reward = np.asarray(windows.reward)
    stream, index = (reward // 1000).astype(int), (reward % 1000).astype(int)
    assert np.all(stream == stream[:, :1])
    assert np.all(np.diff(index, axis=1) == 1)
    assert index.min() >= max(0, count - CAPACITY)
    assert index.max() < count
    np.testing.assert_array_equal(windows.image[..., 0, 0, 0], (index + 100 * stream) % 256)
    np.testing.assert_array_equal(windows.is_first, index % 7 == 0)
    np.testing.assert_array_equal(windows.terminal, index % 7 == 6)
    np.testing.assert_array_equal(windows.action[..., 0], np.where(index % 7 == 0, 0, (index + 0.5) / 128))


@pytest.mark.parametrize("count", [9, CAPACITY, CAPACITY + 4])
def test_start_positions_are_uniform_over_all_streams(count):
    windows = sample(filled(count), jax.random.key(0), 40_000, LENGTH)
    starts, counts = np.unique(np.asarray(windows.reward)[:, 0], return_counts=True)
    possible = STREAMS * (min(count, CAPACITY) - LENGTH + 1)
    assert len(starts) == possible
    expected = 40_000 / possible
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_a_reset_step_has_no_action_whatever_is_given():
    replay = filled(8)
    np.testing.assert_array_equal(replay.action[:, 0], 0.0)
    np.testing.assert_array_equal(replay.action[:, 1], 1.5 / 128)
    np.testing.assert_array_equal(replay.action[:, 7], 0.0)


def test_actions_are_stored_as_the_environments_took_them():
    """A Gaussian policy's sample may lie beyond ±1, where environments do not go."""
    given = np.array([[-7.0, 0.25, 1.5], [1.0, -1.0, np.inf]], np.float32)
    step = numbered(1)._replace(action=given)
    replay = insert(store.init(STREAMS, CAPACITY, SHAPE, ACTIONS), step)
    np.testing.assert_array_equal(replay.action[:, 0], [[-1.0, 0.25, 1.0], [1.0, -1.0, 1.0]])


def test_insertion_is_in_place():
    replay = store.init(1, 1000, (64, 64, 3), ACTIONS)
    step = jax.tree.map(lambda x: jnp.asarray(x[:1]), numbered(0))._replace(
        image=jnp.zeros((1, 64, 64, 3), jnp.uint8)
    )
    compiled = jax.jit(store.insert, donate_argnums=0).lower(replay, step).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= replay.frames.nbytes
    assert memory.temp_size_in_bytes < replay.frames.nbytes / 10
    before = replay.frames.unsafe_buffer_pointer()
    assert compiled(replay, step).frames.unsafe_buffer_pointer() == before


def test_a_hundred_thousand_rgb_steps_fit_in_little_more_than_their_frames():
    shapes = jax.eval_shape(lambda: store.init(1, 100_000, (64, 64, 3), 18))
    stored = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert stored <= 1.1 * 100_000 * 64 * 64 * 3


def test_wrong_shapes_are_refused():
    replay = filled(1)
    step = numbered(1)
    for wrong in (
        step._replace(image=step.image[:1]),
        step._replace(reward=step.reward[:, None]),
        step._replace(action=step.action[:, :2]),
    ):
        with pytest.raises(AssertionError):
            store.insert(replay, wrong)
