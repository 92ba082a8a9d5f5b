"""From a name to its suite: spellings, close matches, what is recorded about a game, and the presets."""

import dataclasses
import re

import ale_py
import pytest

from twister_jax import envs
from twister_jax.envs.atari import REFERENCE_SCORES, AtariConfig
from twister_jax.envs.catch import CatchConfig
from twister_jax.envs.emulator import rom_path
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.training.evaluation import protocol

ATARI_100K = tuple(REFERENCE_SCORES)


def snake(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


# ---- names ---------------------------------------------------------------------------------------


def test_there_are_26_games_and_catch():
    assert envs.suite("atari").names() == ATARI_100K
    assert len(ATARI_100K) == 26
    assert envs.suite("catch").names() == ("Catch", "ContinuousCatch")


@pytest.mark.parametrize("game", [*ATARI_100K, "SpaceInvaders"])
def test_every_usual_spelling_is_the_same_game(game):
    for name in (
        game,
        game.lower(),
        game.upper(),
        snake(game),
        snake(game).replace("_", "-"),
        f"ALE/{game}-v5",
        f"{game}NoFrameskip-v4",
        f"{game}Deterministic-v0",
        f"{game}-v4",
        f" {game} ",
        f"atari:{game}",
        f"Atari:{game.lower()}",
        f"atari:ALE/{game}-v5",
    ):
        suite, found = envs.resolve(name)
        assert (suite.name, found) == ("atari", game)
        assert envs.full_name(name) == game


@pytest.mark.parametrize("name", ["Catch", "catch", "CATCH", " Catch ", "catch:Catch", "Catch:catch"])
def test_every_spelling_of_catch(name):
    suite, found = envs.resolve(name)
    assert (suite.name, found) == ("catch", "Catch")
    assert envs.full_name(name) == "Catch"


@pytest.mark.parametrize("game", ATARI_100K)
def test_every_game_has_a_rom_that_the_emulator_knows(game):
    assert ale_py.ALEInterface.isSupportedROM(rom_path(game))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("Brekout", "Breakout"),
        ("mspackman", "MsPacman"),
        ("james_bond2", "Jamesbond"),
        ("Katch", "Catch"),
        ("atari:Pongg", "Pong"),
        ("catch:Katch", "Catch"),
    ],
)
def test_an_unknown_game_gets_close_matches_in_one_line(name, suggestion):
    with pytest.raises(UserError) as error:
        envs.resolve(name)
    message = str(error.value)
    assert message.startswith(f"unknown game {name!r} (did you mean ")
    assert suggestion in message.partition("?)")[0]
    assert "\n" not in message


def test_the_message_for_one_close_match():
    with pytest.raises(UserError) as error:
        envs.resolve("Brekout")
    message = str(error.value)
    assert message.startswith("unknown game 'Brekout' (did you mean Breakout?): expected Catch or ")
    assert "; a game of Atari 100k (" in message
    assert all(game in message for game in ATARI_100K)


@pytest.mark.parametrize("name", ["", "xyzzy", "a\nb", "../../etc/passwd", "atari:", "atari:xyzzy"])
def test_a_name_like_no_other_still_gets_one_line(name):
    with pytest.raises(UserError) as error:
        envs.resolve(name)
    assert "a game of Atari 100k" in str(error.value)
    assert "did you mean" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prefix_looks_in_that_suite_alone():
    with pytest.raises(UserError, match=r"unknown game 'catch:Pong': expected Catch or Continuous"):
        envs.resolve("catch:Pong")
    with pytest.raises(UserError, match="unknown game 'atari:Catch'"):
        envs.resolve("atari:Catch")


@pytest.mark.parametrize("name", ["atary:Pong", "ATARY:Pong"])
def test_an_unknown_suite_gets_close_matches(name):
    with pytest.raises(
        UserError, match=r"^unknown suite 'atary' \(did you mean atari\?\); one of catch, atari, "
    ):
        envs.resolve(name)


def test_two_player_games_are_not_offered():
    with pytest.raises(UserError):
        envs.resolve("Combat")


def test_catch_has_no_rom():
    with pytest.raises(UserError):
        rom_path("Catch")


# ---- scores --------------------------------------------------------------------------------------


def test_human_normalized_scores():
    atari, catch = envs.suite("atari"), envs.suite("catch")
    for game, (random, human) in REFERENCE_SCORES.items():
        assert atari.reference_scores(game) == (random, human)
        assert atari.normalize(game, random) == 0
        assert atari.normalize(game, human) == 1
    assert atari.normalize("Pong", 14.6 + 35.3) == pytest.approx(2)
    assert catch.normalize("Catch", 1.0) is None
    assert atari.normalize("SpaceInvaders", 1.0) is None


# ---- the protocol of evaluations -----------------------------------------------------------------


def test_the_protocol_of_catch_tells_of_catch():
    suite = envs.suite("catch")
    assert suite.protocol("Catch", suite.settings) == {
        "frames": "64x64 RGB, drawn anew at every step",
        "frame_skip": 1,
        "episode": "9 steps; reward 1 or -1 with the last",
        "best_score": 1.0,
    }
    grey = suite.protocol("Catch", CatchConfig(grayscale=True))
    assert grey["frames"] == "64x64 grey, drawn anew at every step"


def test_the_protocol_of_atari_tells_of_the_games_that_are_counted():
    suite = envs.suite("atari")
    assert suite.protocol("Pong", suite.settings) == {
        "frames": "64x64 RGB, maximum of the last two emulator frames",
        "frame_skip": 4,
        "sticky_actions": 0.0,
        "full_action_set": False,
        "life_loss_ends_game": False,
        "life_loss_ends_episode_in_training": False,
        "fire_start": False,
        "noop_max": 30,
        "time_limit_frames": 108_000,
    }
    settings = AtariConfig(
        frame_skip=3,
        sticky_actions=0.25,
        grayscale=True,
        life_loss_ends_episode=True,
        fire_start=True,
        noop_max=1,
        time_limit_frames=2,
        evaluation_noop_max=7,
        evaluation_time_limit_frames=900,
    )
    assert suite.protocol("Pong", settings) == {
        "frames": "64x64 grey, maximum of the last two emulator frames",
        "frame_skip": 3,
        "sticky_actions": 0.25,
        "full_action_set": False,
        "life_loss_ends_game": False,
        "life_loss_ends_episode_in_training": True,
        "fire_start": True,
        "noop_max": 7,
        "time_limit_frames": 900,
    }


@pytest.mark.parametrize(("game", "frame_skip"), [("Catch", 1), ("Pong", 4)])
def test_an_evaluation_records_the_protocol_of_the_suite_that_was_played(game, frame_skip):
    config = make_config(preset="debug", game=game)
    record = protocol(config, [], {"env_steps": 50, "updates": 3})
    suite, name = envs.resolve(game)
    assert record.items() >= suite.protocol(name, config.env).items()
    assert (record["suite"], record["frame_skip"]) == (suite.name, frame_skip)
    assert record["training_frames"] == 50 * frame_skip
    assert ("noop_max" in record) == ("time_limit_frames" in record) == (game == "Pong")
    assert ("maximum" in record["frames"]) == (game == "Pong")
    assert (record["random_score"], record["human_score"]) == (suite.reference_scores(name) or (None, None))


# ---- settings ------------------------------------------------------------------------------------


def test_each_suite_brings_its_own_settings():
    assert type(make_config(game="Catch").env) is CatchConfig
    assert type(make_config(game="Pong").env) is AtariConfig
    with pytest.raises(UserError, match=r"env\.sticky_actions"):
        make_config(game="Catch", **{"env.sticky_actions": 0.25})


def test_presets_of_a_suite_are_heeded():
    assert make_config(preset="debug", game="Pong").env.time_limit_frames == 2_000
    assert make_config(preset="cpu", game="Pong").env.evaluation_time_limit_frames == 18_000
    assert make_config(preset="cpu", game="Catch").train.steps == 1_600
    assert make_config(preset="paper", game="Pong").env == AtariConfig()


def test_settings_of_evaluation_games_do_not_tie_a_saved_state():
    """They may change between two parts of a run, and training's environments do not heed them."""
    suite, settings = envs.suite("atari"), AtariConfig()
    other = dataclasses.replace(settings, evaluation_noop_max=1, evaluation_time_limit_frames=1, num_envs=9)
    assert suite.identity("Pong", settings) == suite.identity("Pong", other)
    changed = dataclasses.replace(settings, noop_max=1)
    assert suite.identity("Pong", settings) != suite.identity("Pong", changed)
