"""TWM's pre-training losses, on steps collected with random actions before the loop."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from twister_jax.agents.base import Losses, Metrics, weighted_sum
from twister_jax.agents.twm.behavior import (
    Network,
    Trajectory,
    latent_and_hidden,
    normalized_policy_entropy,
    without_ended,
)
from twister_jax.agents.twm.config import TwmConfig
from twister_jax.agents.twm.dynamics import Dynamics
from twister_jax.agents.twm.observation import ObservationModel, flat, observation_losses, to_float
from twister_jax.agents.twm.windows import Windows
from twister_jax.agents.twm.world_model import dynamics_pass, loss_scales
from twister_jax.nn.distributions import OneHot


def observation_loss(
    model: ObservationModel,
    frames: Float[Array, "frame height width stack"],
    config: TwmConfig,
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], tuple[Losses, Metrics]]:
    """The observation loss without the consistency that a dynamics model would ask for (eq. 4).

    Returns:
      the scaled sum, its terms, and what is logged with them.
    """
    posterior = model.encoder(frames)
    losses, logged = observation_losses(model.decoder, posterior, posterior.draw(key), frames, config)
    scales = loss_scales(config)["observation"]
    return weighted_sum(losses, {term: scales[term] for term in losses}), (losses, logged)


def dynamics_loss(
    model: Dynamics,
    posterior: OneHot,
    windows: Windows,
    config: TwmConfig,
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], Losses]:
    """The dynamics loss (eq. 5), given the posterior of all observations of the windows.

    Returns:
      the scaled sum, and its terms.
    """
    key_draw, key_dropout = jax.random.split(key)
    latent = flat(posterior.draw(key_draw))[:, :-1]
    following = jax.tree.map(lambda x: x[:, 2:], posterior)
    losses, *_ = dynamics_pass(model, latent, following, windows, config, key_dropout)
    return weighted_sum(losses, loss_scales(config)["dynamics"]), losses


def replayed_trajectory(
    dynamics: Dynamics, latent: Float[Array, "window observation latent"], windows: Windows, config: TwmConfig
) -> Trajectory:
    """Replayed steps for the critic, as if they had been imagined; frames are the real ones.

    Where it reads the state (z, h), the windows' first step is context only, and leaves the first h.
    """
    view = None
    if config.model.policy_reads == "frames":
        view = to_float(windows.frames)
    elif config.model.policy_reads == "state":
        hidden = dynamics.hidden_states(
            latent[:, :-1], windows.action, windows.reward[:, :-1], windows.last[:, :-1], None
        )
        view = latent_and_hidden(latent[:, 1:], without_ended(hidden, windows.last))
        latent, windows = jax.tree.map(lambda x: x[:, 1:], (latent, windows))
    return Trajectory(
        latent=latent,
        action=windows.action,
        reward=windows.reward,
        discount=jnp.full_like(windows.reward, config.discount),
        done=windows.last,
        weight=jnp.ones_like(windows.reward),
        view=view,
    )


def actor_loss(actor: Network, seen: Array, config: TwmConfig) -> Float[Array, ""]:
    """Negative entropy: the actor starts near the uniform policy, as the data come from random actions."""
    return -config.actor_entropy_scale * normalized_policy_entropy(actor, seen)
