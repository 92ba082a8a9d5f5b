import re

import ale_py
import pytest

from twister_jax.envs.games import ATARI_100K, REFERENCE_SCORES, human_normalized, resolve_game, rom_path
from twister_jax.errors import UserError


def snake(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def test_there_are_26_games():
    assert len(ATARI_100K) == 26


@pytest.mark.parametrize("game", [*ATARI_100K, "Catch", "SpaceInvaders"])
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
    ):
        assert resolve_game(name) == game


@pytest.mark.parametrize("game", ATARI_100K)
def test_every_game_has_a_rom_that_the_emulator_knows(game):
    assert ale_py.ALEInterface.isSupportedROM(rom_path(game))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("Brekout", "Breakout"), ("mspackman", "MsPacman"), ("james_bond2", "Jamesbond"), ("Katch", "Catch")],
)
def test_an_unknown_game_gets_close_matches_in_one_line(name, suggestion):
    with pytest.raises(UserError) as error:
        resolve_game(name)
    message = str(error.value)
    assert message.startswith(f"unknown game {name!r}: did you mean ")
    assert suggestion in message
    assert "\n" not in message


def test_the_message_for_one_close_match():
    with pytest.raises(UserError) as error:
        resolve_game("Brekout")
    expected = "unknown game 'Brekout': did you mean Breakout? (26 Atari 100k games and Catch; see --help)"
    assert str(error.value) == expected


@pytest.mark.parametrize("name", ["", "xyzzy", "a\nb", "../../etc/passwd"])
def test_a_name_like_no_other_still_gets_one_line(name):
    with pytest.raises(UserError) as error:
        resolve_game(name)
    assert "26 Atari 100k games" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_player_games_are_not_offered():
    with pytest.raises(UserError):
        resolve_game("Combat")


def test_catch_has_no_rom():
    with pytest.raises(UserError):
        rom_path("Catch")


def test_human_normalized_scores():
    for game, (random, human) in REFERENCE_SCORES.items():
        assert human_normalized(game, random) == 0
        assert human_normalized(game, human) == 1
    assert human_normalized("Pong", 14.6 + 35.3) == pytest.approx(2)
    assert human_normalized("Catch", 1.0) is None
    assert human_normalized("SpaceInvaders", 1.0) is None
