"""The linear layer against Flax's."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.nn.test_rowwise import value_and_gradients
from twister_jax.nn.layers import Linear


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_equals_flax_with_all_gradients(shape, use_bias):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*shape, 6)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(*shape, 4)), jnp.float32)
    random = nnx.initializers.normal(1.0)
    kinds = {"use_bias": use_bias, "kernel_init": random, "bias_init": random, "dtype": jnp.float32}

    def run(layer):
        return value_and_gradients(
            lambda layer, x: layer(x), layer(6, 4, **kinds, rngs=nnx.Rngs(0)), x, weight
        )

    chex.assert_trees_all_close(run(Linear), run(nnx.Linear), rtol=1e-5, atol=1e-5)
