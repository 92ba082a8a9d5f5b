"""Games are played by the protocol, shown again exactly, and ranked by score."""

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from tests import third
from twister_jax.cli import main
from twister_jax.envs import make_vector_env
from twister_jax.envs.base import Episode
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.training import evaluation
from twister_jax.view.drawing import number
from twister_jax.view.dream import dream
from twister_jax.view.games import Game, Games
from twister_jax.view.watch import chosen, draw, watch


@pytest.fixture
def games(brief):
    return Games(brief, 3)


def test_the_games_are_those_of_the_evaluation(brief, games):
    env = make_vector_env("Catch", brief.config.env, 2, games._seed, evaluation=True)
    played = evaluation.play(brief.agent, brief.state, env, [2, 1], brief.config.seed)
    assert sorted(game.episode for game in games.games) == sorted(played)


def test_a_game_is_shown_again(games):
    assert [(game.episode.env, game.first, game.stop) for game in games.games] == [
        (0, 0, 10),
        (1, 0, 10),
        (0, 10, 20),
    ]
    for game in games.games:
        frames = list(games.show(game))
        assert len(frames) == game.episode.length + 1
        assert frames[-1].score == game.episode.score
        assert frames[0].action is None
        assert all(frame.action in (0, 1, 2) for frame in frames[1:])
        assert frames[0].screen.shape == (64, 64, 3)
        ball = [int(np.flatnonzero((frame.image == [250, 220, 60]).all(-1).any(1))[0]) for frame in frames]
        assert ball == sorted(ball), "the ball falls from the first frame to the last"


def test_values_are_those_of_the_step(games):
    """The third agent's critic says: the reward, and one."""
    for game in games.games:
        for frame in games.show(game):
            assert frame.value == pytest.approx(frame.reward + 1)


def test_an_environment_that_does_not_repeat_itself_is_noticed(brief):
    games = Games(brief, 3)
    steps = games._steps[0]
    steps[-1] = steps[-1]._replace(reward=0.5)
    with pytest.raises(UserError, match="does not repeat itself"):
        list(games.show(games.games[2]))


@pytest.mark.parametrize(
    ("game", "size"), [("Catch", (64, 64)), ("Breakout", (210, 160)), ("gym:CartPole-v1", (400, 600))]
)
def test_people_see_the_game_in_its_own_size_and_colours(game, size):
    if game.startswith("gym"):
        pytest.importorskip("gymnasium")
        pytest.importorskip("pygame")
    settings = make_config(third.AGENT, "debug", game, **{"env.grayscale": True}).env
    env = make_vector_env(game, settings, 2, 0, evaluation=True)
    env.reset()
    shown = env.screen(1)
    assert shown.shape == (*size, 3)
    assert env.spec.image_shape == (64, 64, 1)
    assert (shown.min(-1) < shown.max(-1)).any(), "it has colours"
    np.testing.assert_array_equal(shown, env.screen(1), "looking changes nothing")
    env.close()


def test_others_show_what_the_agent_sees():
    env = make_vector_env("slider:easy", None, 1, 0)
    step = env.reset()
    np.testing.assert_array_equal(env.screen(0), step.image[0])


def test_the_best_the_median_and_the_worst():
    ranked = [Game(Episode(0, float(score), 1, False), 0, 1) for score in (9, 5, 4, 1)]
    assert [(name, game.episode.score) for name, game in chosen(ranked).items()] == [
        ("best", 9),
        ("median", 5),
        ("worst", 1),
    ]
    assert list(chosen(ranked[:2])) == ["best", "worst"]
    assert list(chosen(ranked[:1])) == ["best"]


def test_frames_of_a_video_have_one_size(policy, games):
    game = games.games[0]
    played = games.played(game)
    frame = next(games.show(game))
    sizes = {
        draw(policy, frame._replace(score=score, reward=score, value=value), time, played).shape
        for time, score, value in ((0, 0.0, 0.0), (3, 123_456.0, -1e9), (9, -0.001, None))
    }
    assert len(sizes) == 1
    assert draw(policy, frame, 0, played, ["dream"]).shape[1] < next(iter(sizes))[1]


def test_values_are_drawn_as_far_as_the_game_has_come(policy, games):
    game = games.games[0]
    frame, played = next(games.show(game)), games.played(game)
    early, late = (draw(policy, frame, time, played).astype(int) for time in (2, 8))
    assert early.shape == late.shape
    changed = np.flatnonzero((early != late)[-60:].any(axis=(0, 2)))
    assert changed.min() > early.shape[1] * 0.2, "what was drawn stays"


def test_nothing_is_played_where_no_video_can_be_written(policy, tmp_path, monkeypatch):
    def missing(*_):
        raise UserError("a video needs imageio")

    monkeypatch.setattr("twister_jax.view.drawing.require", missing)
    monkeypatch.setattr("twister_jax.view.watch.Games", None)
    for look in (lambda: watch(policy, tmp_path, 3), lambda: dream(policy, tmp_path, 4, 4)):
        with pytest.raises(UserError, match="needs imageio"):
            look()


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (-1.0, "-1"), (12345.0, "12,345"), (0.9996, "1.00"), (-0.001, "0.00")]
)
def test_numbers_for_people(value, shown):
    assert number(value) == shown


def test_watch_writes_videos_and_a_contact_sheet(run, capsys):
    assert main(["watch", str(run), "--episodes", "3"]) == 0
    printed = capsys.readouterr().out
    folder = run / "videos"
    names = [f"watch-0000060-{name}" for name in ("best.mp4", "median.mp4", "sheet.png", "worst.mp4")]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "3 games: best" in printed
    frames = imageio.imread(folder / names[0], plugin="FFMPEG")
    assert frames.shape[0] == 10
    assert len(np.unique(frames.mean(axis=(1, 2, 3)))) > 3, "something moves"
    with Image.open(folder / names[2]) as sheet:
        assert sheet.width > 8 * 64
