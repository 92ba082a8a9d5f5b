"""One optimiser step: clip by the global norm, Adam, and no change at all where a number is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from twister_jax.config import OptimizerConfig
from twister_jax.nn.networks import Params


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) for gradients that are already clipped.

    The weight decay is an L2 term added to the gradient, as PyTorch's Adam has it.
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_adam(eps=config.epsilon),
        optax.scale_by_learning_rate(config.learning_rate),
    )


def _few_arrays(tree: Params) -> list[Array]:
    """All numbers of a tree, with vectors, which are many and short, in one array: one reduction for them."""
    leaves = jax.tree.leaves(tree)
    vectors = [leaf for leaf in leaves if leaf.ndim <= 1]  # scalars too
    joined = [jnp.concatenate([vector.reshape(-1) for vector in vectors])] if vectors else []
    return [*joined, *(leaf for leaf in leaves if leaf.ndim > 1)]


def global_norm(gradients: Params) -> Float[Array, ""]:
    """What `optax.tree.norm` computes."""
    return jnp.sqrt(sum(jnp.sum(x * x) for x in _few_arrays(gradients)))


def largest_step(config: OptimizerConfig) -> float:
    """What no step of Adam exceeds.

    By Cauchy and Schwarz the mean of gradients, with its decay of 0.9, is at most 7.3 times the root of the
    mean of their squares, with its decay of 0.999; where a square is too small for float32, epsilon divides.
    """
    return config.learning_rate * max(10.0, 1e-16 / config.epsilon)


def largest(params: Params) -> Float[Array, ""]:
    """The largest magnitude in a tree; nan where there is one."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in _few_arrays(params)]))


def where_finite(sound: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The tree `new` if everything behind it was finite (`sound`), else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, old)


def apply_gradients(
    config: OptimizerConfig,
    gradients: Params,
    params: Params,
    optimizer_state: optax.OptState,
    sound: Bool[Array, ""],
) -> tuple[Params, optax.OptState, Float[Array, ""], Bool[Array, ""]]:
    """New parameters and optimiser state; the old where a loss, the gradient or the new are not finite.

    Whether the step leads beyond the largest number is asked before it is taken: then each array is read and
    written once, and what is not taken is not stored first.

    Args:
      config: of the optimiser.
      gradients: of the parameters, not yet clipped.
      params: parameters.
      optimizer_state: from `make_optimizer(config).init`.
      sound: whether all losses are finite.

    Returns:
      parameters, optimiser state, the gradient's global norm before clipping, and whether that and the new
      parameters were finite.
    """
    norm = global_norm(gradients)
    clip_factor = jnp.minimum(1.0, config.clip_norm / norm)
    finite = jnp.isfinite(norm) & jnp.isfinite(largest(params) + largest_step(config))
    gradients = jax.tree.map(lambda gradient: clip_factor * gradient, gradients)
    updates, new_state = make_optimizer(config).update(gradients, optimizer_state, params)
    stepped = optax.apply_updates(params, updates)
    kept = where_finite(sound & finite, (stepped, new_state), (params, optimizer_state))
    return (*kept, norm, finite)
