"""One optimiser step: clip by the global norm, Adam, and nothing at all where a number is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from twister_jax.agent import guard
from twister_jax.config import OptimizerConfig

Params = Any


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam; L2 is added to the gradient, which comes clipped (the order of PyTorch's optimisers)."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_adam(eps=config.epsilon),
        optax.scale_by_learning_rate(config.learning_rate),
    )


def global_norm(gradients: Params) -> Float[Array, ""]:
    """What `optax.tree.norm` computes; vectors, which are many and short, in one reduction."""
    leaves = jax.tree.leaves(gradients)
    vectors = [leaf for leaf in leaves if leaf.ndim <= 1]
    # Scalars count as vectors.
    joined = [jnp.concatenate([vector.reshape(-1) for vector in vectors])] if vectors else []
    squares = [jnp.sum(x * x) for x in [*joined, *(leaf for leaf in leaves if leaf.ndim > 1)]]
    return jnp.sqrt(sum(squares))


def apply_gradients(
    config: OptimizerConfig,
    gradients: Params,
    params: Params,
    optimizer_state: optax.OptState,
    losses_sound: Bool[Array, ""],
) -> tuple[Params, optax.OptState, Float[Array, ""]]:
    """New parameters and optimiser state, or the old ones where a loss or the gradient is not finite.

    Returns:
      parameters, optimiser state, and the gradient's global norm before clipping.
    """
    norm = global_norm(gradients)
    share = jnp.minimum(1.0, config.clip_norm / norm)
    gradients = jax.tree.map(lambda gradient: share * gradient, gradients)
    updates, new_state = make_optimizer(config).update(gradients, optimizer_state, params)
    sound = losses_sound & jnp.isfinite(norm)
    new = guard(sound, (optax.apply_updates(params, updates), new_state), (params, optimizer_state))
    return (*new, norm)
