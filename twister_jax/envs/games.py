"""Names and reference scores of the games."""

import difflib
import functools
import re
from pathlib import Path

from twister_jax.errors import UserError

CATCH = "Catch"

# (random, human) raw scores, as every Atari 100k paper uses them (Mnih et al. 2015; Wang et al. 2016).
REFERENCE_SCORES: dict[str, tuple[float, float]] = {
    "Alien": (227.8, 7127.7),
    "Amidar": (5.8, 1719.5),
    "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3),
    "BankHeist": (14.2, 753.1),
    "BattleZone": (2360.0, 37187.5),
    "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5),
    "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4),
    "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7),
    "Gopher": (257.6, 2412.5),
    "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8),
    "Kangaroo": (52.0, 3035.0),
    "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3),
    "MsPacman": (307.3, 6951.6),
    "Pong": (-20.7, 14.6),
    "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0),
    "Seaquest": (68.4, 42054.7),
    "UpNDown": (533.4, 11693.2),
}

ATARI_100K: tuple[str, ...] = tuple(REFERENCE_SCORES)


def resolve_game(name: str) -> str:
    """The canonical CamelCase name of a game, from any of its usual spellings.

    `MsPacman`, `ms_pacman`, `ms-pacman`, `ALE/MsPacman-v5` and `MsPacmanNoFrameskip-v4` are the same
    game, in any case. Besides the 26 games of Atari 100k and Catch, every single-player game in
    ale-py's wheel is known.

    Raises:
      UserError: no game is called so; the message offers close matches.
    """
    key = _key(name)
    for canonical in (*ATARI_100K, CATCH):
        if _key(canonical) == key:
            return canonical
    names = {_key(each): each for each in (*ATARI_100K, CATCH, *_roms())}
    if key in names:
        return names[key]
    close = [names[each] for each in difflib.get_close_matches(key, names, n=3, cutoff=0.7)]
    if close:
        raise UserError(
            f"unknown game {name!r}: did you mean {' or '.join(close)}? "
            "(26 Atari 100k games and Catch; see --help)"
        )
    raise UserError(f"unknown game {name!r}: expected one of the 26 Atari 100k games or Catch (see --help)")


def rom_path(game: str) -> Path:
    """The ROM of an Atari game, given its canonical name.

    Raises:
      UserError: the game has no ROM in ale-py's wheel.
    """
    try:
        return _roms()[game]
    except KeyError:
        raise UserError(f"{game} has no ROM in the installed ale-py") from None


def human_normalized(game: str, score: float) -> float | None:
    """(score - random) / (human - random), so 1.0 is the human reference; None where there is none.

    Args:
      game: canonical name.
      score: raw score of a full game, or a mean of several.
    """
    if game not in REFERENCE_SCORES:
        return None
    random, human = REFERENCE_SCORES[game]
    return (score - random) / (human - random)


def _key(name: str) -> str:
    """What all spellings of a game have in common."""
    name = re.sub(r"^ale/", "", name.strip().lower())
    name = re.sub(r"(noframeskip|deterministic)?-v\d+$", "", name)
    return re.sub(r"[ _-]", "", name)


@functools.cache
def _roms() -> dict[str, Path]:
    """ROM files by canonical name. The emulator is loaded here, and not before somebody needs it."""
    from ale_py import ALEInterface, roms

    files = sorted(Path(roms.__file__).parent.glob("*.bin"))
    # The wheel also holds two-player games, which the single-player interface refuses.
    playable = [file for file in files if ALEInterface.isSupportedROM(file)]
    return {"".join(part.capitalize() for part in file.stem.split("_")): file for file in playable}
