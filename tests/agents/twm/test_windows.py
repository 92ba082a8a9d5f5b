import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.twm.conftest import ALGORITHM, GREY, replay_of, stream
from twister_jax.agents.twm import windows as W
from twister_jax.agents.twm.agent import Twm

OBSERVATIONS, STACK = 5, 4
gather = jax.jit(W.gather_windows, static_argnums=(3, 4))


def transitions(steps: dict[str, np.ndarray], oldest: int) -> list[dict]:
    """TWM's stream of observations, built one step at a time as its authors' replay does."""
    count = len(steps["frame"])
    observations = []
    history: list[np.ndarray] = []
    for index in range(oldest, count):
        history = (
            [steps["frame"][index]]
            if steps["first"][index] or not history
            else [
                *history,
                steps["frame"][index],
            ]
        )
        ended = bool(steps["terminal"][index]) if index + 1 == count else bool(steps["first"][index + 1])
        if not steps["first"][index] and observations:
            observations[-1] |= {
                "action": steps["action"][index],
                "reward": np.tanh(steps["reward"][index]),
                "terminated": bool(steps["terminal"][index]),
                "truncated": ended and not steps["terminal"][index],
            }
        if not ended:  # nobody acts at an episode's last frame
            padded = [history[0]] * (STACK - len(history)) + history[-STACK:]
            frames = np.stack(padded, axis=-1).reshape(64, 64, STACK)
            observations.append({"step": index - oldest, "frames": frames})
    return observations


@pytest.mark.parametrize(("count", "capacity"), [(60, 64), (64, 64), (100, 64)])
def test_windows_are_those_of_the_step_by_step_stream(count, capacity):
    streams = [stream(count, seed) for seed in (3, 4)]
    replay = replay_of(streams, capacity)
    allowed = np.asarray(W.valid_starts(replay, OBSERVATIONS))
    for number, steps in enumerate(streams):
        expected = transitions(steps, max(0, count - capacity))
        starts = [o["step"] for o in expected[: len(expected) - OBSERVATIONS + 1]]
        assert np.flatnonzero(allowed[number]).tolist() == starts
        padded = jnp.asarray(np.resize(starts, capacity))
        got = gather(replay, jnp.full(capacity, number), padded, OBSERVATIONS, STACK)
        for row in range(len(starts)):
            window = expected[row : row + OBSERVATIONS]
            np.testing.assert_array_equal(got.frames[row], np.stack([o["frames"] for o in window]))
            for name in ("action", "reward", "terminated", "truncated"):
                wanted = np.stack([o[name] for o in window[:-1]])
                np.testing.assert_allclose(getattr(got, name)[row], wanted, rtol=1e-6, err_msg=name)


def test_stacks_repeat_the_reset_frame_and_never_reach_into_the_episode_before():
    steps = stream(40, 5)
    steps["frame"] = np.repeat(np.arange(40, dtype=np.uint8)[:, None], 64 * 64, axis=1)
    replay = replay_of([steps], 40)
    index = jnp.arange(40)
    stacks = np.asarray(W.stack_frames(replay, jnp.zeros_like(index), index, STACK))[:, 0, 0]
    for here in range(40):
        reset = max(i for i in range(here + 1) if steps["first"][i])
        assert stacks[here].tolist() == [max(here - back, reset) for back in (3, 2, 1, 0)]


def test_labels_of_a_terminal_and_of_a_time_limit_end():
    windows = W.Windows(
        frames=jnp.zeros((1, 4, 1, 1, 1), jnp.uint8),
        action=jnp.zeros((1, 3, 2)),
        reward=jnp.zeros((1, 3)),
        terminated=jnp.array([[False, True, False]]),
        truncated=jnp.array([[False, False, True]]),
    )
    np.testing.assert_allclose(windows.discount(0.99), [[0.99, 0.0, 0.99]], rtol=1e-6)
    assert windows.last.tolist() == [[False, True, True]]


def test_balanced_sampling_counts_what_it_drew(filled):
    windows, after = jax.jit(W.sample_balanced, static_argnums=(2, 3, 4, 5))(
        filled, jax.random.key(0), 7, OBSERVATIONS, STACK, 20.0
    )
    assert windows.frames.shape == (7, OBSERVATIONS, 64, 64, STACK)
    assert int(after.visits.sum()) == 7
    assert int(after.visits.max()) == 1
    assert not np.any(np.asarray(after.visits)[~np.asarray(W.valid_starts(filled, OBSERVATIONS))[:, :64]])


def test_uniform_sampling_ignores_visits_and_counts_them(filled):
    balanced = Twm(ALGORITHM, GREY, jnp.float32)
    uniform = Twm(dataclasses.replace(ALGORITHM, balanced_sampling=False), GREY, jnp.float32)

    def windows(agent, replay):
        batch, after = jax.jit(agent.sample)(replay, jax.random.key(0))
        return batch.windows.frames, after.visits

    fresh, counted = windows(uniform, filled)
    assert counted.sum() == ALGORITHM.batch_size
    drawn = dataclasses.replace(filled, visits=1000 * counted)
    np.testing.assert_array_equal(windows(uniform, drawn)[0], fresh)
    np.testing.assert_array_equal(windows(balanced, filled)[0], fresh)  # where nothing was drawn yet
    assert np.any(windows(balanced, drawn)[0] != fresh)
