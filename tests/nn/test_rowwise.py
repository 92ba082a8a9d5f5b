"""Norm or bias and activation in one, against the plain compositions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from twister_jax.nn.layers import layer_norm
from twister_jax.nn.rowwise import IDENTITY, bias_silu, norm_silu


def make(features, epsilon=1e-3, dtype=jnp.float32, seed=0):
    norm = layer_norm(features, epsilon, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    norm.scale[...] = jnp.asarray(rng.normal(1.0, 0.3, features), jnp.float32)
    norm.bias[...] = jnp.asarray(rng.normal(0.0, 0.3, features), jnp.float32)
    return norm


def plain(norm, x):
    return jax.nn.silu(norm(x))


def in_one(norm, x):
    return norm_silu(norm)(x)


def value_and_gradients(function, norm, x, weight):
    graph, params = nnx.split(norm)

    def loss(params, x):
        y = function(nnx.merge(graph, params), x)
        return jnp.sum(y.astype(jnp.float32) * weight), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return y, gradients


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from([(1,), (7,), (2, 3), (2, 1, 3, 2)]),
    features=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 300])),
    offset=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_equals_silu_of_norm_with_all_gradients(shape, features, offset, seed):
    rng = np.random.default_rng(seed)
    norm = make(features, seed=seed)
    x = jnp.asarray(rng.normal(offset, 1.0, (*shape, features)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(*shape, features)), jnp.float32)
    np.testing.assert_allclose(in_one(norm, x), plain(norm, x), rtol=2e-4, atol=2e-4)  # no gradient wanted
    got = value_and_gradients(in_one, norm, x, weight)
    chex.assert_trees_all_close(got, value_and_gradients(plain, norm, x, weight), rtol=2e-4, atol=2e-4)


def test_bias_and_silu_in_one_with_both_gradients():
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=6), jnp.float32)

    def run(function):
        def loss(x, bias):
            return jnp.sum(weight * function(x, bias))

        return jax.value_and_grad(loss, argnums=(0, 1))(x, bias)

    plain = run(lambda x, bias: jax.nn.silu(x + bias))
    chex.assert_trees_all_close(run(lambda x, bias: bias_silu(bias)(x)), plain, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(run(lambda x, bias: IDENTITY(x)), run(lambda x, bias: x))


def test_a_constant_row_has_finite_gradients():
    """Rounding can make the variance negative: the root of epsilon is the least there is."""
    x = jnp.full((3, 8), 300.1)
    y, gradients = value_and_gradients(in_one, make(8), x, jnp.ones((3, 8)))
    chex.assert_tree_all_finite((y, gradients))


def test_without_a_gradient_the_variance_survives_a_large_mean():
    norm, rng = make(64), np.random.default_rng(0)
    x = rng.normal(3_000.0, 0.1, (4, 64)).astype(np.float32)
    centred = x - x.astype(np.float64).mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
    exact = jax.nn.silu(jnp.asarray(unit * norm.scale[...] + norm.bias[...], jnp.float32))
    np.testing.assert_allclose(in_one(norm, jnp.asarray(x)), exact, atol=0.01)


@pytest.mark.parametrize("function", [in_one, plain])
def test_bfloat16_is_computed_in_float32_inside(function):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2.0, 1.0, (5, 64)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
    y, gradients = value_and_gradients(function, make(64, dtype=jnp.bfloat16), x, weight)
    without_gradient = function(make(64, dtype=jnp.bfloat16), x)
    exact, exact_gradients = value_and_gradients(plain, make(64), x.astype(jnp.float32), weight)
    for got in (y, without_gradient):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2e-2, atol=1e-2)
    assert gradients[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(gradients[1].astype(jnp.float32), exact_gradients[1], rtol=3e-2, atol=3e-2)
