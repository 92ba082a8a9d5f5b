"""The emulator ALE, saved and restored exactly, and the ROMs that come with it."""

import base64
import functools
import zlib
from pathlib import Path
from typing import Any

import ale_py

from twister_jax.errors import UserError

_RESET = 255  # stands among the emulator's actions in the record of what was done to it
_LONGEST_RECORD = 100_000_000  # what is restored may come from a stranger
_REBOOT_AFTER = 20_000  # emulator frames, about a second and a half of emulation


@functools.cache
def roms() -> dict[str, Path]:
    """ROM files of single-player games by name, as in `MsPacman`."""
    from ale_py import roms as folder

    files = sorted(Path(folder.__file__).parent.glob("*.bin"))
    # The wheel also holds two-player games, which the single-player interface refuses.
    playable = [file for file in files if ale_py.ALEInterface.isSupportedROM(file)]
    return {"".join(part.capitalize() for part in file.stem.split("_")): file for file in playable}


class Emulator:
    """ALE with a memory of everything done to it since it was switched on.

    That record is its saved state. ALE can save a state itself, but not all of it (ale-py 0.12): the last
    picture, the positions at which the video chip draws objects, the data bus and the action that sticky
    actions repeat are left out, and games such as Qbert and Alien then go on with other pixels, some with
    another memory. Repeating it all from the start gives the same, whatever ALE forgets. To keep the
    record short, the emulator is switched off and on at the start of a game when it has become long.

    Args:
      rom: path of the ROM.
      seed: of ALE's own generator.
    """

    def __init__(self, rom: Path, seed: int):
        self._rom = rom
        self._seed = seed
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._boot()

    def reset(self) -> None:
        """Starts the game over."""
        if len(self._record) > _REBOOT_AFTER:
            self._boot()
        self._record.append(_RESET)
        self.ale.reset_game()

    def act(self, action: int) -> int:
        """Emulates one frame and returns its reward."""
        self._record.append(action)
        return self.ale.act(action)

    def lives(self) -> int:
        return self.ale.lives()

    def game_over(self) -> bool:
        return self.ale.game_over(with_truncation=False)

    def get_state(self) -> dict[str, Any]:
        record = base64.b64encode(zlib.compress(self._record)).decode()
        return {"seed": self._seed, "record": record}

    def set_state(self, state: dict[str, Any]) -> None:
        """Does everything again: takes as long as emulating that many frames."""
        self._seed = state["seed"]
        inflate = zlib.decompressobj()
        record = inflate.decompress(base64.b64decode(state["record"]), _LONGEST_RECORD)
        if inflate.unconsumed_tail or not inflate.eof:
            raise ValueError("the emulator's record is damaged or too long")
        self._boot()
        for action in record:
            if action == _RESET:
                self.ale.reset_game()
            else:
                self.ale.act(action)
        self._record = bytearray(record)

    def _boot(self) -> None:
        self.ale = ale_py.ALEInterface()
        self.ale.setInt("random_seed", self._seed)
        self.ale.setInt("frame_skip", 1)
        # On by default. `AtariEnv` repeats actions itself, from a generator that it can save.
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(self._rom)
        self._record = bytearray()


def rom_path(game: str) -> Path:
    """The ROM of a game, named as `AtariSuite.resolve` returns it.

    Raises:
      UserError: the game has no ROM in ale-py's wheel.
    """
    try:
        return roms()[game]
    except KeyError:
        raise UserError(f"{game} has no ROM in the installed ale-py") from None
