"""Catch: a tiny game from pixels that a working agent learns in minutes (Osband et al. 2020, bsuite).

Catch has three actions. In ContinuousCatch the paddle moves by the action's value, in columns.
"""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from twister_jax.config import EnvConfig
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec, Episode, Step, Suite

ROWS = 10
COLUMNS = 5
NAMES = ("Catch", "ContinuousCatch")

# Red, green, blue, luminance.
BACKGROUND = (16, 16, 28, 17)
BALL = (250, 220, 60, 211)
PADDLE = (60, 140, 250, 129)


@dataclasses.dataclass(frozen=True)
class CatchConfig(EnvConfig):
    """Catch, whose episodes are nine steps long."""

    grayscale: bool = False
    """One grey channel in place of RGB."""


class CatchEnv:
    """A ball falls one row per step; the paddle on the bottom row should be where it lands.

    The ball starts in a random column of the top row, the paddle in the middle. After `ROWS - 1` steps the
    episode ends with reward 1 if the paddle is under the ball and -1 if not; every other reward is 0. A
    continuous paddle is under the ball if it covers half of its column or more.

    Args:
      seed: decides the columns.
      continuous: the action is a value in [−1, 1], the columns to move by, in place of one of three choices.
      grayscale: one channel in place of RGB.
    """

    def __init__(self, seed: int, *, continuous: bool = False, grayscale: bool = False):
        self._rng = np.random.default_rng(seed)
        self._continuous = continuous
        self._channels = slice(3, 4) if grayscale else slice(0, 3)
        self._row = ROWS - 1  # a game that has ended, so that the first step resets
        self._ball = 0
        self._paddle = 0.0
        self.spec = EnvSpec(
            image_shape=(IMAGE_SIZE, IMAGE_SIZE, 1 if grayscale else 3),
            num_actions=1 if continuous else 3,
            discrete=not continuous,
            action_names=("RIGHT",) if continuous else ("LEFT", "STAY", "RIGHT"),
        )

    def reset(self) -> Step:
        """See `Env`."""
        self._row = 0
        self._ball = int(self._rng.integers(COLUMNS))
        self._paddle = COLUMNS // 2
        return Step(self._image(), 0.0, False, True, None)

    def step(self, action: Any) -> Step:
        """See `Env`."""
        if self._row == ROWS - 1:
            return self.reset()
        self._row += 1
        move = float(action[0]) if self._continuous else action - 1
        self._paddle = min(max(self._paddle + move, 0), COLUMNS - 1)
        if self._row < ROWS - 1:
            return Step(self._image(), 0.0, False, False, None)
        reward = 1.0 if abs(self._paddle - self._ball) <= 0.5 else -1.0
        episode = Episode(env=0, score=reward, length=ROWS - 1, truncated=False)
        return Step(self._image(), reward, True, False, episode)

    def get_state(self) -> dict[str, Any]:
        """See `Env`."""
        return {
            "rng": self._rng.bit_generator.state,
            "row": self._row,
            "ball": self._ball,
            "paddle": self._paddle,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """See `Env`."""
        self._rng.bit_generator.state = state["rng"]
        self._row = state["row"]
        self._ball = state["ball"]
        self._paddle = state["paddle"]

    def screen(self) -> UInt8[np.ndarray, "64 64 3"]:
        """See `Screen`: in colours."""
        return self._pixels()[..., :3]

    def _image(self) -> UInt8[np.ndarray, "64 64 channel"]:
        return self._pixels()[..., self._channels].copy()

    def _pixels(self) -> UInt8[np.ndarray, "64 64 4"]:
        pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 4), np.uint8)
        pixels[:] = BACKGROUND
        bottom, falling = _cell(ROWS - 1, ROWS), _cell(self._row, ROWS)
        pixels[bottom, _cell(self._paddle, COLUMNS)] = PADDLE
        pixels[falling, _cell(self._ball, COLUMNS)] = BALL  # over the paddle: a caught ball is seen
        return pixels


def _cell(place: float, cells: int) -> slice:
    """The pixels of a row or column, which may lie between two."""
    return slice(math.ceil(place * IMAGE_SIZE / cells), math.ceil((place + 1) * IMAGE_SIZE / cells))


class CatchSuite(Suite):
    """One game, with either kind of action."""

    name = "catch"
    description = " or ".join(NAMES)
    settings = CatchConfig()
    presets: ClassVar = {"cpu": {"train.steps": 1_600, "evaluation.episodes": 100}}

    def names(self) -> tuple[str, ...]:
        """See `Suite`."""
        return NAMES

    def resolve(self, name: str) -> str | None:
        """See `Suite`."""
        return next((known for known in NAMES if known.lower() == name.strip().lower()), None)

    def make(self, name: str, settings: CatchConfig, seed: int, *, evaluation: bool = False) -> CatchEnv:
        """See `Suite`."""
        return CatchEnv(seed, continuous=name == "ContinuousCatch", grayscale=settings.grayscale)

    def protocol(self, name: str, settings: CatchConfig) -> dict[str, Any]:
        """See `Suite`."""
        return {
            "frames": f"64x64 {'grey' if settings.grayscale else 'RGB'}, drawn anew at every step",
            "frame_skip": 1,
            "episode": f"{ROWS - 1} steps; reward 1 or -1 with the last",
            "best_score": 1.0,
        }


SUITE = CatchSuite()
