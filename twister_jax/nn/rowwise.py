"""Functions of the last axis alone, with gradients written out: a layer can apply both a piece at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Params = tuple[Array, ...]


class Rowwise(NamedTuple):
    """A function of the last axis alone; called, it is differentiable like any other.

    A layer that computes its input piece by piece can call `backward` on each piece, while the gradient is
    still in cache; see `convolution.conv2d`.

    Attributes:
      value: (x, params) -> y, in the type of x.
      forward: (x, params) -> (y, kept), where a gradient is wanted. `kept` is a pytree of what `backward`
        wants besides x, its leading axes those of x.
      backward: (x, params, kept, dy) -> (dx, dparams), the latter summed over all leading axes.
      params: arrays that all rows share.
    """

    value: Callable[[Array, Params], Array]
    forward: Callable[[Array, Params], tuple[Array, Any]]
    backward: Callable[[Array, Params, Any, Array], tuple[Array, Params]]
    params: Params = ()

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """y."""
        return _apply(x, self.params, self._replace(params=()))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _apply(x, params, function):
    return function.value(x, params)


def _apply_forward(x, params, function):
    y, kept = function.forward(x, params)
    return y, (x, params, kept)


def _apply_backward(function, saved, dy):
    return function.backward(*saved, dy)


_apply.defvjp(_apply_forward, _apply_backward)


IDENTITY = Rowwise(lambda x, params: x, lambda x, params: (x, ()), lambda x, params, kept, dy: (dy, ()))


def bias_silu(bias: Float[Array, " features"]) -> Rowwise:
    """silu(x + bias), inside in float32."""
    return Rowwise(_bias_silu, _bias_silu_forward, _bias_silu_backward, (bias,))


def _bias_silu(x, params):
    (bias,) = params
    chex.assert_shape(bias, x.shape[-1:])
    return jax.nn.silu(x.astype(jnp.float32) + bias).astype(x.dtype)


def _bias_silu_forward(x, params):
    return _bias_silu(x, params), ()


def _bias_silu_backward(x, params, kept, dy):
    (bias,) = params
    dx = dy.astype(jnp.float32) * _silu_slope(x.astype(jnp.float32) + bias)
    return dx.astype(x.dtype), (jnp.sum(dx, tuple(range(x.ndim - 1))),)


def _silu_slope(x):
    gate = jax.nn.sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


def norm_silu(norm: nnx.LayerNorm) -> Rowwise:
    """silu(norm(x)), inside in float32, without keeping anything of x's size but x for the gradient.

    Left to itself, XLA's CPU backend writes out what enters and leaves every sum over features; where these
    are few, one sum of two things keeps both ways single passes over memory. The variance is then a
    difference of means; where no gradient is wanted, it is that of `layers.layer_norm`.
    """
    assert norm.scale is not None
    assert norm.bias is not None
    value = partial(_norm_silu, epsilon=norm.epsilon)
    forward = partial(_norm_silu_forward, epsilon=norm.epsilon)
    return Rowwise(value, forward, _norm_silu_backward, (norm.scale[...], norm.bias[...]))


def _norm_silu(x, params, epsilon):
    scale, bias = params
    chex.assert_shape([scale, bias], x.shape[-1:])
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    root = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + epsilon)
    return jax.nn.silu(centred * (root * scale) + bias).astype(x.dtype)


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
    """Means over the last axis, which stays with size 1, of two arrays.

    Over a short axis in one reduction; over a long one in two, which XLA's CPU backend vectorises.
    """
    if a.shape[-1] >= _LONG_AXIS:
        return jnp.mean(a, -1, keepdims=True), jnp.mean(b, -1, keepdims=True)
    zero = jnp.zeros((), a.dtype)
    sums = jax.lax.reduce(
        (a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), dimensions=(a.ndim - 1,)
    )
    return sums[0][..., None] / a.shape[-1], sums[1][..., None] / a.shape[-1]
