"""Atari games under the Atari 100k protocol, on ALE itself.

ale-py also has a vector environment in C++, but that cannot save its state, so a run could not be resumed
exactly.
"""

import dataclasses
import enum
import re
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from twister_jax.config import EnvConfig
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec, Episode, Step, Suite
from twister_jax.envs.resize import AreaResize
from twister_jax.fields import CHANGEABLE, FractionBelowOne, PositiveInt, Range

NOOP = 0
FIRE = 1
_PROBE_STEPS = 16

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


@dataclasses.dataclass(frozen=True)
class AtariConfig(EnvConfig):
    """The Atari 100k protocol."""

    frame_skip: Annotated[int, Range(1, 100)] = 4
    """Emulator frames per agent step; the observation is the maximum over the last two."""
    noop_max: Annotated[int, Range(0, 100_000)] = 30
    """After a reset 1 to this many emulator frames without action are played; 0 plays none."""
    sticky_actions: FractionBelowOne = 0.0
    """Probability that the emulator repeats the previous action."""
    grayscale: bool = False
    """One grey channel in place of RGB."""
    life_loss_ends_episode: bool = False
    """A lost life ends the episode for learning; the game itself goes on. Not in evaluation games."""
    fire_start: bool = False
    """In games whose action 1 is FIRE: FIRE after a reset and a lost life, and no-ops as steps."""
    time_limit_frames: PositiveInt = 108_000
    """Emulator frames after which a game is cut, without being terminal."""
    evaluation_noop_max: Annotated[int, Range(0, 100_000), CHANGEABLE] = 30
    """As `noop_max`, for evaluation games."""
    evaluation_time_limit_frames: Annotated[PositiveInt, CHANGEABLE] = 108_000
    """As `time_limit_frames`, for evaluation games."""


class _Next(enum.Enum):
    """What the next call of `step` will do."""

    ACT = "act"
    START_GAME = "start game"
    RESUME_GAME = "resume game"  # a lost life ended the episode, but not the game


class AtariEnv:
    """One game: frame skip, maximum over two frames, no-op starts, 64x64 area-resized images.

    The minimal action set is used, rewards are raw, and an episode is a full game unless
    `life_loss_ends_episode`. Then a lost life, while others are left, is terminal; the reset step after it
    plays one no-op step and goes on with the same game, and the score is still reported at game over.

    Args:
      game: its name, as `AtariSuite.resolve` returns it.
      seed: decides everything random: the emulator's seed, the number of no-ops, sticky actions.
      frame_skip: emulator frames per agent step. The image is the pixel-wise maximum of the last two; of
        a game that ends earlier within a step, its last frame.
      noop_max: after a reset, 1 to `noop_max` emulator frames (uniform) without action; 0 for none. See
        `fire_start`.
      sticky_actions: probability, at every emulator frame, that the previous action is repeated.
      grayscale: one channel of ALE's own luminance in place of RGB.
      life_loss_ends_episode: see above.
      fire_start: in games whose action 1 is FIRE, start with an agent step of FIRE and one of action 2, and
        play the no-ops after that as agent steps in place of frames; press FIRE after each lost life too,
        within the step that lost it.
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

        from twister_jax.envs.emulator import Emulator, rom_path

        self._emulator = Emulator(rom_path(game), int(self._rng.integers(1, 2**31)))

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

    def reset(self) -> Step:
        """See `Env`."""
        return self._start_game()

    def step(self, action: int) -> Step:
        """See `Env`."""
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
        return Step(self._image(), reward, over or life_ends, False, episode)

    def screen(self) -> UInt8[np.ndarray, "height width 3"]:
        """See `Screen`: the emulator's newest frame alone, in colours."""
        return self._emulator.ale.getScreenRGB()

    def get_state(self) -> dict[str, Any]:
        """See `Env`."""
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
        """See `Env`."""
        self._emulator.set_state(state["emulator"])
        self._rng.bit_generator.state = state["rng"]
        self._next = _Next(state["next"])
        self._previous_action = state["previous_action"]
        self._lives = state["lives"]
        self._score = state["score"]
        self._length = state["length"]
        self._frames = state["frames"]

    def _start_game(self) -> Step:
        self._reset_emulator()
        noops = int(self._rng.integers(1, self._noop_max + 1)) if self._noop_max > 0 else 0
        if self._fire:
            self._fire_start(noops)
        else:
            self._hold(NOOP, noops)
        self._read_screen(self._screens[0])
        self._next = _Next.ACT
        self._lives = self._emulator.lives()
        self._score = 0.0
        self._length = 0
        self._frames = 0
        return Step(self._image(), 0.0, False, True, None)

    def _resume_game(self) -> Step:
        """The reset step after a lost life: one step without action, in the same game.

        What it earns belongs to the score, but not to a reset step. Should it end the game, the game is
        reported and the next one starts at once.
        """
        self._act(NOOP)
        if self._emulator.game_over():
            episode = self._episode(truncated=False)
            return self._start_game()._replace(episode=episode)
        self._next = _Next.ACT
        return Step(self._image(), 0.0, False, True, None)

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

    def _fire_start(self, noops: int) -> None:
        """FIRE and action 2 for a step each, then steps without action, with FIRE where one costs a life."""
        self._hold(FIRE, self._frame_skip)
        self._hold(self._actions[2], self._frame_skip)
        lives = self._emulator.lives()
        for _ in range(noops):
            self._hold(NOOP, self._frame_skip)
            if self._emulator.lives() < lives:
                self._hold(FIRE, self._frame_skip)
            lives = self._emulator.lives()

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


class AtariSuite(Suite):
    """The 26 games of Atari 100k, and every other single-player game in ale-py's wheel."""

    name = "atari"
    description = "a game of Atari 100k (" + ", ".join(REFERENCE_SCORES) + ")"
    settings = AtariConfig()
    presets: ClassVar = {
        "cpu": {"env.evaluation_time_limit_frames": 18_000},
        "debug": {"env.time_limit_frames": 2_000, "env.evaluation_time_limit_frames": 2_000},
    }

    def names(self) -> tuple[str, ...]:
        """See `Suite`."""
        return tuple(REFERENCE_SCORES)

    def resolve(self, name: str) -> str | None:
        """See `Suite`.

        `MsPacman`, `ms_pacman`, `ms-pacman`, `ALE/MsPacman-v5` and `MsPacmanNoFrameskip-v4` are the same
        game, in any case.
        """
        key = _key(name)
        for known in REFERENCE_SCORES:
            if _key(known) == key:
                return known
        from twister_jax.envs.emulator import roms  # loaded only where somebody needs it

        return next((known for known in roms() if _key(known) == key), None)

    def make(self, name: str, settings: AtariConfig, seed: int, *, evaluation: bool = False) -> AtariEnv:
        """See `Suite`."""
        return AtariEnv(
            name,
            seed,
            frame_skip=settings.frame_skip,
            noop_max=settings.evaluation_noop_max if evaluation else settings.noop_max,
            sticky_actions=settings.sticky_actions,
            grayscale=settings.grayscale,
            life_loss_ends_episode=settings.life_loss_ends_episode and not evaluation,
            fire_start=settings.fire_start,
            time_limit_frames=(
                settings.evaluation_time_limit_frames if evaluation else settings.time_limit_frames
            ),
        )

    def for_probe(self, settings: AtariConfig) -> AtariConfig:
        """See `Suite`: a short time limit makes the probe see an episode's end."""
        limit = _PROBE_STEPS * settings.frame_skip
        return dataclasses.replace(settings, time_limit_frames=limit, evaluation_time_limit_frames=limit)

    def identity(self, name: str, settings: AtariConfig) -> dict[str, Any]:
        """See `Suite`."""
        import ale_py

        training = {
            field: value
            for field, value in super().identity(name, settings).items()
            if not field.startswith("evaluation_")
        }
        return {"ale_py": ale_py.__version__, **training}

    def protocol(self, name: str, settings: AtariConfig) -> dict[str, Any]:
        """See `Suite`."""
        return {
            "frames": f"64x64 {'grey' if settings.grayscale else 'RGB'}, "
            "maximum of the last two emulator frames",
            "frame_skip": settings.frame_skip,
            "sticky_actions": settings.sticky_actions,
            "full_action_set": False,
            "life_loss_ends_game": False,
            "life_loss_ends_episode_in_training": settings.life_loss_ends_episode,
            "fire_start": settings.fire_start,
            "noop_max": settings.evaluation_noop_max,
            "time_limit_frames": settings.evaluation_time_limit_frames,
        }

    def reference_scores(self, name: str) -> tuple[float, float] | None:
        """See `Suite`: as every Atari 100k paper uses them."""
        return REFERENCE_SCORES.get(name)


def _key(name: str) -> str:
    """What all spellings of a game have in common."""
    name = re.sub(r"^ale/", "", name.strip().lower())
    name = re.sub(r"(noframeskip|deterministic)?-v\d+$", "", name)
    return re.sub(r"[ _-]", "", name)


SUITE = AtariSuite()
