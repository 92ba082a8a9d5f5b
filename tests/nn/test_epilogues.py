"""Norm or bias, then activation: the CPU's form and the plain one against the composition of layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nn.helpers import DEVICES, random_norm, value_and_gradients
from twister_jax import runtime
from twister_jax.nn.kernels import bias_silu, norm_silu


def composed(norm, x):
    return jax.nn.silu(norm(x))


def on(device):
    """`norm_silu` as it is computed on a kind of device."""

    def function(norm, x):
        with runtime.tracing_for(device):
            return norm_silu(norm)(x)

    return function


@settings(max_examples=10, deadline=None)
@given(
    shape=st.sampled_from([(1,), (7,), (2, 3), (2, 1, 3, 2)]),
    features=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 300])),
    offset=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_equals_silu_of_norm_with_all_gradients(shape, features, offset, seed):
    rng = np.random.default_rng(seed)
    graph, params = nnx.split(random_norm(features, seed=seed))
    x = jnp.asarray(rng.normal(offset, 1.0, (*shape, features)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(*shape, features)), jnp.float32)

    @jax.jit  # one program: compiling takes longest here
    def everything(params, x):
        norm = nnx.merge(graph, params)
        without_gradient = [on(device)(norm, x) for device in DEVICES]
        functions = [composed, *map(on, DEVICES)]
        return without_gradient, [value_and_gradients(each, norm, x, weight) for each in functions]

    without_gradient, (expected, *results) = everything(params, x)
    for value in without_gradient:
        np.testing.assert_allclose(value, expected[0], rtol=2e-4, atol=2e-4)
    for got in results:
        chex.assert_trees_all_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_silu_of_the_biased_with_both_gradients(device, dtype):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=(4, 3, 6)), dtype) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=6), jnp.float32)

    def run(function, x):
        def loss(x, bias):
            y = function(x, bias)
            return jnp.sum(weight * y.astype(jnp.float32)), y

        with runtime.tracing_for(device):
            gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, bias)
        return y, *gradients

    got = run(lambda x, bias: bias_silu(bias)(x), x)
    exact = run(lambda x, bias: jax.nn.silu(x + bias), x.astype(jnp.float32))
    assert [array.dtype for array in got] == [dtype, dtype, jnp.float32]
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for ours, each in zip(got, exact, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), each, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_a_constant_row_has_finite_gradients(device):
    """Rounding can make the variance negative; epsilon is the least that the root is taken of."""
    x = jnp.full((3, 8), 300.1)
    y, gradients = value_and_gradients(on(device), random_norm(8), x, jnp.ones((3, 8)))
    chex.assert_tree_all_finite((y, gradients))


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_gradient_the_variance_survives_a_large_mean(device):
    norm, rng = random_norm(64), np.random.default_rng(0)
    x = rng.normal(3_000.0, 0.1, (4, 64)).astype(np.float32)
    centred = x - x.astype(np.float64).mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
    exact = jax.nn.silu(jnp.asarray(unit * norm.scale[...] + norm.bias[...], jnp.float32))
    np.testing.assert_allclose(on(device)(norm, jnp.asarray(x)), exact, atol=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_the_variance_survives_what_rounding_leaves_of_it(device):
    """A mean of 100 deviations; numbers around it are then half a deviation apart."""
    norm, rng = random_norm(64, dtype=jnp.bfloat16), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(100.0, 1.0, (4, 64)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    unit = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + norm.epsilon)
    exact = jax.nn.silu(jnp.asarray(unit * norm.scale[...] + norm.bias[...], jnp.float32))
    np.testing.assert_allclose(on(device)(norm, x).astype(jnp.float32), exact, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("function", [*map(on, DEVICES), composed], ids=[*DEVICES, "composed"])
def test_bfloat16_is_computed_in_float32_inside(function):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2.0, 1.0, (5, 64)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
    y, gradients = value_and_gradients(function, random_norm(64, dtype=jnp.bfloat16), x, weight)
    without_gradient = function(random_norm(64, dtype=jnp.bfloat16), x)
    exact, exact_gradients = value_and_gradients(composed, random_norm(64), x.astype(jnp.float32), weight)
    for got in (y, without_gradient):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2e-2, atol=1e-2)
    assert gradients[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(gradients[1].astype(jnp.float32), exact_gradients[1], rtol=3e-2, atol=3e-2)
