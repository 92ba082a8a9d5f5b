"""Draws are those of `jax.random`, and initialisers those of Flax, number for number."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.conftest import jit_as_a_run
from twister_jax import randomness
from twister_jax.agents.twm.mlp import he_uniform, lecun_uniform
from twister_jax.nn.layers import logits_init, trunk_init

KEY = jax.random.key(3)


def assert_same_numbers(ours, published):
    drawn, expected = (jit_as_a_run(function)(KEY) for function in (ours, published))
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("shape", [(), (2, 1, 3)])
def test_flat_draws_are_the_same_numbers(shape):
    assert_same_numbers(
        lambda key: randomness.uniform(key, shape, -2.0, 3.0),
        lambda key: jax.random.uniform(key, shape, float, -2, 3),
    )
    assert_same_numbers(
        lambda key: randomness.truncated_normal(key, shape),
        lambda key: jax.random.truncated_normal(key, -2, 2, shape),
    )


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
    assert_same_numbers(lambda key: ours(key, shape), lambda key: published(key, shape))
