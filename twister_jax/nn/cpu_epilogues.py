"""Epilogues for XLA's CPU backend: gradients written out, so that a layer can apply both piece by piece.

A convolution calls `backward` on each chunk while that is still in cache (see `cpu_convolutions`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Params = tuple[Array, ...]


class CpuEpilogue(NamedTuple):
    """A function of the last axis with its gradient.

    Attributes:
      value: (x, params) -> y, in the type of x.
      forward: (x, params) -> (y, kept), where a gradient is wanted. `kept` is a pytree of what `backward`
        needs besides x, its leading axes those of x.
      backward: (x, params, kept, dy) -> (dx, dparams), the latter summed over all leading axes.
    """

    value: Callable[[Array, Params], Array]
    forward: Callable[[Array, Params], tuple[Array, Any]]
    backward: Callable[[Array, Params, Any, Array], tuple[Array, Params]]


IDENTITY = CpuEpilogue(lambda x, params: x, lambda x, params: (x, ()), lambda x, params, kept, dy: (dy, ()))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def apply(
    x: Float[Array, "*batch features"], params: Params, epilogue: CpuEpilogue
) -> Float[Array, "*batch features"]:
    """The epilogue of x, differentiable in x and in the parameters."""
    return epilogue.value(x, params)


def _apply_forward(x, params, epilogue):
    y, kept = epilogue.forward(x, params)
    return y, (x, params, kept)


def _apply_backward(epilogue, saved, dy):
    return epilogue.backward(*saved, dy)


apply.defvjp(_apply_forward, _apply_backward)


def bias_silu(value: Callable[[Array, Params], Array]) -> CpuEpilogue:
    """silu(x + bias), which `value` computes, with its gradient."""
    return CpuEpilogue(value, lambda x, params: (value(x, params), ()), _bias_silu_backward)


def _bias_silu_backward(x, params, kept, dy):
    (bias,) = params
    dx = dy.astype(jnp.float32) * _silu_slope(x.astype(jnp.float32) + bias)
    return dx.astype(x.dtype), (jnp.sum(dx, tuple(range(x.ndim - 1))),)


def _silu_slope(x):
    gate = jax.nn.sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


def norm_silu(value: Callable[[Array, Params], Array], epsilon: float) -> CpuEpilogue:
    """silu(LayerNorm(x)), which `value` computes; for its gradient, nothing of the size of x is kept but x.

    Left to itself, XLA's CPU backend writes out what enters and leaves every sum over features. Where these
    are few, taking two sums in one reduction keeps forward and backward single passes over memory. The
    variance is then a difference of means; without a gradient it is what `value` makes of it.
    """
    return CpuEpilogue(value, partial(_norm_silu_forward, epsilon=epsilon), _norm_silu_backward)


def _norm_silu_forward(x, params, epsilon):
    scale, bias = params
    chex.assert_shape([scale, bias], x.shape[-1:])
    wide = x.astype(jnp.float32)
    mean, mean_square = _feature_means(wide, wide * wide)
    root = jax.lax.rsqrt(jnp.maximum(0.0, mean_square - mean * mean) + epsilon)
    y = jax.nn.silu((wide - mean) * (root * scale) + bias)
    return y.astype(x.dtype), (mean, root)


def _norm_silu_backward(x, params, kept, dy):
    scale, bias = params
    mean, root = kept
    unit = (x.astype(jnp.float32) - mean) * root
    normed = unit * scale + bias
    dnormed = dy.astype(jnp.float32) * _silu_slope(normed)
    dunit = dnormed * scale
    along_one, along_unit = _feature_means(dunit, dunit * unit)
    dx = root * (dunit - along_one - unit * along_unit)
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (jnp.sum(dnormed * unit, rows), jnp.sum(dnormed, rows))


_LONG_AXIS = 256


def _feature_means(a: Array, b: Array) -> tuple[Array, Array]:
    """Means of two arrays over the last axis, which stays with size 1.

    A short axis is reduced once for both; a long one twice, which XLA's CPU backend vectorises.
    """
    if a.shape[-1] >= _LONG_AXIS:
        return jnp.mean(a, -1, keepdims=True), jnp.mean(b, -1, keepdims=True)
    zero = jnp.zeros((), a.dtype)
    sums = jax.lax.reduce(
        (a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), dimensions=(a.ndim - 1,)
    )
    return sums[0][..., None] / a.shape[-1], sums[1][..., None] / a.shape[-1]
