"""What several tests of layers share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from twister_jax.nn.layers import layer_norm

DEVICES = ("cpu", "gpu", "tpu")
"""Kinds of device to trace for: the CPU's formulations, and the plain ones."""


def random_norm(features, dtype=jnp.float32, seed=0):
    """A LayerNorm with epsilon 1e-3, of random scale and bias."""
    norm = layer_norm(features, 1e-3, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    norm.scale[...] = jnp.asarray(rng.normal(1.0, 0.3, features), jnp.float32)
    norm.bias[...] = jnp.asarray(rng.normal(0.0, 0.3, features), jnp.float32)
    return norm


def value_and_gradients(function, module, x, weight):
    """y = function(module, x), and the gradients of sum(weight y) in the module's parameters and in x."""
    graph, params = nnx.split(module)

    def loss(params, x):
        y = function(nnx.merge(graph, params), x)
        return jnp.sum(y.astype(jnp.float32) * weight), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return y, gradients
