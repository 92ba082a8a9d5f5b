import numpy as np
import pytest

from twister_jax.envs.base import IMAGE_SIZE
from twister_jax.envs.remember import CUE, RememberConfig, RememberEnv
from twister_jax.presets import make_config


def frames_of(env):
    """The frames of an episode up to the one that the answer is given to, and the cue's side."""
    frames = [env.reset().image]
    side = int(np.argwhere((frames[0] == CUE[:3]).all(-1))[:, 1].mean() > IMAGE_SIZE / 2)
    for _ in range(RememberConfig().blank_frames + 1):
        frames.append(env.step(0).image)
    return frames, side


def test_a_player_who_remembers_always_wins_and_one_who_does_not_wins_half():
    env, sides, scores = RememberEnv(0), [], []
    for _ in range(60):
        _, side = frames_of(env)
        step = env.step(side)
        assert (step.terminal, step.episode) == (True, (0, 1.0, 7, False))
        frames_of(env)
        scores.append(env.step(1).reward)
        sides.append(side)
    assert 15 < sum(sides) < 45
    assert abs(np.mean(scores)) < 0.5


def test_an_agent_of_four_frames_cannot_know():
    """What a policy that reads the last four frames is given does not depend on the cue."""
    episodes = [frames_of(env) for env in [RememberEnv(3)] for _ in range(20)]
    assert {side for _, side in episodes} == {0, 1}
    last_four = [np.stack(frames[-4:]) for frames, _ in episodes]
    for seen in last_four[1:]:
        np.testing.assert_array_equal(seen, last_four[0])


def test_the_cue_lies_within_the_attention_context_of_every_preset_that_learns():
    for preset in ("paper", "cpu"):
        config = make_config("twister", preset, "Remember")
        assert config.env.blank_frames + 1 <= config.algorithm.model.attention_context
        assert config.env.blank_frames >= 4  # more than a stack of four frames bridges


def test_the_bar_asks_after_the_blank_frames_and_only_the_answer_counts():
    env = RememberEnv(0, blank_frames=2)
    env.reset()
    steps = [env.step(action) for action in (0, 1, 0, 1)]
    assert [len(np.unique(step.image.reshape(-1, 3), axis=0)) for step in steps] == [1, 1, 2, 2]
    assert [step.reward == 0 for step in steps] == [True, True, True, False]
    assert env.step(0).is_first


@pytest.mark.parametrize("moment", range(9))
def test_state_is_exact_at_every_moment(moment):
    env, other = RememberEnv(5, grayscale=True), RememberEnv(6, grayscale=True)
    for _ in range(moment):
        env.step(1)
    other.set_state(env.get_state())
    for action in [0, 1, 1] * 10:
        ours, theirs = env.step(action), other.step(action)
        np.testing.assert_array_equal(ours.image, theirs.image)
        assert ours[1:] == theirs[1:]
    assert env.spec.image_shape == (64, 64, 1)
