"""What a run keeps on the device besides the replay."""

import jax
import jax.numpy as jnp
from flax import struct

from twister_jax.agent import Agent, Carry, Observation, State
from twister_jax.envs.base import EnvSpec, EnvStep
from twister_jax.randomness import Purpose, key_for


@struct.dataclass
class OnDevice:
    """The agent, and what acting needs to go on; with the replay, all arrays of a checkpoint."""

    agent: State
    carry: Carry
    observation: Observation
    """What the environments showed last; the next action answers it."""

    @classmethod
    def begin(cls, agent: Agent, seed: int, step: EnvStep) -> "OnDevice":
        """A new agent in front of its first observation."""

        @jax.jit  # what one program returns lies in buffers of its own, so that updates can reuse them
        def make(key):
            state = agent.init(key)
            return state, agent.init_carry(state, len(step.image))

        state, carry = make(key_for(seed, Purpose.INIT))
        return cls(agent=state, carry=carry, observation=observe(step))

    @classmethod
    def shapes(cls, agent: Agent, spec: EnvSpec, num_envs: int) -> "OnDevice":
        """The same with shapes in place of arrays; computes nothing."""
        state = jax.eval_shape(agent.init, key_for(0, Purpose.INIT))
        observation = jax.eval_shape(
            lambda: Observation(
                image=jnp.zeros((num_envs, *spec.image_shape), jnp.uint8), is_first=jnp.zeros(num_envs, bool)
            )
        )
        carry = jax.eval_shape(lambda state: agent.init_carry(state, num_envs), state)
        return cls(agent=state, carry=carry, observation=observation)


def observe(step: EnvStep) -> Observation:
    """What acting sees of a step, copied to the device."""
    return Observation(jnp.array(step.image), jnp.array(step.is_first))
