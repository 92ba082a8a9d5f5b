"""What acting remembers: the newest frames, and where the policy reads the state (z, h), the newest steps.

The transformer reads them anew at every step, so that h is always that of the current weights, and of as many
steps as it saw in training.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, UInt8

from twister_jax.agents.base import Observation
from twister_jax.agents.twm.behavior import without_ended
from twister_jax.agents.twm.config import TwmModelConfig
from twister_jax.agents.twm.dynamics import Dynamics


@struct.dataclass
class History:
    """The newest steps of each environment, oldest first; before the first there are ends of episodes."""

    latent: Float[Array, "env step latent"]
    action: Float[Array, "env step action"]
    """Taken there, one-hot."""
    reward: Float[Array, "env step"]
    """Came of it, as the dynamics model reads rewards; of the newest step once it is `answered`."""
    last: Bool[Array, "env step"]
    """Whether an episode ended there."""

    @classmethod
    def empty(cls, model: TwmModelConfig, num_envs: int, num_actions: int) -> "History":
        """Room for all steps of which an action token sees any token."""
        shape = (num_envs, model.memory_steps + 2)
        return cls(
            latent=jnp.zeros((*shape, model.latent_size)),
            action=jnp.zeros((*shape, num_actions)),
            reward=jnp.zeros(shape),
            last=jnp.ones(shape, bool),
        )

    def answered(self, observation: Observation) -> "History":
        """With what the newest step led to."""
        assert observation.reward is not None
        reward = self.reward.at[:, -1].set(jnp.tanh(observation.reward))
        last = self.last.at[:, -1].set(observation.is_first)
        return History(self.latent, self.action, reward, last)

    def hidden(self, dynamics: Dynamics) -> Float[Array, "env hidden"]:
        """h at the newest step's action; zeros where the episode has just begun."""
        hidden = dynamics.hidden_states(
            self.latent, self.action, self.reward[:, :-1], self.last[:, :-1], None
        )
        return without_ended(hidden[:, -1], self.last[:, -1])

    def after(self, latent: Float[Array, "env latent"], action: Float[Array, "env action"]) -> "History":
        """With one more step, and without the oldest."""

        def push(rows: Array, newest: Array) -> Array:
            return jnp.concatenate([rows[:, 1:], newest[:, None].astype(rows.dtype)], axis=1)

        nothing = jnp.zeros(len(latent))
        return History(
            latent=push(self.latent, latent),
            action=push(self.action, action),
            reward=push(self.reward, nothing),
            last=push(self.last, nothing),
        )


@struct.dataclass
class TwmCarry:
    """What acting remembers of each environment: the newest frames, oldest first."""

    frames: UInt8[Array, "env height width stack"]
    history: History | None = None
    """Where the policy reads the state, the steps before."""


def took(carry: TwmCarry, action: Float[Array, "env action"]) -> TwmCarry:
    """The carry where another action was taken than the one that was chosen."""
    if carry.history is None:
        return carry
    actions = carry.history.action.at[:, -1].set(action)
    return carry.replace(history=carry.history.replace(action=actions))  # type: ignore[attr-defined]
