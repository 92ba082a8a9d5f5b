"""TWM's world model: observation model and dynamics model, trained side by side (section 2, algorithm 1).

One pass serves both. The dynamics model reads latents and targets without gradient, the observation model
reads the dynamics model's predictions without gradient, so one backward pass over the sum of both losses
gives each its own gradient.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from twister_jax.agents.base import Losses, Metrics, weighted_sum
from twister_jax.agents.twm.behavior import StartStates
from twister_jax.agents.twm.config import TwmConfig
from twister_jax.agents.twm.dynamics import Dynamics, Predictions, dynamics_losses
from twister_jax.agents.twm.observation import (
    ObservationModel,
    consistency_loss,
    flat,
    observation_losses,
    to_float,
)
from twister_jax.agents.twm.windows import Windows
from twister_jax.nn.distributions import OneHot, Sampler


class WorldModelOutput(NamedTuple):
    """What the training pass computed; T is the number of steps trained on."""

    losses: dict[str, Losses]
    """Unscaled terms of each model, named as in `loss_scales`."""
    logged: Metrics
    posterior: OneHot
    """Of the T observations trained on."""
    predicted: Float[Array, "batch T group class"]
    """What the dynamics model predicted of them, as probabilities."""
    latent: Float[Array, "batch T_plus_1 latent"]
    """Samples: the context's, then those of the T observations."""
    hidden: Float[Array, "batch T_plus_1 hidden"]
    predictions: Predictions
    """Of what followed each of the T observations."""


def loss_scales(config: TwmConfig) -> dict[str, dict[str, float]]:
    """The weight of every loss of each model."""
    return {
        "observation": {
            "decoder": config.decoder_scale,
            "entropy": config.entropy_scale,
            "consistency": config.consistency_scale,
        },
        "dynamics": {
            "latent": config.latent_scale,
            "reward": config.reward_scale,
            "discount": config.discount_scale,
        },
    }


def dynamics_pass(
    dynamics: Dynamics,
    latent: Float[Array, "batch T_plus_1 latent"],
    following: OneHot,
    windows: Windows,
    config: TwmConfig,
    dropout_key: PRNGKeyArray | None,
) -> tuple[Losses, Float[Array, "batch T group class"], Float[Array, "batch T_plus_1 hidden"], Predictions]:
    """The dynamics model on windows whose first step is context only.

    Args:
      dynamics: the model that is trained.
      latent: z of the context and of the T steps; no gradient.
      following: posteriors of what came after each of the T steps.
      windows: T + 2 observations, T + 1 transitions.
      config: discount.
      dropout_key: None switches dropout off.

    Returns:
      losses, predicted probabilities of the T latents, h, and the predictions of what followed them.
    """
    key_hidden, key_heads = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    hidden = dynamics.hidden_states(
        latent, windows.action, windows.reward[:, :-1], windows.last[:, :-1], key_hidden
    )
    predictions = dynamics.predict(hidden, key_heads)
    predicted = jax.lax.stop_gradient(predictions.latent.probs[:, :-1])
    predictions = jax.tree.map(lambda x: x[:, 1:], predictions)
    losses = dynamics_losses(
        predictions,
        following,
        windows.reward[:, 1:],
        windows.discount(config.discount)[:, 1:],
        windows.last[:, 1:],
    )
    return losses, predicted, hidden, predictions


def world_model_loss(
    observation: ObservationModel,
    dynamics: Dynamics,
    windows: Windows,
    config: TwmConfig,
    sampler: Sampler,
    dropout_key: PRNGKeyArray | None,
) -> tuple[Float[Array, ""], WorldModelOutput]:
    """Both losses on windows of one context observation, T trained ones and the one after (eq. 4 and 5).

    Args:
      observation: model whose gradient is that of the observation loss.
      dynamics: model whose gradient is that of the dynamics loss.
      windows: T + 2 observations, T + 1 transitions.
      config: loss scales.
      sampler: draws "posterior" (of the T) and "context".
      dropout_key: key of the dynamics model's dropout; None switches it off.

    Returns:
      the sum of both losses, and its parts.
    """
    stop = jax.lax.stop_gradient
    chex.assert_equal(windows.frames.shape[1], windows.reward.shape[1] + 1)
    frames = to_float(windows.frames)
    trained = frames[:, 1:-1]
    posterior = observation.encoder(trained)
    # The two at the ends are only read.
    ends = stop(observation.encoder(frames[:, [0, -1]]))
    sample = sampler("posterior", posterior)
    context = sampler("context", jax.tree.map(lambda x: x[:, :1], ends))
    latent = stop(flat(jnp.concatenate([context, sample], axis=1)))

    following = jax.tree.map(lambda a, b: jnp.concatenate([a[:, 1:], b[:, 1:]], axis=1), posterior, ends)
    of_dynamics, predicted, hidden, predictions = dynamics_pass(
        dynamics, latent, following, windows, config, dropout_key
    )
    of_observation, logged = observation_losses(observation.decoder, posterior, sample, trained, config)
    of_observation["consistency"] = consistency_loss(posterior, predicted)

    losses = {"observation": of_observation, "dynamics": of_dynamics}
    scales = loss_scales(config)
    total = jnp.zeros(())
    for model in losses:
        total = total + weighted_sum(losses[model], scales[model])
    return total, WorldModelOutput(losses, logged, posterior, predicted, latent, hidden, predictions)


def start_states(latent: Float[Array, "batch T_plus_1 latent"], windows: Windows) -> StartStates:
    """All pairs of neighbouring steps of a batch, batch-major: what imagination can start from."""
    steps = latent.shape[1] - 1

    def flatten(x: Array) -> Array:
        return x[:, :steps].reshape(-1, *x.shape[2:])

    return StartStates(
        latents=flatten(jnp.stack([latent[:, :-1], latent[:, 1:]], axis=2)),
        action=flatten(windows.action),
        reward=flatten(windows.reward),
        last=flatten(windows.last),
    )
