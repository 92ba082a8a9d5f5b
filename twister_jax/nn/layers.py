"""The small parts that networks consist of: initialisers, linear layers, norms and heads."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twister_jax.nn.kernels import norm_silu, product, variance_of_squares
from twister_jax.randomness import truncated_normal, uniform

Initializer = Callable[..., Array]
Network = TypeVar("Network", bound=nnx.Module)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a kernel: its last two axes, times the pixels that it covers."""
    pixels = math.prod(shape[:-2])
    return pixels * shape[-2], pixels * shape[-1]


def scaled_uniform(scale: float, fan: Callable[[int, int], float]) -> Initializer:
    """Uniform with the variance scale / fan(inputs, outputs), as `jax.nn.initializers.variance_scaling`."""

    def init(key, shape, dtype=jnp.float32):
        variance = jnp.float32(scale / fan(*_fans(shape)))
        return (uniform(key, shape, -1.0) * jnp.sqrt(3 * variance)).astype(dtype)

    return init


def trunk_init(key, shape, dtype=jnp.float32):
    """Normal truncated at two standard deviations, sigma = sqrt(2 / (fan_in + fan_out)) / 0.8796."""
    sigma = jnp.sqrt(jnp.float32(2.0 / sum(_fans(shape)))) / jnp.float32(0.87962566103423978)
    return (truncated_normal(key, shape) * sigma).astype(dtype)


logits_init = scaled_uniform(2.0, lambda inputs, outputs: inputs + outputs)
"""Xavier's: uniform in ±sqrt(6 / (fan_in + fan_out))."""


def uniform_fan_in(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in), for weights and biases alike."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return uniform(key, shape, -bound, bound).astype(dtype)

    return init


def add_bias(x: Array, bias: Array) -> Array:
    """x + bias in the type of x, with the sum and the bias's gradient taken in float32.

    The gradient is a sum over every row and pixel: in bfloat16 it stops growing after a few hundred of them.
    """
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


class Linear(nnx.Linear):
    """`nnx.Linear` with products in `dtype` and the bias added by `add_bias`."""

    def __call__(self, inputs: Float[Array, "*batch inputs"], out_sharding=None) -> Array:
        """Returns [*batch, outputs] in `dtype`."""
        assert out_sharding is None, "not supported"
        y = product(inputs.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


def cast_kernels(network: Network) -> Network:
    """A copy of the network with the kernels of its linear layers already in the type of their products.

    For use inside a loop, where XLA would otherwise cast them in every iteration.
    """
    network = nnx.clone(network)
    for _, layer in nnx.iter_modules(network):
        if isinstance(layer, Linear):
            layer.kernel = nnx.Param(layer.kernel[...].astype(layer.dtype))
    return network


def pytorch_linear(features_in: int, features_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    """A linear layer whose weight and bias start uniform in ±1/sqrt(fan_in)."""
    init = uniform_fan_in(features_in)
    return Linear(features_in, features_out, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs)


def layer_norm(features: int, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation; statistics are always float32, the result has `dtype`."""
    fast = variance_of_squares(dtype)
    return nnx.LayerNorm(features, epsilon=epsilon, use_fast_variance=fast, dtype=dtype, rngs=rngs)


class NormedLinear(nnx.Module):
    """Linear without bias, then LayerNorm (eps 1e-3), then SiLU unless `activate` is False."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        activate: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.linear = Linear(
            features_in, features_out, use_bias=False, kernel_init=trunk_init, dtype=dtype, rngs=rngs
        )
        self.norm = layer_norm(features_out, 1e-3, dtype=dtype, rngs=rngs)
        self.activate = activate

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        x = self.linear(x)
        return norm_silu(self.norm)(x) if self.activate else self.norm(x)


class Head(nnx.Module):
    """Two normed layers and a linear readout: the heads for reward, continuation, policy and value.

    Returns float32 [*batch, outputs].
    """

    def __init__(
        self,
        features_in: int,
        hidden_size: int,
        outputs: int,
        *,
        output_init: Initializer,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.trunk = nnx.List(
            [
                NormedLinear(features_in, hidden_size, dtype=dtype, rngs=rngs),
                NormedLinear(hidden_size, hidden_size, dtype=dtype, rngs=rngs),
            ]
        )
        self.output = Linear(hidden_size, outputs, kernel_init=output_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch outputs"]:
        for layer in self.trunk:
            x = layer(x)
        return self.output(x).astype(jnp.float32)
