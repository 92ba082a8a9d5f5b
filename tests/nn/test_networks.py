"""Fresh parameters, and the keys they are drawn with."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from twister_jax.nn.layers import Head, logits_init
from twister_jax.nn.networks import MOST_KEYS, Keys, Networks


def head(rngs):
    return Head(3, 4, 2, output_init=logits_init, dtype=jnp.float32, rngs=rngs)


def test_keys_are_those_of_rngs():
    key = jax.random.key(3)
    ours, theirs = (nnx.to_pure_dict(nnx.split(head(rngs))[1]) for rngs in (Keys(key), nnx.Rngs(key)))
    chex.assert_trees_all_equal(ours, theirs)


def test_networks_draw_independently():
    params = Networks({"one": head, "other": head}).init(jax.random.key(0))
    first, second = (params[name]["trunk"][0]["linear"]["kernel"] for name in ("one", "other"))
    assert not jnp.array_equal(first, second)


def test_a_network_of_too_many_parameters_is_refused():
    keys = Keys(jax.random.key(0))
    for _ in range(MOST_KEYS):
        keys.params()
    with pytest.raises(AssertionError, match="more parameters than there are keys"):
        keys.params()
