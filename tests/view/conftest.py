"""A run of the third agent, trained for a moment, that all views look at."""

import dataclasses

import pytest

from tests import third
from twister_jax.presets import make_config
from twister_jax.training.train import train
from twister_jax.view.policy import load

third.register()


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Its directory; views may add to it."""
    directory = tmp_path_factory.mktemp("runs") / "catch"
    settings = {"logdir": str(directory), "precision": "float32", "train.steps": 60}
    settings["train.report_every"] = 10
    assert train(make_config(third.AGENT, "debug", "Catch", **settings)) == 0
    return directory


@pytest.fixture(scope="session")
def policy(run):
    return load(run)


@pytest.fixture
def brief(policy):
    """The policy with three games to play."""
    config = policy.config
    evaluation = dataclasses.replace(config.evaluation, episodes=3, num_envs=2)
    return dataclasses.replace(policy, config=dataclasses.replace(config, evaluation=evaluation))
