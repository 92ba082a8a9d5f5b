"""What a new run keeps on the device, and what is believed of a stored one."""

import dataclasses
import json

import jax
import pytest

from twister_jax.agents import make_agent
from twister_jax.envs import make_vector_env
from twister_jax.envs.base import EnvSpec
from twister_jax.errors import UserError
from twister_jax.parallel import Devices
from twister_jax.presets import make_config
from twister_jax.training.load import spec_of
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


STORED = json.loads(json.dumps(dataclasses.asdict(EnvSpec((64, 64, 3), 3, True, ("stay", "left", "right")))))


@pytest.mark.parametrize(
    "changes",
    [
        {"image_shape": [64, 64]},
        {"image_shape": [64, 64, 0]},
        {"image_shape": [64, 64, 3.0]},
        {"image_shape": [10**5, 10**5, 3]},
        {"image_shape": 64},
        {"num_actions": -1},
        {"num_actions": True},
        {"num_actions": 10**9},
        {"num_actions": "3"},
        {"discrete": 1},
        {"action_names": ["\x1b[2J"]},
        {"action_names": [3]},
        {"action_names": ["a" * 1_000]},
        {"action_names": None},
    ],
    ids=str,
)
def test_environments_that_cannot_be_are_not_believed(changes):
    """Nothing is allocated by such numbers, and no such name is printed."""
    assert spec_of(STORED, "run") == EnvSpec((64, 64, 3), 3, True, ("stay", "left", "right"))
    with pytest.raises(UserError, match="run does not say what its environments were like"):
        spec_of(STORED | changes, "run")
    with pytest.raises(UserError, match="does not say"):
        spec_of({name: value for name, value in STORED.items() if name not in changes}, "run")


@pytest.mark.parametrize("stored", [None, [], "spec", 5])
def test_what_is_no_description_of_environments_is_refused(stored):
    with pytest.raises(UserError, match="does not say"):
        spec_of(stored, "run")
