"""TWM's world model step by step, for people to look into."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from twister_jax.agents.base import Dream, Glimpse
from twister_jax.agents.twm.behavior import without_ended
from twister_jax.agents.twm.dynamics import TOKENS_PER_STEP, Memory
from twister_jax.agents.twm.observation import flat, push_frame, to_float
from twister_jax.nn.distributions import OneHot
from twister_jax.replay.store import Transition

if TYPE_CHECKING:
    from twister_jax.agents.twm.agent import Twm, TwmState


@struct.dataclass
class TwmMind:
    """The latent of each sequence, what led to it, and the steps before.

    The memory rolls: the step that is written next has always the last place, and earlier ones move up, so
    that a dream may last.
    """

    latent: Float[Array, "env latent"]
    frames: UInt8[Array, "env height width stack"]
    reward: Float[Array, " env"]
    """Came with the latent: the real one where it was seen, else the predicted one."""
    predicted_reward: Float[Array, " env"]
    continues: Float[Array, " env"]
    """Predicted with the reward."""
    memory: Memory
    episode: Int[Array, "env step"]
    """Of each step in the memory, the next one included; no two episodes see one another."""
    hidden: Float[Array, "env hidden"] | None
    """What the transformer made of the step before, where the policy reads it."""


def make_dream(twm: "Twm") -> Dream:
    """See `Dream`."""
    # As many steps as attention reaches back, and the one being written.
    model = twm.config.model
    steps = model.memory_steps + 2
    reads_state = model.policy_reads == "state"

    def begin(state: "TwmState", num_envs: int) -> TwmMind:
        nothing = jnp.zeros(num_envs)
        return TwmMind(
            latent=jnp.zeros((num_envs, model.latent_size)),
            frames=twm.init_carry(state, num_envs).frames,
            reward=nothing,
            predicted_reward=nothing,
            continues=jnp.ones(num_envs),
            memory=twm.dynamics(state.trained.params["dynamics"]).empty_memory(num_envs, steps),
            episode=jnp.full((num_envs, steps), -1, jnp.int32),
            hidden=jnp.zeros((num_envs, model.hidden_size)) if reads_state else None,
        )

    def proceed(
        state: "TwmState", mind: TwmMind, action: Float[Array, "env action"], key: PRNGKeyArray
    ) -> TwmMind:
        """The step after this action, as the model expects it."""
        dynamics = twm.dynamics(state.trained.params["dynamics"])
        position_keys = dynamics.position_keys(mind.memory.keys[0].shape[2])
        hidden, memory = dynamics.step(
            mind.memory, position_keys, steps - 1, mind.reward, mind.latent, action, mind.episode
        )
        foreseen = dynamics.predict(hidden)
        # The head has learned the discount, 0 after an end.
        continues = jnp.minimum(1.0, jax.nn.sigmoid(foreseen.discount.logit) / twm.config.discount)
        return dataclasses.replace(
            mind,
            latent=flat(foreseen.latent.draw(key)),
            reward=foreseen.reward,
            predicted_reward=foreseen.reward,
            continues=continues,
            memory=jax.tree.map(lambda rows: jnp.roll(rows, -TOKENS_PER_STEP, axis=2), memory),
            episode=jnp.concatenate([mind.episode[:, 1:], mind.episode[:, -1:]], axis=1),
            hidden=hidden.astype(jnp.float32) if reads_state else None,
        )

    def observe(state: "TwmState", mind: TwmMind, step: Transition, key: PRNGKeyArray) -> TwmMind:
        """As acting does: the most likely latent of the newest frames."""
        frames = push_frame(mind.frames, step.image, step.is_first)
        encoder = twm.observation(state.trained.params["observation"]).encoder
        foreseen = proceed(state, mind, step.action, key)
        return dataclasses.replace(
            foreseen,
            latent=flat(encoder(to_float(frames)).mode()),
            frames=frames,
            reward=learned_reward(step.reward),
            episode=foreseen.episode.at[:, -1].add(step.is_first),
            hidden=None if foreseen.hidden is None else without_ended(foreseen.hidden, step.is_first),
        )

    def look(state: "TwmState", mind: TwmMind) -> Glimpse:
        params = state.trained.params
        return Glimpse(
            image=twm.observation(params["observation"]).decoder(mind.latent)[..., -1:],
            reward=mind.predicted_reward,
            continues=mind.continues,
            value=twm.critic(params["critic"])(twm.view(params)(mind.latent, mind.hidden))[..., 0],
        )

    def policy(state: "TwmState", mind: TwmMind, key: PRNGKeyArray) -> Float[Array, "env action"]:
        params = state.trained.params
        seen = twm.view(params)(mind.latent, mind.hidden)
        return OneHot.of(twm.actor(params["actor"])(seen)).draw(key)

    def learned_reward(reward: Array) -> Array:
        return jnp.tanh(reward)

    return Dream(begin, observe, proceed, look, policy, learned_reward)
