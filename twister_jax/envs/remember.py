"""Remember: what the first frame showed decides, some blank frames later, which action is right.

The smallest task that needs a memory. A policy that reads the last few frames alone sees the same thing
whatever the cue was, and scores 0 on average; one that reads a summary of the past can score 1.
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from twister_jax.config import EnvConfig
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec, Episode, Step, Suite
from twister_jax.fields import Range

# Red, green, blue, luminance.
BACKGROUND = (16, 16, 28, 17)
CUE = (250, 220, 60, 211)
QUESTION = (60, 140, 250, 129)


@dataclasses.dataclass(frozen=True)
class RememberConfig(EnvConfig):
    """Remember, whose episodes are `blank_frames` + 2 steps long."""

    blank_frames: Annotated[int, Range(0, 1_000)] = 5
    """Blank frames between the cue and the question."""
    grayscale: bool = False
    """One grey channel in place of RGB."""


class RememberEnv:
    """A square on the left or on the right, blank frames, then a bar that asks: LEFT or RIGHT.

    The answer to the bar earns 1 if it names the square's side and −1 if not, and ends the episode; the last
    frame shows the square again. No other action matters.

    Args:
      seed: decides the sides.
      blank_frames: between the square and the bar.
      grayscale: one channel in place of RGB.
    """

    def __init__(self, seed: int, *, blank_frames: int = 5, grayscale: bool = False):
        self._rng = np.random.default_rng(seed)
        self._channels = slice(3, 4) if grayscale else slice(0, 3)
        self._question = blank_frames + 1
        self._frame = self._question + 1  # a game that has ended, so that the first step resets
        self._side = 0
        self.spec = EnvSpec(
            image_shape=(IMAGE_SIZE, IMAGE_SIZE, 1 if grayscale else 3),
            num_actions=2,
            action_names=("LEFT", "RIGHT"),
        )

    def reset(self) -> Step:
        """See `Env`."""
        self._frame = 0
        self._side = int(self._rng.integers(2))
        return Step(self._image(), 0.0, False, True, None)

    def step(self, action: int) -> Step:
        """See `Env`."""
        if self._frame > self._question:
            return self.reset()
        self._frame += 1
        if self._frame <= self._question:
            return Step(self._image(), 0.0, False, False, None)
        reward = 1.0 if action == self._side else -1.0
        episode = Episode(env=0, score=reward, length=self._frame, truncated=False)
        return Step(self._image(), reward, True, False, episode)

    def get_state(self) -> dict[str, Any]:
        """See `Env`."""
        return {"rng": self._rng.bit_generator.state, "frame": self._frame, "side": self._side}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `Env`."""
        self._rng.bit_generator.state = state["rng"]
        self._frame, self._side = state["frame"], state["side"]

    def _image(self) -> UInt8[np.ndarray, "64 64 channel"]:
        pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 4), np.uint8)
        pixels[:] = BACKGROUND
        if self._frame == 0 or self._frame > self._question:
            left = 4 + 32 * self._side
            pixels[20:44, left : left + 24] = CUE
        elif self._frame == self._question:
            pixels[8:56, 28:36] = QUESTION
        return pixels[..., self._channels].copy()


class RememberSuite(Suite):
    """One task."""

    name = "remember"
    description = "Remember"
    settings = RememberConfig()
    presets: ClassVar = {"cpu": {"train.steps": 1_600, "evaluation.episodes": 100}}

    def names(self) -> tuple[str, ...]:
        """See `Suite`."""
        return ("Remember",)

    def resolve(self, name: str) -> str | None:
        """See `Suite`."""
        return "Remember" if name.strip().lower() == "remember" else None

    def make(
        self, name: str, settings: RememberConfig, seed: int, *, evaluation: bool = False
    ) -> RememberEnv:
        """See `Suite`."""
        return RememberEnv(seed, blank_frames=settings.blank_frames, grayscale=settings.grayscale)

    def for_probe(self, settings: RememberConfig) -> RememberConfig:
        """See `Suite`."""
        return dataclasses.replace(settings, blank_frames=min(settings.blank_frames, 16))

    def protocol(self, name: str, settings: RememberConfig) -> dict[str, Any]:
        """See `Suite`."""
        return {
            "frames": f"64x64 {'grey' if settings.grayscale else 'RGB'}, drawn anew at every step",
            "frame_skip": 1,
            "episode": f"{settings.blank_frames + 2} steps; reward 1 or -1 with the last",
            "best_score": 1.0,
        }


SUITE = RememberSuite()
