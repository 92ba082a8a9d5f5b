"""The small parts that networks are made of: initialisers, norms and multi-layer perceptrons."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Initializer = Callable[..., Array]

trunk_init: Initializer = nnx.initializers.variance_scaling(1.0, "fan_avg", "truncated_normal")
"""Normal truncated at two standard deviations, sigma = sqrt(2 / (fan_in + fan_out)) / 0.8796."""

logits_init: Initializer = nnx.initializers.xavier_uniform()


def uniform_fan_in(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in), for weights and biases alike."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def pytorch_linear(features_in: int, features_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer whose weight and bias start uniform in ±1/sqrt(fan_in)."""
    init = uniform_fan_in(features_in)
    return nnx.Linear(features_in, features_out, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs)


def layer_norm(features: int, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation; statistics are always float32, the result has `dtype`."""
    return nnx.LayerNorm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)


class NormedLinear(nnx.Module):
    """Linear without bias, then LayerNorm (eps 1e-3), then the activation if any."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        activation: Callable[[Array], Array] | None = jax.nn.silu,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.linear = nnx.Linear(
            features_in, features_out, use_bias=False, kernel_init=trunk_init, dtype=dtype, rngs=rngs
        )
        self.norm = layer_norm(features_out, 1e-3, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        x = self.norm(self.linear(x))
        return x if self.activation is None else self.activation(x)


class Head(nnx.Module):
    """Trunk of two normed layers and a linear read-out: reward, continue, policy and value have this shape.

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
        self.output = nnx.Linear(hidden_size, outputs, kernel_init=output_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch outputs"]:
        for layer in self.trunk:
            x = layer(x)
        return self.output(x).astype(jnp.float32)
