"""The contract of agents, and what all of them are made of.

Loop, replay, evaluation, checkpoints and benchmarks know an agent only as an `Agent`: a handful of pure
functions closed over a configuration. All of them may be compiled, vmapped over seeds and called from a
notebook.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from twister_jax.config import OptimizerConfig
from twister_jax.nn import optimizer
from twister_jax.nn.networks import Params
from twister_jax.replay.store import Transition

State = Any
"""One pytree with everything that learns: parameters, optimisers, averages, counters."""
Batch = Any
"""Everything that one update reads of the replay."""
Carry = Any
"""What acting remembers of each environment between two steps."""
Mind = Any
"""What a world model remembers of each sequence, and where it stands."""
Metrics = dict[str, Float[Array, ""]]
Losses = dict[str, Float[Array, ""]]
"""Unscaled loss terms by name."""


class Observation(NamedTuple):
    """What acting sees of each environment."""

    image: UInt8[Array, "env height width channel"]
    is_first: Bool[Array, " env"]
    reward: Float[Array, " env"] | None = None
    """The game's, which came with the image; only for agents that read it."""


# ------------------------------------------------------------------------------------ what agents share


def weighted_sum(losses: Losses, scales: Mapping[str, Any]) -> Float[Array, ""]:
    """Σ scale · loss over all terms; both dictionaries have the same names."""
    chex.assert_equal(losses.keys(), scales.keys())
    return jnp.sum(jnp.stack([scales[name] * loss for name, loss in losses.items()]))


@struct.dataclass
class Trained:
    """Parameters and optimiser states of an agent's networks, by name."""

    params: dict[str, Params]
    optimizers: dict[str, Any]

    @classmethod
    def begin(cls, params: dict[str, Params], optimizers: Mapping[str, OptimizerConfig]) -> "Trained":
        """Fresh optimisers for the networks that have one."""
        states = {name: optimizer.init(config, params[name]) for name, config in optimizers.items()}
        return cls(params, states)

    def step(
        self, name: str, config: OptimizerConfig, gradients: Params, losses: Losses
    ) -> tuple["Trained", Float[Array, ""], dict[str, Bool[Array, ""]]]:
        """One optimiser step of a network; none where a loss, the gradient or its result is not finite.

        Returns:
          the new parameters and optimisers, the gradient's norm before clipping, and which terms were finite:
          every loss, and `NAME_gradient`, the gradient and the parameters that it leads to.
        """
        finite = {term: jnp.isfinite(loss) for term, loss in losses.items()}
        sound = jnp.all(jnp.stack(list(finite.values())))
        params, state, norm, stepped_finite = optimizer.apply_gradients(
            config, gradients, self.params[name], self.optimizers[name], sound
        )
        finite[f"{name}_gradient"] = stepped_finite
        stepped = Trained(self.params | {name: params}, self.optimizers | {name: state})
        return stepped, norm, finite


def acting_part(state: State) -> State:
    """A state without its optimisers, which neither acting nor dreaming reads."""

    def is_trained(node: Any) -> bool:
        return isinstance(node, Trained)

    return jax.tree.map(lambda x: Trained(x.params, {}) if is_trained(x) else x, state, is_leaf=is_trained)


@struct.dataclass
class Health:
    """Which updates were skipped because a loss or a gradient was not finite."""

    skipped: Int[Array, ""]
    """Updates skipped so far, whole or in part."""
    consecutive: Int[Array, ""]
    """Length of the streak the newest update belongs to; 0 when it was sound."""
    longest: Int[Array, ""]
    """Longest streak so far."""
    first_bad: Bool[Array, " term"]
    """What was not finite when the newest streak began."""
    terms: tuple[str, ...] = struct.field(pytree_node=False)
    """Names of all losses and gradients, in the order in which they are computed."""

    @classmethod
    def sound(cls, terms: tuple[str, ...]) -> "Health":
        """No update skipped yet."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, zero, zero, jnp.zeros(len(terms), bool), terms)

    def record(self, finite: Mapping[str, Bool[Array, ""]]) -> "Health":
        """Counts one update; `finite` has those of the terms that it computed."""
        assert finite.keys() <= set(self.terms), f"unknown terms {finite.keys() - set(self.terms)}"
        bad = jnp.stack([~finite[term] if term in finite else jnp.zeros((), bool) for term in self.terms])
        any_bad = jnp.any(bad)
        consecutive = jnp.where(any_bad, self.consecutive + 1, 0)
        begins = any_bad & (self.consecutive == 0)
        return Health(
            skipped=self.skipped + any_bad,
            consecutive=consecutive,
            longest=jnp.maximum(self.longest, consecutive),
            first_bad=jnp.where(begins, bad, self.first_bad),
            terms=self.terms,
        )

    @property
    def first_bad_name(self) -> str:
        """The first of the bad terms; waits for the device."""
        bad = jax.device_get(self.first_bad)
        return next((term for term, was_bad in zip(self.terms, bad, strict=True) if was_bad), "nothing")


# ------------------------------------------------------------------------------------------ the contract


@dataclasses.dataclass(frozen=True)
class Learner:
    """A kind of update: what it reads of the replay, and what it learns from that.

    Attributes:
      sample: (replay, key, shards=1) -> (batch, replay): a batch, or an even share of one. The arrays of a
        batch have a leading axis along which devices split it; its scalars are averages over the replay. The
        replay may count what was drawn.
      learn: (state, batch, key) -> (state, metrics).
    """

    sample: Callable[..., tuple[Batch, Any]]
    learn: Callable[[State, Batch, PRNGKeyArray], tuple[State, Metrics]]

    def update(self, state: State, replay: Any, key: PRNGKeyArray) -> tuple[State, Any, Metrics]:
        """Draws from the replay, and learns. Donate state and replay, so that they are updated in place."""
        key_sample, key_learn = jax.random.split(key)
        with jax.named_scope("sample"):
            batch, replay = self.sample(replay, key_sample)
        state, metrics = self.learn(state, batch, key_learn)
        return state, replay, metrics


class Glimpse(NamedTuple):
    """What a world model predicts at the current step of each sequence."""

    image: Float[Array, "*batch height width channel"]
    """Decoded, in [0, 1] but for what the decoder overshoots; the newest frame where it sees several."""
    reward: Float[Array, "*batch"]
    """Predicted of the reward that came with the step, as `Dream.learned_reward` gives it."""
    continues: Float[Array, "*batch"]
    """Predicted probability that the episode goes on."""
    value: Float[Array, "*batch"]
    """The critic's, of what is to come."""


@dataclasses.dataclass(frozen=True)
class Dream:
    """A world model step by step: it observes a real step, or imagines one.

    Attributes:
      begin: (state, number of sequences) -> mind that has seen nothing; a step with `is_first` comes next.
      observe: (state, mind, step, key) -> mind after a real step of each sequence.
      imagine: (state, mind, action [env, num_actions], key) -> mind after the step that it expects.
      look: (state, mind) -> `Glimpse` of the current step.
      policy: (state, mind, key) -> action [env, num_actions], sampled.
      learned_reward: a game's reward -> the value that the model learns to predict.
    """

    begin: Callable[[State, int], Mind]
    observe: Callable[[State, Mind, Transition, PRNGKeyArray], Mind]
    imagine: Callable[[State, Mind, Float[Array, "env action"], PRNGKeyArray], Mind]
    look: Callable[[State, Mind], Glimpse]
    policy: Callable[[State, Mind, PRNGKeyArray], Float[Array, "env action"]]
    learned_reward: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Pretraining(Learner):
    """A training phase between prefill and the interleaved loop: `updates` updates of its own kind."""

    name: str
    updates: int


@dataclasses.dataclass(frozen=True)
class Agent(Learner):
    """An agent as the rest of the program sees it.

    Attributes:
      init: key -> state. Deterministic in the key.
      init_carry: (state, number of environments) -> carry for acting from a reset.
      act: (state, carry, observation, key) -> (action [env, num_actions], carry), the policy sampled.
      act_evaluate: the same by the evaluation protocol of the paper (mode or sample).
      sample, learn: the updates of the loop; see `Learner`.
      took: (carry, action [env, num_actions]) -> the carry after the environments took this action instead of
        the one that `act` chose. Only agents whose carry holds the action need one.
      report: (state, replay, key) -> {name: uint8 picture [height, width, 3]} for people to look at.
      health: state -> `Health`.
      parts: the `jax.named_scope`s of `update`'s parts, for profiles.
      shared_sizes: batch sizes that are divided among devices, by setting.
      min_replay_steps: stored steps a stream needs before `update` may be called.
      tokens_per_update: replayed environment steps through the world model in one update (B·L).
      headline: the metric that the progress line shows.
      pretraining: phases between prefill and the loop, in order; empty for most agents.
      dream: its world model step by step; None for agents without one, which cannot be looked into.
      reads_reward: whether acting reads rewards; otherwise observations have none.
    """

    init: Callable[[PRNGKeyArray], State]
    init_carry: Callable[[State, int], Carry]
    act: Callable[[State, Carry, Observation, PRNGKeyArray], tuple[Float[Array, "env action"], Carry]]
    act_evaluate: Callable[
        [State, Carry, Observation, PRNGKeyArray], tuple[Float[Array, "env action"], Carry]
    ]
    report: Callable[[State, Any, PRNGKeyArray], dict[str, UInt8[Array, "height width 3"]]]
    health: Callable[[State], Health]
    min_replay_steps: int
    tokens_per_update: int
    headline: str
    shared_sizes: Mapping[str, int]
    parts: tuple[str, ...] = ()
    pretraining: tuple[Pretraining, ...] = ()
    dream: Dream | None = None
    took: Callable[[Carry, Float[Array, "env action"]], Carry] = lambda carry, action: carry
    reads_reward: bool = False
