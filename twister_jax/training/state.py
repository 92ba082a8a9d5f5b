"""What a run is between two iterations, as data: arrays on the device, and counters on the host."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from twister_jax.agents.base import Agent, Carry, Observation, State
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec, EnvStep, VectorEnv
from twister_jax.parallel import Devices
from twister_jax.randomness import Purpose, key_for

MakeAgent = Callable[[Config, EnvSpec], Agent]
MakeEnv = Callable[..., VectorEnv]
"""As `envs.make_vector_env`."""


@struct.dataclass
class RunState:
    """The agent, and what acting needs to go on; with the replay, all arrays of a checkpoint."""

    agent: State
    carry: Carry
    observation: Observation
    """The newest observations; the next action responds to them."""
    action: Float[Array, "env action"]
    """The newest action; `Counters.acted` says whether the environments have taken it."""

    @classmethod
    def begin(
        cls, agent: Agent, spec: EnvSpec, num_envs: int, seed: int, step: EnvStep, devices: Devices
    ) -> "RunState":
        """A new agent in front of its first observation."""

        def make(key):
            state = agent.init(key)
            return state, agent.init_carry(state, num_envs), jnp.zeros((num_envs, spec.num_actions))

        lies = cls.shapes(agent, spec, num_envs).shardings(devices)
        # What one program returns lies in buffers of its own, so that updates can reuse them.
        made = devices.jit(make, (lies.agent, lies.carry, lies.action))(key_for(seed, Purpose.INIT))
        state, carry, action = made
        return cls(agent=state, carry=carry, observation=observe(agent, step, devices), action=action)

    def shardings(self, devices: Devices) -> "RunState":
        """Where its arrays lie: the agent on every device, the rest with its environments."""
        return RunState(
            agent=devices.everywhere(self.agent),
            carry=devices.by_env(self.carry),
            observation=devices.by_env(self.observation),
            action=devices.by_env(self.action),
        )

    @classmethod
    def shapes(cls, agent: Agent, spec: EnvSpec, num_envs: int) -> "RunState":
        """The same with shapes in place of arrays; computes nothing."""

        def make(key):
            state = agent.init(key)
            observation = Observation(
                image=jnp.zeros((num_envs, *spec.image_shape), jnp.uint8),
                is_first=jnp.zeros(num_envs, bool),
                reward=jnp.zeros(num_envs) if agent.reads_reward else None,
            )
            action = jnp.zeros((num_envs, spec.num_actions))
            return cls(state, agent.init_carry(state, num_envs), observation, action)

        return jax.eval_shape(make, key_for(0, Purpose.INIT))


def observe(agent: Agent, step: EnvStep, devices: Devices | None = None) -> Observation:
    """What acting sees of a step, copied to the devices, by default to one."""
    seen = (step.image, step.is_first, *((step.reward,) if agent.reads_reward else ()))
    if devices is None:
        return Observation(*map(jnp.array, seen))
    return Observation(*devices.put(seen, devices.by_env(seen)))


@dataclasses.dataclass
class Counters:
    """Where a run stands, as far as the host knows."""

    iterations: int = 0
    """Times all environments were stepped, resets included."""
    env_steps: int = 0
    """Agent steps that took an action."""
    updates: int = 0
    """Updates of the interleaved loop."""
    pretraining_updates: int = 0
    """Updates of all pretraining phases together."""
    filled_at: int | None = None
    """`env_steps` when the random steps were over."""
    acted: bool = False
    """An action was chosen that the environments have not taken yet."""
    episodes: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    """(score, length) of the games that ended since the last row."""
    recent_scores: list[float] = dataclasses.field(default_factory=list)
    """Of the last ten games."""
    reported: int = 0
    """Pictures that were due so far."""
    wall_seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)
    """What a reader of the results should know: resumptions that were not exact, steps that were lost."""

    @classmethod
    def from_host(cls, values: dict[str, Any]) -> "Counters":
        """From what `dataclasses.asdict` made and JSON kept.

        Raises:
          TypeError, ValueError: it is something else.
        """
        counters = cls(**values)
        counts = ("iterations", "env_steps", "updates", "pretraining_updates", "filled_at", "reported")
        for name in counts:
            value = getattr(counters, name)
            if not (name == "filled_at" and value is None) and (
                type(value) is not int or not 0 <= value < 2**31
            ):
                raise ValueError(f"counters.{name} = {str(value)[:40]}")
        counters.episodes = [(float(score), int(length)) for score, length in counters.episodes]
        counters.recent_scores = [float(score) for score in counters.recent_scores]
        counters.notes = [str(note) for note in counters.notes]
        counters.acted, counters.wall_seconds = bool(counters.acted), float(counters.wall_seconds)
        return counters

    @property
    def position(self) -> int:
        """Names checkpoints: it grows whenever the run makes progress."""
        return self.env_steps + self.pretraining_updates

    def add(self, steps: int, episodes: list[tuple[float, int]]) -> None:
        """Counts a step of all environments: those that took an action, and episodes that ended."""
        self.iterations += 1
        self.env_steps += steps
        self.episodes += episodes
        self.recent_scores = [*self.recent_scores, *(score for score, _ in episodes)][-10:]

    def postpone(self, steps: int) -> None:
        """No updates are due for these steps."""
        assert self.filled_at is not None
        self.filled_at += steps


def updates_due(env_steps: int, filled_at: int | None, updates_per_step: float) -> int:
    """Updates due after `env_steps` steps, from totals, so that no rounding builds up."""
    if filled_at is None:
        return 0
    return math.floor((env_steps - filled_at) * updates_per_step)


def tree_bytes(tree: Any) -> int:
    """Memory that the arrays of a tree, or their shapes, take."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
