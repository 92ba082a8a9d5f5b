"""One Atari game under the Atari 100k protocol, on ALE itself.

ale-py also has a vector environment in C++, but that cannot save its state, so a run could not be resumed
exactly.
"""

import base64
import enum
import zlib
from pathlib import Path
from typing import Any

import ale_py
import numpy as np
from jaxtyping import UInt8

from twister_jax.envs.base import EnvSpec, Episode
from twister_jax.envs.games import rom_path
from twister_jax.envs.resize import AreaResize
from twister_jax.envs.single import SingleStep

IMAGE_SIZE = 64
NOOP = 0
FIRE = 1
_RESET = 255  # stands among the emulator's actions in the record of what was done to it
_REBOOT_AFTER = 20_000  # emulator frames, about a second and a half of emulation


class _Next(enum.Enum):
    """What the next call of `step` will do."""

    ACT = "act"
    START_GAME = "start game"
    RESUME_GAME = "resume game"  # a lost life ended the episode, but not the game


class _Emulator:
    """ALE with a memory of everything done to it since it was switched on.

    That record is its saved state. ALE can save a state itself, but not all of it (ale-py 0.12): the last
    picture, the positions at which the video chip draws objects, the data bus and the action that sticky
    actions repeat are left out, and games such as Qbert and Alien then go on with other pixels, some with
    another memory. Doing the same again from the start gives the same, whatever ALE forgets. To keep the
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
        record = zlib.decompress(base64.b64decode(state["record"]))
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


class AtariEnv:
    """One game: frame skip, maximum over two frames, no-op starts, 64x64 area-resized images.

    The minimal action set is used, rewards are raw, and an episode is a full game unless
    `life_loss_ends_episode`. Then a lost life, while others are left, is terminal; the reset step after it
    plays one no-op step and goes on with the same game, and the score is still reported at game over.

    Args:
      game: canonical name (`games.resolve_game`).
      seed: decides everything random: the emulator's seed, the number of no-ops, sticky actions.
      frame_skip: emulator frames per agent step. The image is the pixel-wise maximum of the last two; of
        a game that ends earlier within a step, its last frame.
      noop_max: after a reset, 1 to `noop_max` emulator frames (uniform) without action; 0 for none.
      sticky_actions: probability, at every emulator frame, that the previous action is repeated.
      grayscale: one channel of ALE's own luminance in place of RGB.
      life_loss_ends_episode: see above.
      fire_start: press FIRE for one agent step after a reset (before the no-ops) and after each lost life
        (within the step that lost it), in games whose action 1 is FIRE.
      time_limit_frames: emulator frames after the start (FIRE and no-ops) at which the game is cut. This
        is not terminal.

    Raises:
      UserError: the game has no ROM in the installed ale-py.
    """

    def __init__(
        self,
        game: str,
        seed: int,
        *,
        frame_skip: int = 4,
        noop_max: int = 30,
        sticky_actions: float = 0.0,
        grayscale: bool = False,
        life_loss_ends_episode: bool = False,
        fire_start: bool = False,
        time_limit_frames: int = 108_000,
    ):
        self._frame_skip = frame_skip
        self._noop_max = noop_max
        self._sticky_actions = sticky_actions
        self._life_loss_ends_episode = life_loss_ends_episode
        self._time_limit_frames = time_limit_frames
        self._rng = np.random.default_rng(seed)

        self._emulator = _Emulator(rom_path(game), int(self._rng.integers(1, 2**31)))

        actions = self._emulator.ale.getMinimalActionSet()
        self._actions = [action.value for action in actions]
        self._fire = fire_start and len(actions) > 1 and self._actions[1] == FIRE
        channels = 1 if grayscale else 3
        height, width = self._emulator.ale.getScreenDims()
        self._grayscale = grayscale
        self._screens = np.empty((2, height, width) if grayscale else (2, height, width, 3), np.uint8)
        self._resize = AreaResize((height, width, channels), IMAGE_SIZE)
        self.spec = EnvSpec(
            image_shape=(IMAGE_SIZE, IMAGE_SIZE, channels),
            num_actions=len(actions),
            action_names=tuple(action.name for action in actions),
        )
        self._next = _Next.START_GAME
        self._previous_action = NOOP
        self._lives = 0
        self._score = 0.0
        self._length = 0
        self._frames = 0

    def reset(self) -> SingleStep:
        """Starts a new game; an unfinished one is not reported."""
        return self._start_game()

    def step(self, action: int) -> SingleStep:
        """Takes one agent step, or a reset step where the episode had ended.

        Args:
          action: index into `spec.action_names`.
        """
        if self._next is _Next.START_GAME:
            return self._start_game()
        if self._next is _Next.RESUME_GAME:
            return self._resume_game()

        reward, life_lost = self._act(self._actions[action])
        self._length += 1

        over = self._emulator.game_over()
        cut = not over and self._frames >= self._time_limit_frames
        # With no life left the game is about to end by itself (Qbert shows this for some frames).
        life_ends = self._life_loss_ends_episode and life_lost and self._lives > 0
        if over or cut:
            self._next = _Next.START_GAME
        elif life_ends:
            self._next = _Next.RESUME_GAME
        episode = self._episode(truncated=cut) if over or cut else None
        return SingleStep(self._image(), reward, over or life_ends, False, episode)

    def get_state(self) -> dict[str, Any]:
        """Everything that decides what happens next, as JSON can hold it."""
        return {
            "emulator": self._emulator.get_state(),
            "rng": self._rng.bit_generator.state,
            "next": self._next.value,
            "previous_action": self._previous_action,
            "lives": self._lives,
            "score": self._score,
            "length": self._length,
            "frames": self._frames,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` returned, in an environment made with the same arguments."""
        self._emulator.set_state(state["emulator"])
        self._rng.bit_generator.state = state["rng"]
        self._next = _Next(state["next"])
        self._previous_action = state["previous_action"]
        self._lives = state["lives"]
        self._score = state["score"]
        self._length = state["length"]
        self._frames = state["frames"]

    def _start_game(self) -> SingleStep:
        self._reset_emulator()
        if self._fire:
            self._hold(FIRE, self._frame_skip)
        if self._noop_max > 0:
            self._hold(NOOP, int(self._rng.integers(1, self._noop_max + 1)))
        self._read_screen(self._screens[0])
        self._next = _Next.ACT
        self._lives = self._emulator.lives()
        self._score = 0.0
        self._length = 0
        self._frames = 0
        return SingleStep(self._image(), 0.0, False, True, None)

    def _resume_game(self) -> SingleStep:
        """The reset step after a lost life: one step without action, in the same game.

        What it earns belongs to the score, but not to a reset step. Should it end the game, the game is
        reported and the next one starts at once.
        """
        self._act(NOOP)
        if self._emulator.game_over():
            episode = self._episode(truncated=False)
            return self._start_game()._replace(episode=episode)
        self._next = _Next.ACT
        return SingleStep(self._image(), 0.0, False, True, None)

    def _act(self, action: int) -> tuple[float, bool]:
        """Plays one step of a game that counts; returns its reward and whether a life was lost."""
        reward = self._play(action)
        life_lost = self._emulator.lives() < self._lives
        if life_lost and self._fire and not self._emulator.game_over():
            reward += self._play(FIRE)
        self._lives = self._emulator.lives()
        self._score += reward
        return reward, life_lost

    def _play(self, action: int) -> float:
        """Plays one frame skip, leaves the shown frame in `_screens[0]` and returns the summed reward."""
        reward = 0.0
        shown, earlier = self._screens
        pooled = False
        for left in reversed(range(self._frame_skip)):
            reward += self._frame(action)
            if self._emulator.game_over():
                break
            if left == 1:  # fetching a screen costs a third of emulating it, so only what is shown is fetched
                self._read_screen(earlier)
                pooled = True
        self._read_screen(shown)
        if pooled:
            np.maximum(shown, earlier, out=shown)
        return reward

    def _hold(self, action: int, frames: int) -> None:
        """Plays frames before a game counts; where that ends it, the game starts over."""
        for _ in range(frames):
            self._frame(action)
            if self._emulator.game_over():
                self._reset_emulator()

    def _frame(self, action: int) -> int:
        """Emulates one frame and returns its reward."""
        if self._sticky_actions > 0 and self._rng.random() < self._sticky_actions:
            action = self._previous_action
        self._previous_action = action
        self._frames += 1
        return self._emulator.act(action)

    def _reset_emulator(self) -> None:
        self._emulator.reset()
        self._previous_action = NOOP

    def _read_screen(self, out: UInt8[np.ndarray, "height width *channel"]) -> None:
        ale = self._emulator.ale
        (ale.getScreenGrayscale if self._grayscale else ale.getScreenRGB)(out)

    def _image(self) -> UInt8[np.ndarray, "64 64 channel"]:
        return self._resize(self._screens[0])

    def _episode(self, truncated: bool) -> Episode:
        return Episode(env=0, score=self._score, length=self._length, truncated=truncated)
