"""A third environment suite, with continuous actions: push a bar to where the light is."""

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np

from twister_jax.config import EnvConfig
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec, Episode, Step, Suite
from twister_jax.errors import UserError
from twister_jax.fields import Range


class Color:
    """A range of a setting's own."""

    def __contains__(self, color: tuple[int, int, int]) -> bool:
        return min(color) >= 0 and max(color) <= 255

    def __str__(self) -> str:
        return "three numbers between 0 and 255"


@dataclasses.dataclass(frozen=True)
class SliderConfig(EnvConfig):
    """A bar that slides."""

    episode_length: Annotated[int, Range(1, 1_000)] = 8
    """Steps of an episode, which the time limit ends."""
    color: Annotated[tuple[int, int, int], Color()] = (60, 140, 250)
    """Red, green and blue of the bar."""


class SliderEnv:
    spec = EnvSpec((IMAGE_SIZE, IMAGE_SIZE, 3), num_actions=1, discrete=False, action_names=("push",))

    def __init__(self, seed: int, length: int, color: tuple[int, int, int]):
        self._color = color
        self._rng = np.random.default_rng(seed)
        self._length, self._step, self._at, self._light, self._score = length, length, 0.0, 0.0, 0.0

    def reset(self) -> Step:
        self._step, self._at, self._score = 0, 0.0, 0.0
        self._light = float(self._rng.uniform(-1, 1))
        return Step(self._image(), 0.0, False, True, None)

    def step(self, action: Any) -> Step:
        if self._step == self._length:
            return self.reset()
        assert np.abs(action).max() <= 1
        self._step += 1
        self._at = float(np.clip(self._at + 0.5 * action[0], -1, 1))
        reward = -abs(self._at - self._light)
        self._score += reward
        ended = self._step == self._length
        episode = Episode(0, self._score, self._length, truncated=True) if ended else None
        return Step(self._image(), reward, False, False, episode)

    def get_state(self) -> dict[str, Any]:
        return {
            "rng": self._rng.bit_generator.state,
            "values": [self._step, self._at, self._light, self._score],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._step, self._at, self._light, self._score = state["values"]

    def _image(self) -> np.ndarray:
        image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        image[48:, self._column(self._at)] = self._color
        image[:16, self._column(self._light)] = (250, 220, 60)
        return image

    def _column(self, position: float) -> slice:
        left = int((position + 1) / 2 * (IMAGE_SIZE - 8))
        return slice(left, left + 8)


class SliderSuite(Suite):
    name = "slider"
    description = "slider:easy, slider:hard"
    prefixed = True
    settings = SliderConfig()
    presets: ClassVar = {"debug": {"env.episode_length": 6}}

    def names(self) -> tuple[str, ...]:
        return ("easy", "hard")

    def resolve(self, name: str) -> str | None:
        return name.lower() if name.lower() in self.names() else None

    def make(self, name: str, settings: SliderConfig, seed: int, *, evaluation: bool = False) -> SliderEnv:
        if name == "hard":
            raise UserError("slider:hard is too hard for this machine: play slider:easy")
        return SliderEnv(seed, settings.episode_length, settings.color)

    def protocol(self, name: str, settings: SliderConfig) -> dict[str, Any]:
        return {"frame_skip": 1, "episode": f"{settings.episode_length} steps"}

    def reference_scores(self, name: str) -> tuple[float, float] | None:
        return (-8.0, 0.0)


SUITE = SliderSuite()
