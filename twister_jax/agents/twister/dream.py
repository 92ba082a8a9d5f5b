"""TWISTER's world model step by step, for people to look into."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray

from twister_jax.agents.base import Dream, Glimpse
from twister_jax.agents.twister.world_model import features, to_float
from twister_jax.nn.transformer import KeyValueCache
from twister_jax.replay.store import Transition

if TYPE_CHECKING:
    from twister_jax.agents.twister.agent import Twister, TwisterState


@struct.dataclass
class TwisterMind:
    """A state (z, h) of each sequence, and the context behind it."""

    latent: Float[Array, "env latent"]
    deter: Float[Array, "env hidden"]
    cache: KeyValueCache


def make_dream(twister: "Twister") -> Dream:
    """See `Dream`."""

    def begin(state: "TwisterState", num_envs: int) -> TwisterMind:
        carry, size = twister.init_carry(state, num_envs), twister.config.model.hidden_size
        return TwisterMind(carry.latent, jnp.zeros((num_envs, size), twister.dtype), carry.cache)

    def observe(state: "TwisterState", mind: TwisterMind, step: Transition, key: PRNGKeyArray) -> TwisterMind:
        """As acting does."""
        model = twister.world_model(state.trained.params["world_model"])
        deter, cache = model.proceed(mind.latent, step.action, mind.cache, step.is_first)
        latent = model.posterior(to_float(step.image)).draw(key)
        return TwisterMind(latent.reshape(latent.shape[0], -1), deter, cache)

    def imagine(
        state: "TwisterState", mind: TwisterMind, action: Float[Array, "env action"], key: PRNGKeyArray
    ) -> TwisterMind:
        """As learning does."""
        model = twister.world_model(state.trained.params["world_model"])
        table = model.transformer.position_table()
        deter, cache = model.step(mind.latent, action, mind.cache, table)
        latent = model.prior(deter).draw(key)
        return TwisterMind(latent.reshape(latent.shape[0], -1), deter, cache)

    def look(state: "TwisterState", mind: TwisterMind) -> Glimpse:
        params = state.trained.params
        model, critic = twister.world_model(params["world_model"]), twister.critic(params["critic"])
        here = features(mind.latent, mind.deter)
        return Glimpse(
            image=model.decode(mind.latent, mind.deter) + 0.5,
            reward=model.reward(here).mean(),
            continues=jax.nn.sigmoid(model.continues(here).logit),
            value=critic(here).mean(),
        )

    def policy(state: "TwisterState", mind: TwisterMind, key: PRNGKeyArray) -> Float[Array, "env action"]:
        actor = twister.actor(state.trained.params["actor"])
        return actor(features(mind.latent, mind.deter)).draw(key)

    def learned_reward(reward: Array) -> Array:
        return reward

    return Dream(begin, observe, imagine, look, policy, learned_reward)
