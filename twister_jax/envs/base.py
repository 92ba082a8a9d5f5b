"""What an environment is to the rest of the program: several games stepped together.

The host loop, the evaluation and the checkpoints know this page and nothing of the emulator.
"""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """Shapes and kinds of what goes in and out of one environment.

    Attributes:
      image_shape: (height, width, channels) of the uint8 observation.
      num_actions: size of the action vector: number of discrete actions or of continuous dimensions.
      discrete: whether actions are one-hot choices (True) or values in [-1, 1] (False).
      action_names: what each discrete action means, for people.
    """

    image_shape: tuple[int, int, int]
    num_actions: int
    discrete: bool = True
    action_names: tuple[str, ...] = ()


class Episode(NamedTuple):
    """One finished full game.

    Attributes:
      env: index of the environment that played it.
      score: undiscounted sum of raw rewards.
      length: agent steps taken.
      truncated: ended by the time limit and not by the game.
    """

    env: int
    score: float
    length: int
    truncated: bool


class EnvStep(NamedTuple):
    """What stepping all environments once returned.

    A step with `is_first` comes from a reset: its reward is 0, it was led to by no action, and the
    action passed for it was ignored.
    """

    image: UInt8[np.ndarray, "env height width channel"]
    reward: Float32[np.ndarray, " env"]
    terminal: Bool[np.ndarray, " env"]
    is_first: Bool[np.ndarray, " env"]
    episodes: tuple[Episode, ...]


class VectorEnv(Protocol):
    """Environments stepped together.

    `step` after an environment's last step of an episode (terminal or time limit) resets that
    environment instead of acting and returns its reset step (`is_first`): every step that exists is
    returned exactly once.
    """

    spec: EnvSpec
    num_envs: int

    def reset(self) -> EnvStep:
        """Starts a new episode everywhere; every `is_first` is True."""
        ...

    def step(self, actions: Int[np.ndarray, " env"]) -> EnvStep:
        """Takes one agent step in every environment (a reset where the episode had ended)."""
        ...

    def retire(self, env: int) -> None:
        """Steps this environment, which has been stepped before, no more.

        Until `reset` or `set_state`, `step` repeats its last image and nothing else.
        """
        ...

    def get_state(self) -> bytes:
        """Everything that decides what the environments do next, random generators included."""
        ...

    def set_state(self, state: bytes) -> None:
        """Goes on from `get_state`'s bytes as if nothing had happened.

        Raises:
          ValueError: the bytes belong to another game, number of environments or version.
        """
        ...

    def close(self) -> None: ...
