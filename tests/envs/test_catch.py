import itertools

import numpy as np
import pytest

from twister_jax.envs.catch import BALL, PADDLE, CatchEnv


def where(image, colour):
    """Centre (row, column) of a colour on a 10x5 grid, or None."""
    rows, columns = np.nonzero((image == np.array(colour, np.uint8)).all(-1))
    return None if len(rows) == 0 else (int(rows.mean() * 10 / 64), int(columns.mean() * 5 / 64))


def test_a_player_who_looks_at_the_picture_always_catches():
    env = CatchEnv(0)
    for _ in range(50):
        step = env.reset()
        for _ in range(9):
            ball, paddle = where(step.image, BALL[:3]), where(step.image, PADDLE[:3])
            step = env.step(1 + int(np.sign(ball[1] - paddle[1])))
        assert step.terminal
        assert step.reward == 1.0
        assert step.episode == (0, 1.0, 9, False)


def test_the_ball_falls_a_row_per_step_and_its_column_stays():
    env = CatchEnv(3)
    first = where(env.reset().image, BALL[:3])
    rows = [where(env.step(1).image, BALL[:3]) for _ in range(9)]
    assert rows == [(row, first[1]) for row in range(1, 10)]


def test_a_missed_ball_costs_one_and_the_paddle_stays_on_the_board():
    env = CatchEnv(0)
    rewards = set()
    for _ in range(40):
        step = env.reset()
        column = where(step.image, BALL[:3])[1]
        for _ in range(9):
            step = env.step(0)
        assert step.reward == (1.0 if column == 0 else -1.0)
        rewards.add(step.reward)
    assert rewards == {1.0, -1.0}


def test_every_column_comes_up():
    env = CatchEnv(1)
    columns = [where(env.reset().image, BALL[:3])[1] for _ in range(200)]
    assert set(columns) == set(range(5))


def test_reset_semantics():
    env = CatchEnv(0)
    for count in range(100):  # the first step resets, as after any end
        step = env.step(count % 3)
        assert step.is_first == (count % 10 == 0)
        assert step.terminal == (count % 10 == 9)
        assert (step.episode is not None) == step.terminal
        assert (step.reward != 0) == step.terminal


@pytest.mark.parametrize("moment", range(11))
def test_state_is_exact_at_every_moment(moment):
    env, actions = CatchEnv(5), itertools.cycle([0, 2, 2, 1])
    for _ in range(moment):
        env.step(next(actions))
    other = CatchEnv(6)
    other.set_state(env.get_state())
    for action in itertools.islice(actions, 60):
        a, b = env.step(action), other.step(action)
        np.testing.assert_array_equal(a.image, b.image)
        assert a[1:] == b[1:]


def test_grayscale_keeps_ball_paddle_and_background_apart():
    env = CatchEnv(0, grayscale=True)
    image = env.reset().image
    assert image.shape == env.spec.image_shape == (64, 64, 1)
    values = sorted(np.unique(image).tolist())
    assert len(values) == 3
    assert min(np.diff(values)) > 50


# ---- continuous actions ------------------------------------------------------------------------------


def test_the_continuous_paddle_moves_by_the_value_of_the_action():
    env = CatchEnv(0, continuous=True)
    assert (env.spec.num_actions, env.spec.discrete) == (1, False)
    still, last = env.reset().image, None
    for value, column in [(1.0, 3.0), (-0.5, 2.5), (0.25, 2.75), (1.0, 3.75), (1.0, 4.0), (-1.0, 3.0)]:
        last = env.step(np.array([value], np.float32)).image
        blue = np.nonzero((last[-1] == np.array(PADDLE[:3])).all(-1))[0]
        assert blue.mean() == pytest.approx((column + 0.5) * 64 / 5 - 0.5, abs=1)
        assert len(blue) in (12, 13)
    assert not np.array_equal(still, last)


def test_a_continuous_player_who_looks_catches_and_half_a_column_is_enough():
    env = CatchEnv(0, continuous=True)
    for _ in range(20):
        step = env.reset()
        for _ in range(9):
            ball, at = where(step.image, BALL[:3])[1], env.get_state()["paddle"]
            step = env.step(np.clip(np.array([ball - at]), -1, 1))
        assert step.episode == (0, 1.0, 9, False)
    for miss, reward in [(0.5, 1.0), (0.51, -1.0)]:
        env.reset()
        state = env.get_state()
        env.set_state(state | {"row": 8, "paddle": float(state["ball"])})
        sign = 1 if state["ball"] < 2 else -1
        assert env.step(np.array([sign * miss])).reward == reward
