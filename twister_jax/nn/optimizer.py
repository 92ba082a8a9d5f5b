"""One optimiser step: clip by the global norm, Adam, and no change at all where a number is not finite."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from twister_jax.config import OptimizerConfig
from twister_jax.nn.kernels import as_stored
from twister_jax.nn.networks import Params

SMALL = 4096
"""Most numbers of a matrix that is joined with the vectors. The larger ones are not worth copying."""


@struct.dataclass
class OptimizerState:
    """What an optimiser remembers of the steps before."""

    adam: optax.OptState
    """Adam's two moments, of the arrays of `_few_arrays`."""
    bound: Float[Array, ""]
    """No parameter has a larger magnitude."""


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) for gradients that are already clipped.

    The weight decay is an L2 term added to the gradient, as PyTorch's Adam has it.
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_adam(eps=config.epsilon),
        optax.scale_by_learning_rate(config.learning_rate),
    )


def init(config: OptimizerConfig, params: Params) -> OptimizerState:
    """The state before the first step, for these parameters."""
    arrays = _few_arrays(params)
    bound = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in arrays]))
    return OptimizerState(adam(config).init(arrays), bound)


def _is_small(leaf: Array) -> bool:
    return leaf.ndim <= 1 or leaf.size <= SMALL


def _few_arrays(tree: Params) -> list[Array]:
    """All numbers of a tree, with small arrays, which are many, joined in one: one operation for them."""
    leaves = jax.tree.leaves(tree)
    small = [leaf.reshape(-1) for leaf in leaves if _is_small(leaf)]
    return [*([jnp.concatenate(small)] if small else []), *(leaf for leaf in leaves if not _is_small(leaf))]


def _as_tree(arrays: list[Array], like: Params) -> Params:
    """The tree of `_few_arrays(like)`, from new arrays."""
    leaves = jax.tree.leaves(like)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves if _is_small(leaf)))
    small = iter(jnp.split(arrays[0], ends[:-1]) if ends else ())
    large = iter(arrays[1:] if ends else arrays)
    ordered = [next(small).reshape(leaf.shape) if _is_small(leaf) else next(large) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), ordered)


def _norm(arrays: list[Array]) -> Float[Array, ""]:
    """Of all numbers. First the rows are summed, so that a GPU needs one kernel for an array and not two."""
    rows = [jnp.sum(x * x, axis=-1).reshape(-1) for x in arrays]
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(rows))))


def largest_step(config: OptimizerConfig) -> float:
    """What no step of Adam exceeds.

    By Cauchy and Schwarz the mean of gradients, with its decay of 0.9, is at most 7.3 times the root of the
    mean of their squares, with its decay of 0.999; where a square is too small for float32, epsilon divides.
    """
    return config.learning_rate * max(10.0, 1e-16 / config.epsilon)


def where_finite(sound: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The tree `new` if everything behind it was finite (`sound`), else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, old)


def apply_gradients(
    config: OptimizerConfig,
    gradients: Params,
    params: Params,
    state: OptimizerState,
    sound: Bool[Array, ""],
) -> tuple[Params, OptimizerState, Float[Array, ""], Bool[Array, ""]]:
    """New parameters and optimiser state; the old where a loss, the gradient or the new are not finite.

    Whether the step could lead beyond the largest number is known before it is taken, from how far the
    parameters can have come: each array is read and written once.

    Args:
      config: of the optimiser.
      gradients: of the parameters, not yet clipped.
      params: parameters.
      state: from `init` or the step before.
      sound: whether all losses are finite.

    Returns:
      parameters, optimiser state, the gradient's global norm before clipping, and whether that and the new
      parameters were finite.
    """
    arrays, slopes = _few_arrays(params), [as_stored(x) for x in _few_arrays(gradients)]
    norm = _norm(slopes)
    bound = jnp.nextafter(state.bound + largest_step(config), jnp.inf)
    finite = jnp.isfinite(norm) & jnp.isfinite(bound)
    clip_factor = jnp.minimum(1.0, config.clip_norm / norm)
    updates, moments = adam(config).update([clip_factor * x for x in slopes], state.adam, arrays)
    new = optax.apply_updates(arrays, updates), OptimizerState(moments, bound)
    stepped, state = where_finite(sound & finite, new, (arrays, state))
    return _as_tree(stepped, params), state, norm, finite
