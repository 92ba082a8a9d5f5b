"""Draws are those of `jax.random`, and initialisers those of Flax, number for number."""

import jax
import numpy as np
import pytest
from flax import nnx

from twister_jax import randomness
from twister_jax.agents.twm.mlp import he_uniform, lecun_uniform
from twister_jax.nn.layers import logits_init, trunk_init

KEY = jax.random.key(3)


@pytest.mark.parametrize("shape", [(), (2, 1, 3)])
def test_flat_draws_are_the_same_numbers(shape):
    drawn, expected = randomness.uniform(KEY, shape, -2.0, 3.0), jax.random.uniform(KEY, shape, float, -2, 3)
    np.testing.assert_array_equal(drawn, expected)
    expected = jax.random.truncated_normal(KEY, -2, 2, shape)
    np.testing.assert_array_equal(randomness.truncated_normal(KEY, shape), expected)


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        (trunk_init, nnx.initializers.variance_scaling(1.0, "fan_avg", "truncated_normal")),
        (logits_init, nnx.initializers.xavier_uniform()),
        (he_uniform, nnx.initializers.variance_scaling(2.0, "fan_in", "uniform")),
        (lecun_uniform, nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")),
    ],
)
def test_initialisers_are_the_same_numbers(ours, published):
    shape = (4, 2, 3, 5)
    np.testing.assert_array_equal(ours(KEY, shape), published(KEY, shape))
