"""The contract of environments: one game, several stepped together, and the suite they come from.

Loop, evaluation, checkpoints and benchmarks know this page and no suite by name. A new suite is one file with
a `Suite` and a line in the registry (`envs/__init__.py`).
"""

import abc
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from twister_jax.config import EnvConfig

IMAGE_SIZE = 64
"""Height and width of every observation, in pixels."""


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """Shapes and kinds of what goes in and out of one environment.

    Attributes:
      image_shape: (height, width, channels) of the uint8 observation.
      num_actions: size of the action vector: number of discrete actions or of continuous dimensions.
      discrete: whether actions are one-hot choices (True) or values in [−1, 1] (False).
      action_names: what each discrete action or continuous dimension means, for people.
    """

    image_shape: tuple[int, int, int]
    num_actions: int
    discrete: bool = True
    action_names: tuple[str, ...] = ()

    def random_actions(
        self, generator: np.random.Generator, count: int
    ) -> Float32[np.ndarray, "count action"]:
        """Uniform action vectors: one-hot, or in [−1, 1]."""
        if self.discrete:
            choice = generator.integers(self.num_actions, size=count)
            return np.eye(self.num_actions, dtype=np.float32)[choice]
        return generator.uniform(-1, 1, (count, self.num_actions)).astype(np.float32)

    def to_env(self, vectors: Float[np.ndarray, "env action"]) -> np.ndarray:
        """What environments are stepped with: indices [env], or values clipped to [−1, 1], [env, action]."""
        return vectors.argmax(-1) if self.discrete else np.clip(vectors, -1.0, 1.0)


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


class Step(NamedTuple):
    """What stepping one environment returned.

    A step with `is_first` comes from a reset: its reward is 0, it was led to by no action, and the action
    passed for it was ignored. `image` belongs to the receiver: an environment never writes into it again.
    """

    image: UInt8[np.ndarray, "height width channel"]
    reward: float
    terminal: bool
    is_first: bool
    episode: Episode | None


@runtime_checkable
class Env(Protocol):
    """One environment.

    `step` after an episode's last step (terminal or time limit) resets instead of acting and returns the
    reset step: every step that exists is returned exactly once.
    """

    spec: EnvSpec

    def reset(self) -> Step:
        """Starts a new game, whatever was going on; an unfinished one is not reported."""
        ...

    def step(self, action: Any) -> Step:
        """Takes one agent step, or a reset step where the episode had ended.

        Args:
          action: an index among discrete actions, or values [action] in [−1, 1].

        An environment that was just made resets too. One that holds what must be given back has a `close()`.
        """
        ...

    def get_state(self) -> dict[str, Any] | None:
        """Everything that decides what happens next, as JSON can hold it; None where it cannot tell.

        What cannot tell begins a new episode when a run is resumed.
        """
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` returned, in an environment made with the same arguments."""
        ...


@runtime_checkable
class Screen(Protocol):
    """An environment with a screen of its own size and colours; of others people see the observation."""

    def screen(self) -> UInt8[np.ndarray, "height width 3"]:
        """What the newest step looks like; changes nothing."""
        ...


class EnvStep(NamedTuple):
    """What stepping all environments once returned; the fields mean what `Step`'s do."""

    image: UInt8[np.ndarray, "env height width channel"]
    reward: Float32[np.ndarray, " env"]
    terminal: Bool[np.ndarray, " env"]
    is_first: Bool[np.ndarray, " env"]
    episodes: tuple[Episode, ...]


@runtime_checkable
class VectorEnv(Protocol):
    """Environments stepped together, each with `Env`'s reset semantics."""

    spec: EnvSpec
    num_envs: int

    def reset(self) -> EnvStep:
        """Starts a new episode everywhere; every `is_first` is True."""
        ...

    def step(self, actions: Int[np.ndarray, " env"] | Float[np.ndarray, "env action"]) -> EnvStep:
        """Takes one agent step in every environment (a reset where the episode had ended)."""
        ...

    def retire(self, env: int) -> None:
        """Steps this environment, which has been stepped before, no more.

        Until `reset` or `set_state`, `step` repeats its last image and nothing else. A saved state says which
        are retired; those that it retires show a black image.
        """
        ...

    def get_state(self) -> bytes:
        """Everything that decides what the environments do next, random generators included."""
        ...

    def set_state(self, state: bytes) -> int:
        """Goes on from `get_state`'s bytes as if nothing had happened.

        Returns:
          how many environments could not be saved, and begin a new episode with their next step.

        Raises:
          ValueError: the bytes belong to another game, number of environments or version.
        """
        ...

    def close(self) -> None: ...


class Suite(abc.ABC):
    """A family of environments: their names, settings, protocol and reference scores."""

    name: ClassVar[str]
    """As in SUITE:NAME."""
    description: ClassVar[str]
    """For --help: what can be played."""
    prefixed: ClassVar[bool] = False
    """Whether full names begin with `SUITE:`; otherwise the name alone is enough."""
    settings: ClassVar[EnvConfig]
    """As published."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Preset -> other values of any setting of a run, by dotted name."""

    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """What it offers by name, for close matches."""

    @abc.abstractmethod
    def resolve(self, name: str) -> str | None:
        """The one right spelling of a name, or None where it is not of this suite."""

    @abc.abstractmethod
    def make(self, name: str, settings: Any, seed: int, *, evaluation: bool = False) -> Env:
        """One environment.

        Args:
          name: as `resolve` returns it.
          settings: of this suite's class.
          seed: decides everything random in it.
          evaluation: whether games are played to be counted; the protocol may differ from training's.

        Raises:
          UserError: it cannot be made here.
        """

    @abc.abstractmethod
    def protocol(self, name: str, settings: Any) -> dict[str, Any]:
        """What a reader of an evaluation's scores would ask about the environment."""

    def code(self, name: str) -> str:
        """The module of somebody else's that an environment needs; empty where it needs none.

        It is imported where a person named the game, and never because a file does: see `envs.admit`.

        Raises:
          UserError: something is missing that it will need.
        """
        return ""

    def identity(self, name: str, settings: Any) -> dict[str, Any]:
        """What must agree between a saved state and the environments that take it up, as JSON keeps it."""
        values = json.loads(json.dumps(dataclasses.asdict(settings)))
        return {name: value for name, value in values.items() if name != "num_envs"}

    def check(self) -> str | None:
        """For `doctor`: what it found of what it needs beyond this package; None where it needs nothing.

        Raises:
          UserError: something that is installed does not work.
        """
        return None

    def for_probe(self, settings: Any) -> Any:
        """Settings under which an episode ends within a probe's few steps, if that is possible."""
        return settings

    def reference_scores(self, name: str) -> tuple[float, float] | None:
        """(random, human) scores, where there are published ones."""
        return None

    def normalize(self, name: str, score: float) -> float | None:
        """(score − random) / (human − random), so 1.0 is the human reference; None where there is none.

        Args:
          name: as `resolve` returns it.
          score: raw score of a full game, or a mean of several.
        """
        reference = self.reference_scores(name)
        if reference is None:
            return None
        random, human = reference
        return (score - random) / (human - random)
