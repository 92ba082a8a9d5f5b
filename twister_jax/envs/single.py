"""One environment: what `vector.py` steps together."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from twister_jax.envs.base import EnvSpec, Episode


class SingleStep(NamedTuple):
    """What stepping one environment returned; the fields mean what `EnvStep`'s do.

    `image` belongs to the receiver: an environment never writes into it again. `episode.env` is 0.
    """

    image: UInt8[np.ndarray, "height width channel"]
    reward: float
    terminal: bool
    is_first: bool
    episode: Episode | None


class SingleEnv(Protocol):
    """One environment, with `VectorEnv`'s reset semantics: a step after an episode's end resets."""

    spec: EnvSpec

    def reset(self) -> SingleStep:
        """Starts a new game, whatever was going on."""
        ...

    def step(self, action: int) -> SingleStep:
        """Takes one agent step, or a reset step where the episode had ended."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Everything that decides what happens next, as JSON can hold it."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` returned."""
        ...
