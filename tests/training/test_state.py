"""What a new run keeps on the device."""

import jax
import pytest

from twister_jax.agents import make_agent
from twister_jax.envs import make_vector_env
from twister_jax.parallel import Devices
from twister_jax.presets import make_config
from twister_jax.training.state import RunState


@pytest.mark.parametrize("name", ["twister", "twm"])
def test_every_array_of_a_new_run_has_a_buffer_of_its_own(name):
    """Updates are given these buffers to reuse, which the device refuses for two arrays in one."""
    config = make_config(name, "debug", game="Catch")
    env = make_vector_env(config.game, config.env, 2, 0)
    agent, one = make_agent(config, env.spec), Devices.choose(1, 2)
    state = RunState.begin(agent, env.spec, 2, 0, env.reset(), one)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
    assert len(set(places)) == len(places)
