"""The contract both agents keep, and the few types that cross it.

The loop, replay, evaluation, checkpoints and benchmarks know an agent only as an `Agent`: a handful of
pure functions closed over a configuration. All of them may be compiled, vmapped over seeds and called
from a notebook.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

State = Any
"""One pytree with everything that learns: parameters, optimisers, averages, counters."""
Batch = Any
"""Everything that one update reads of the replay."""
Carry = Any
"""What acting remembers of each environment between two steps."""
Metrics = dict[str, Float[Array, ""]]


class Observation(NamedTuple):
    """What acting sees of each environment."""

    image: UInt8[Array, "env height width channel"]
    is_first: Bool[Array, " env"]


class Transition(NamedTuple):
    """One stored step of each environment: `action` led to `image`, and `reward` came with it.

    A reset step has `is_first`, a zero action and zero reward.
    """

    image: UInt8[Array, "*batch height width channel"]
    action: Float[Array, "*batch action"]
    reward: Float[Array, "*batch"]
    terminal: Bool[Array, "*batch"]
    is_first: Bool[Array, "*batch"]


@struct.dataclass
class Health:
    """Which updates were skipped because a loss or a gradient was not finite."""

    skipped: Int[Array, ""]
    """Updates skipped so far, whole or in part."""
    consecutive: Int[Array, ""]
    """Length of the streak the newest update belongs to; 0 when it was sound."""
    longest: Int[Array, ""]
    """Longest streak so far."""
    first_bad: Int[Array, ""]
    """Index into `Agent.loss_names` of the first bad term of the newest streak, -1 when there was none."""

    @classmethod
    def sound(cls) -> "Health":
        """No update skipped yet."""
        zero = jnp.zeros((), jnp.int32)
        return cls(skipped=zero, consecutive=zero, longest=zero, first_bad=zero - 1)

    def record(self, bad: Bool[Array, " terms"]) -> "Health":
        """Counts one update; `bad` says for each of `Agent.loss_names` whether it was not finite."""
        any_bad = jnp.any(bad)
        consecutive = jnp.where(any_bad, self.consecutive + 1, 0)
        starts = any_bad & (self.consecutive == 0)
        return Health(
            skipped=self.skipped + any_bad,
            consecutive=consecutive,
            longest=jnp.maximum(self.longest, consecutive),
            first_bad=jnp.where(starts, jnp.argmax(bad).astype(jnp.int32), self.first_bad),
        )


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A training phase between prefill and the interleaved loop: `updates` calls of `update`."""

    name: str
    updates: int
    update: Callable[[State, Any, PRNGKeyArray], tuple[State, Any, Metrics]]


@dataclasses.dataclass(frozen=True)
class Agent:
    """An agent as the rest of the program sees it.

    Attributes:
      init: key -> state. Deterministic in the key.
      init_carry: (state, number of environments) -> carry for acting from a reset.
      act: (state, carry, observation, key) -> (action [env, num_actions], carry), the policy sampled.
      act_evaluate: the same by the evaluation protocol of the paper (mode or sample).
      sample: (replay, key) -> (batch, replay). The replay may count what was drawn.
      learn: (state, batch, key) -> (state, metrics). With the key that the batch was drawn with.
      report: (state, replay, key) -> {name: uint8 picture [height, width, 3]} for people to look at.
      loss_names: the loss terms in the order they are computed, as in `Health.first_bad`.
      health: state -> `Health`.
      min_replay_steps: stored steps a stream needs before `update` may be called.
      tokens_per_update: replayed environment steps through the world model in one update (B·L).
      pretraining: phases between prefill and the loop, in order; empty for most agents.
    """

    init: Callable[[PRNGKeyArray], State]
    init_carry: Callable[[State, int], Carry]
    act: Callable[[State, Carry, Observation, PRNGKeyArray], tuple[Float[Array, "env action"], Carry]]
    act_evaluate: Callable[
        [State, Carry, Observation, PRNGKeyArray], tuple[Float[Array, "env action"], Carry]
    ]
    sample: Callable[[Any, PRNGKeyArray], tuple[Batch, Any]]
    learn: Callable[[State, Batch, PRNGKeyArray], tuple[State, Metrics]]
    report: Callable[[State, Any, PRNGKeyArray], dict[str, UInt8[Array, "height width 3"]]]
    loss_names: tuple[str, ...]
    health: Callable[[State], Health]
    min_replay_steps: int
    tokens_per_update: int
    pretraining: tuple[Pretraining, ...] = ()

    def update(self, state: State, replay: Any, key: PRNGKeyArray) -> tuple[State, Any, Metrics]:
        """Draws from the replay, and learns. Donate state and replay, so that they are updated in place."""
        batch, replay = self.sample(replay, key)
        state, metrics = self.learn(state, batch, key)
        return state, replay, metrics

    def update_in_turn(self, states: State, replays: Any, keys: PRNGKeyArray) -> tuple[State, Any, Metrics]:
        """One update of each of several seeds, in one program, one seed after the other.

        It computes what `jax.vmap(agent.update)` computes, in the scratch memory of one update, and is the
        choice where one update fills the device: there learning side by side is no faster.

        Every leaf of the arguments and results has a leading axis, the seed. Donate the replays but not the
        states: XLA's CPU backend copies donated states, and the new ones take a place of their own anyway.
        """
        batches, replays = jax.vmap(self.sample)(replays, keys)
        states, metrics = jax.lax.map(lambda one: self.learn(*one), (states, batches, keys))
        return states, replays, metrics


def compute_dtype(precision: str) -> Any:
    """Number format of matrix products: bfloat16 where the backend is fast at it, when left to us."""
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def guard(sound: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` where the step was sound, else `old`: a non-finite step leaves no trace."""
    return jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, old)
