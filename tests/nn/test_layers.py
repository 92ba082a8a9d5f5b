"""The linear layer against Flax's, kernels cast ahead of a loop, and the norm's variance."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.nn.helpers import value_and_gradients
from twister_jax.nn.layers import Head, Linear, cast_kernels, layer_norm, logits_init
from twister_jax.runtime import tracing_for


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


def test_casting_kernels_changes_no_result_and_not_the_network():
    kinds = {"output_init": logits_init, "dtype": jnp.bfloat16}
    head = Head(6, 8, 4, **kinds, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    before = nnx.split(head)[1]
    ahead = cast_kernels(head)
    np.testing.assert_array_equal(ahead(x), head(x))
    for layer in (ahead.output, ahead.trunk[0].linear):
        assert layer.kernel[...].dtype == jnp.bfloat16
    assert ahead.trunk[0].norm.scale[...].dtype == jnp.float32
    chex.assert_trees_all_equal(nnx.split(head)[1], before)
    chex.assert_trees_all_equal_dtypes(nnx.split(head)[1], before)


def test_a_loop_casts_no_kernel_that_was_cast_ahead():
    head = Head(6, 8, 6, output_init=logits_init, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(head)

    def rolled(params, x, ahead):
        network = nnx.merge(graph, params)
        network = cast_kernels(network) if ahead else network
        return jax.lax.scan(lambda x, _: (network(x), None), x, None, length=3)[0]

    def casts_inside(ahead):
        loop = jax.make_jaxpr(rolled, static_argnums=2)(params, jnp.ones((2, 6)), ahead).eqns[-1]
        inside = loop.params["jaxpr"].eqns
        assert loop.primitive.name == "scan"
        kernels = {param.aval.shape for param in loop.invars if param.aval.ndim == 2} - {(2, 6)}
        casts = [eqn for eqn in inside if eqn.primitive.name == "convert_element_type"]
        return [eqn for eqn in casts if eqn.invars[0].aval.shape in kernels]

    assert len(casts_inside(ahead=False)) == 3
    assert casts_inside(ahead=True) == []


def test_the_variance_survives_a_large_mean():
    """E[x²] − E[x]² would leave nothing of it in float32."""
    norm = layer_norm(64, 1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(3_000.0, 0.1, (4, 64)).astype(np.float32)
    exact = (x - x.astype(np.float64).mean(-1, keepdims=True)) / x.astype(np.float64).std(-1, keepdims=True)
    np.testing.assert_allclose(norm(jnp.asarray(x)), exact, atol=0.01)


def test_on_a_tpu_the_norm_of_bfloat16_is_that_of_other_devices():
    x = jnp.asarray(np.random.default_rng(0).normal(30.0, 1.0, (4, 64)), jnp.bfloat16)

    def normed(device):
        with tracing_for(device):
            return layer_norm(64, 1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x).astype(jnp.float32)

    np.testing.assert_allclose(normed("tpu"), normed("gpu"), rtol=1e-2, atol=5e-3)
