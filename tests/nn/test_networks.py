"""Fresh parameters: which keys they are drawn with, and whose buffers they lie in."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from twister_jax.agents import make_agent
from twister_jax.config import make_config
from twister_jax.envs import make_vector_env
from twister_jax.nn.layers import Head, logits_init
from twister_jax.nn.networks import MOST_KEYS, Keys, Networks
from twister_jax.training.state import OnDevice


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


@pytest.mark.parametrize("name", ["twister", "twm"])
def test_every_array_of_a_new_run_has_a_buffer_of_its_own(name):
    """Updates are given these buffers to reuse, which the device refuses for two arrays in one."""
    config = make_config(name, "debug", game="Catch")
    env = make_vector_env(config.game, config.env, 2, 0)
    state = OnDevice.begin(make_agent(config, env.spec), 0, env.reset())
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
    assert len(set(places)) == len(places)
