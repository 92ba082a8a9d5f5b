import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from tests.training.dummy_agent import make_agent, make_test_config
from twister_jax.envs import make_vector_env
from twister_jax.envs.base import EnvSpec, EnvStep, Episode
from twister_jax.errors import UserError
from twister_jax.randomness import Purpose, key_for
from twister_jax.training.evaluation import allotment, evaluate_directory, play, summarize
from twister_jax.training.loop import train


@pytest.mark.parametrize(
    ("episodes", "envs", "games"),
    [(100, 8, [13] * 4 + [12] * 4), (3, 8, [1, 1, 1]), (1, 1, [1]), (5, 2, [3, 2])],
)
def test_allotment(episodes, envs, games):
    assert allotment(episodes, envs) == games


class Uneven:
    """Environment i plays games of i + 1 steps; a game's score tells which game of which it was."""

    spec = EnvSpec(image_shape=(8, 8, 3), num_actions=2)

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.steps = np.zeros(num_envs, int)
        self.games = np.zeros(num_envs, int)
        self.retired = np.zeros(num_envs, bool)

    def _step(self, first, ended):
        episodes = tuple(
            Episode(int(i), 100.0 * i + self.games[i], i + 1, False) for i in np.flatnonzero(ended)
        )
        self.games[ended] += 1
        zeros = np.zeros(self.num_envs, np.float32)
        return EnvStep(np.zeros((self.num_envs, 8, 8, 3), np.uint8), zeros, ended, first, episodes)

    def reset(self):
        return self._step(np.ones(self.num_envs, bool), np.zeros(self.num_envs, bool))

    def step(self, actions):
        assert actions.shape == (self.num_envs,)
        first = self.steps > np.arange(self.num_envs)
        self.steps = np.where(first, 0, self.steps + 1)
        return self._step(first, (self.steps > np.arange(self.num_envs)) & ~self.retired)

    def retire(self, env):
        self.retired[env] = True


def test_short_games_are_not_favoured():
    env = Uneven(3)
    agent = make_agent(None, env.spec)
    state = jax.jit(agent.init)(key_for(0, Purpose.INIT))
    played = play(agent, state, env, [2, 2, 1], seed=0)
    assert [episode.score for episode in played] == [0, 1, 100, 101, 200]
    assert env.retired.all(), "an environment that has played its games costs no more time"


def test_the_record_of_a_real_game():
    config = make_test_config("unused", game="Breakout")
    config = dataclasses.replace(config, env=dataclasses.replace(config.env, time_limit_frames=400))
    env = make_vector_env("Breakout", config.env, 2, 0)
    agent = make_agent(config, env.spec)
    state = jax.jit(agent.init)(key_for(0, Purpose.INIT))
    episodes = play(agent, state, env, [1, 1], seed=0)
    record = summarize(config, episodes, {"env_steps": 5, "updates": 3})
    assert record["episodes"] == 2
    assert record["human_normalized"] == pytest.approx((record["mean"] - 1.7) / (30.5 - 1.7))
    protocol = record["protocol"]
    assert (protocol["random_score"], protocol["human_score"]) == (1.7, 30.5)
    assert protocol["training_frames"] == 20
    assert protocol["sticky_actions"] == 0
    assert protocol["versions"]["ale-py"]
    json.dumps(record, allow_nan=False)


def test_evaluating_a_directory(tmp_path, capsys):
    config = make_test_config(tmp_path, 40)
    train(config, make_agent, make_vector_env)
    first = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluate_directory(config, make_agent, make_vector_env) == 0
    again = json.loads((tmp_path / "evaluation.json").read_text())
    first["protocol"].pop("commit"), again["protocol"].pop("commit")  # somebody may be working on the tree
    assert again == first
    with pytest.raises(UserError, match="another agent or model size"):
        evaluate_directory(config, partial(_larger, make_agent), make_vector_env)
    elsewhere = dataclasses.replace(config, logdir=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate_directory(elsewhere, make_agent, make_vector_env)


def _larger(make, config, spec):
    agent = make(config, spec)
    return dataclasses.replace(agent, init=lambda key: {**agent.init(key), "more": key_for(0, Purpose.INIT)})
