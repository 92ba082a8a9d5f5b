"""The device decides the formulation, in one place, and all formulations agree."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.nn.helpers import DEVICES, random_norm
from twister_jax import nn as package
from twister_jax import runtime
from twister_jax.nn.kernels import bias_silu, conv2d, conv2d_transpose, few_products, norm_silu
from twister_jax.nn.layers import NormedLinear

IMAGE, KERNEL = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 5))


def convolve(function, epilogue):
    return lambda x: function(x, KERNEL, stride=2, padding=1, epilogue=epilogue)


OPERATIONS = {
    "norm_silu": lambda x: norm_silu(random_norm(3))(x),
    "bias_silu": lambda x: bias_silu(jnp.ones(3))(x),
    "normed_linear": lambda x: NormedLinear(3, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))(x),
    "conv2d": lambda x: convolve(conv2d, None)(x),
    "conv2d and norm": lambda x: convolve(conv2d, norm_silu(random_norm(5)))(x),
    "conv2d_transpose and bias": lambda x: convolve(conv2d_transpose, bias_silu(jnp.ones(5)))(x),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
def test_gradients_written_out_are_for_a_cpu_alone(operation, device):
    with runtime.tracing_for(device):
        program = str(jax.make_jaxpr(lambda x: operation(x))(IMAGE))
    written_out = re.findall(r"custom_vjp_call\[\s*name=(\w+)", program)
    assert len(written_out) == program.count("custom_vjp_call")
    # Of a transposed convolution the plain form has them too, but for what follows it.
    assert bool({*written_out} - {"_plain_transpose"}) == (device == "cpu")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_few_products_are_a_product_summed_in_float32(device, dtype):
    rng = np.random.default_rng(0)
    position, by_slot = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((7, 4, 16), (4, 5, 16)))
    weight = rng.normal(size=(7, 4, 5)).astype(np.float32)

    def loss(position, by_slot):
        scores = few_products("nhd,hsd->nhs", position, by_slot)
        return jnp.sum(weight * scores), scores

    with runtime.tracing_for(device):
        gradients, scores = jax.grad(loss, argnums=(0, 1), has_aux=True)(position, by_slot)
    assert scores.dtype == jnp.float32
    wide = [np.asarray(x, np.float64) for x in (position, by_slot)]
    np.testing.assert_allclose(scores, np.einsum("nhd,hsd->nhs", *wide), rtol=1e-4, atol=1e-4)
    exact = np.einsum("nhs,hsd->nhd", weight, wide[1]), np.einsum("nhs,nhd->hsd", weight, wide[0])
    tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
    for ours, each in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), each, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nhqs,hqks->nhqk", ((5, 2, 3, 8), (2, 3, 6, 8))),
        ("nhqs,nhks->nhqk", ((5, 2, 3, 8), (5, 2, 6, 8))),
        ("bhqk,bhks->bhqs", ((5, 2, 3, 6), (5, 2, 6, 8))),
        ("ab,cb->ca", ((3, 4), (5, 4))),
    ],
)
def test_few_products_are_any_einsum(equation, shapes):
    factors = [np.random.default_rng(n).normal(size=shape) for n, shape in enumerate(shapes)]
    with runtime.tracing_for("gpu"):
        found = few_products(equation, *(jnp.asarray(factor, jnp.float32) for factor in factors))
    np.testing.assert_allclose(found, np.einsum(equation, *factors), rtol=1e-4, atol=1e-5)


def test_only_the_kernels_ask_for_the_device():
    asks = re.compile(r"default_backend|\bruntime\b|\.platform\b")
    files = Path(package.__path__[0]).glob("*.py")
    assert [path.name for path in files if asks.search(path.read_text())] == ["kernels.py"]
