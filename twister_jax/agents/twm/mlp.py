"""The multi-layer perceptron that all of TWM's heads, embeddings and behaviour networks are."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twister_jax.nn.layers import Initializer, Linear, scaled_uniform

he_uniform: Initializer = scaled_uniform(2.0, lambda inputs, outputs: inputs)
"""Uniform in ±sqrt(6 / fan_in), before a SiLU."""

lecun_uniform: Initializer = scaled_uniform(1.0, lambda inputs, outputs: inputs)
"""Uniform in ±sqrt(3 / fan_in), where no activation follows."""


def _identity(x: Array) -> Array:
    return x


class Mlp(nnx.Module):
    """Linear layers with SiLU between them; `before` and `after` say whether it starts and ends with one."""

    def __init__(
        self,
        widths: Sequence[int],
        *,
        before: bool = False,
        after: bool = False,
        hidden_init: Initializer = he_uniform,
        output_init: Initializer = lecun_uniform,
        output_bias: float = 0.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.before = before
        self.after = after
        last = len(widths) - 2
        self.layers = nnx.List(
            [
                Linear(
                    features_in,
                    features_out,
                    kernel_init=output_init if index == last and not after else hidden_init,
                    bias_init=nnx.initializers.constant(output_bias if index == last else 0.0),
                    dtype=dtype,
                    rngs=rngs,
                )
                for index, (features_in, features_out) in enumerate(pairwise(widths))
            ]
        )

    def __call__(
        self, x: Float[Array, "*batch inputs"], dropout: Callable[[Array], Array] = _identity
    ) -> Float[Array, "*batch outputs"]:
        """`dropout` is applied to every hidden layer."""
        if self.before:
            x = jax.nn.silu(x)
        for layer in self.layers[:-1]:
            x = dropout(jax.nn.silu(layer(x)))
        x = self.layers[-1](x)
        return jax.nn.silu(x) if self.after else x.astype(jnp.float32)
