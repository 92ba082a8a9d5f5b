import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import third
from twister_jax.agents import make_agent
from twister_jax.envs import make_vector_env
from twister_jax.envs.base import EnvSpec, EnvStep, Episode
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.randomness import Purpose, key_for
from twister_jax.training.evaluation import evaluate_directory, games_per_env, play, summarize
from twister_jax.training.load import load_run
from twister_jax.training.train import train

third.register()


def config_of(logdir, steps=40, game="Catch", **overrides):
    settings = {"logdir": str(logdir), "precision": "float32", "train.steps": steps}
    return make_config(third.AGENT, "debug", game, **settings, **overrides)


@pytest.mark.parametrize(
    ("episodes", "envs", "games"),
    [(100, 8, [13] * 4 + [12] * 4), (3, 8, [1, 1, 1]), (1, 1, [1]), (5, 2, [3, 2])],
)
def test_games_per_env(episodes, envs, games):
    assert games_per_env(episodes, envs) == games


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

    def get_state(self):
        raise NotImplementedError

    def set_state(self, state):
        raise NotImplementedError

    def close(self):
        pass


def test_short_games_are_not_favoured():
    env = Uneven(3)
    agent = make_agent(config_of("unused"), env.spec)
    state = jax.jit(agent.init)(key_for(0, Purpose.INIT))
    played = play(agent, state, env, [2, 2, 1], seed=0)
    assert [episode.score for episode in played] == [0, 1, 100, 101, 200]
    assert env.retired.all(), "an environment that has played its games costs no more time"


def test_the_record_of_a_real_game():
    config = config_of("unused", game="Breakout", **{"env.evaluation_time_limit_frames": 400})
    env = make_vector_env("Breakout", config.env, 2, 0, evaluation=True)
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


def test_games_are_played_with_the_policy_of_evaluation():
    """Training's policy is sampled; that of evaluation may be the mode."""
    env = Uneven(2)
    agent = make_agent(config_of("unused"), env.spec)
    calls = []

    def act_evaluate(state, carry, observation, key):
        calls.append(observation.image.shape)
        return jnp.eye(2), carry

    def act(*_):
        raise AssertionError("games were played with the policy of training")

    agent = dataclasses.replace(agent, act=act, act_evaluate=act_evaluate)
    play(agent, jax.jit(agent.init)(jax.random.key(0)), env, [1, 1], seed=0)
    assert calls


def test_every_action_of_an_evaluation_has_a_key_of_its_own():
    env = Uneven(2)
    agent = make_agent(config_of("unused"), env.spec)
    seen = []

    def act_evaluate(state, carry, observation, key):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return jnp.eye(2), carry

    agent = dataclasses.replace(agent, act_evaluate=act_evaluate)
    play(agent, jax.jit(agent.init)(jax.random.key(0)), env, [3, 3], seed=0)
    jax.effects_barrier()
    assert len(seen) > 5
    assert len(set(seen)) == len(seen)


def test_evaluating_a_directory(tmp_path):
    train(config_of(tmp_path))
    first = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluate_directory(str(tmp_path), None, {}) == 0
    again = json.loads((tmp_path / "evaluation.json").read_text())
    first["protocol"].pop("commit"), again["protocol"].pop("commit")  # somebody may be working on the tree
    assert again == first
    assert evaluate_directory(str(tmp_path), None, {"evaluation.episodes": 2}) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["episodes"] == 2


def test_loading_a_run(tmp_path):
    """One function for all who read a run; no environment is made."""
    train(config_of(tmp_path, 60))
    loaded = load_run(tmp_path)
    assert loaded.config.train.steps == 60
    assert (loaded.spec.num_actions, loaded.spec.action_names) == (3, ("LEFT", "STAY", "RIGHT"))
    assert loaded.counters.env_steps == 60
    assert load_run(tmp_path, step=50).counters.env_steps == 50
    with pytest.raises(UserError, match="holds no checkpoint of step 17"):
        load_run(tmp_path, step=17)
    with pytest.raises(UserError, match="is not a run directory"):
        load_run(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="another agent or model size"):
        load_run(tmp_path, make_agent=_larger)


def _larger(config, spec):
    agent = make_agent(config, spec)
    return dataclasses.replace(agent, init=lambda key: {**agent.init(key), "more": key_for(0, Purpose.INIT)})
