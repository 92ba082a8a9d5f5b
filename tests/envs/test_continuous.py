"""Continuous actions through everything that lies between an agent and an environment."""

import jax
import numpy as np
import pytest

from twister_jax.envs.base import IMAGE_SIZE, EnvSpec, Episode, Step
from twister_jax.envs.probe import probe
from twister_jax.envs.vector import SerialVectorEnv
from twister_jax.replay import store
from twister_jax.replay.store import Transition

SPEC = EnvSpec((IMAGE_SIZE, IMAGE_SIZE, 3), num_actions=2, discrete=False, action_names=("right", "up"))
DISCRETE = EnvSpec((IMAGE_SIZE, IMAGE_SIZE, 3), num_actions=3)


class Point:
    """A point that the action moves; it should come to the middle within six steps."""

    spec = SPEC

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.left = 0  # steps of the episode
        self.at = np.zeros(2)
        self.taken = []

    def reset(self):
        self.left, self.at = 6, self.rng.uniform(-1, 1, 2)
        return Step(self.image(), 0.0, False, True, None)

    def step(self, action):
        if not self.left:
            return self.reset()
        assert action.shape == (2,)
        assert np.abs(action).max() <= 1
        self.taken.append(action)
        self.left -= 1
        self.at = np.clip(self.at + 0.5 * action, -1, 1)
        reward = -float(np.abs(self.at).sum())
        return Step(self.image(), reward, False, False, None if self.left else Episode(0, reward, 6, True))

    def get_state(self):
        return {"rng": self.rng.bit_generator.state, "left": self.left, "at": self.at.tolist()}

    def set_state(self, state):
        self.rng.bit_generator.state = state["rng"]
        self.left, self.at = state["left"], np.array(state["at"])

    def image(self):
        image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        row, column = ((self.at + 1) / 2 * (IMAGE_SIZE - 1)).astype(int)
        image[row, column] = 255
        return image


def make(num_envs=3, seed=0):
    return SerialVectorEnv(Point, num_envs, seed, {"game": "Point"})


def test_actions_reach_their_environments_as_they_are():
    env, rng = make(), np.random.default_rng(0)
    env.reset()
    given = [env.spec.random_actions(rng, 3) for _ in range(6)]
    steps = [env.step(actions) for actions in given]
    for index, each in enumerate(env._envs):
        np.testing.assert_array_equal(each.taken, np.stack(given)[:, index])
    assert (steps[0].image.shape, steps[0].reward.dtype) == ((3, 64, 64, 3), np.float32)
    assert [episode.env for episode in steps[-1].episodes] == [0, 1, 2]
    assert env.step(given[0]).is_first.all()


@pytest.mark.parametrize(
    "actions",
    [
        np.zeros((3, 3)),
        np.zeros((2, 2)),
        np.zeros(3),
        np.zeros((3, 2), int),
        np.full((3, 2), 1.001),
        np.full((3, 2), np.nan),
        np.full((3, 2), -np.inf),
        np.array([0, 1, 1]),
    ],
    ids=["wide", "few", "flat", "integers", "beyond one", "nan", "infinite", "indices"],
)
def test_impossible_actions_are_the_callers_error_and_cost_no_episode(actions, caplog):
    env = make()
    env.reset()
    with pytest.raises(ValueError, match="actions"):
        env.step(actions)
    assert not any(each.taken for each in env._envs)
    assert not env.step(np.ones((3, 2))).is_first.any()
    assert not caplog.records


def test_a_saved_state_goes_on_as_if_nothing_had_happened():
    env, other = make(seed=0), make(seed=9)
    rng = np.random.default_rng(1)
    actions = rng.uniform(-1, 1, (30, 3, 2))
    env.reset()
    for each in actions[:9]:
        env.step(each)
    other.set_state(env.get_state())
    for each in actions[9:]:
        ours, theirs = env.step(each), other.step(each)
        for x, y in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(x, y)
        assert ours.episodes == theirs.episodes


# ---- the probe -----------------------------------------------------------------------------------


def test_the_probe_moves_with_continuous_actions():
    env = Point()
    probe(env, "Point")
    taken = np.stack(env.taken)
    assert taken.dtype == np.float32
    assert len(np.unique(taken)) == taken.size
    assert taken.min() < -0.5
    assert taken.max() > 0.5


def test_the_probe_says_what_is_wrong():
    class Sudden(Point):
        """Starts anew without a step for it."""

        def step(self, action):
            step = super().step(action)
            return step._replace(image=self.reset().image) if step.episode else step

    with pytest.raises(RuntimeError, match="after an episode's end is not a reset step"):
        probe(Sudden(), "Point")


# ---- vectors and what environments take --------------------------------------------------------------


def test_what_environments_are_stepped_with():
    vectors = np.array([[0.5, -0.25], [3.0, -7.0], [np.inf, -np.inf]], np.float32)
    expected = np.array([[0.5, -0.25], [1.0, -1.0], [1.0, -1.0]], np.float32)
    taken = SPEC.to_env(vectors)
    np.testing.assert_array_equal(taken, expected)
    assert taken.dtype == np.float32
    make().step(taken)
    indices = DISCRETE.to_env(np.eye(3, dtype=np.float32)[[2, 0, 1]])
    assert indices.tolist() == [2, 0, 1]
    assert np.issubdtype(indices.dtype, np.integer)


def test_random_actions_are_uniform():
    rng = np.random.default_rng(0)
    values = SPEC.random_actions(rng, 20_000)
    assert (values.shape, values.dtype) == ((20_000, 2), np.float32)
    for column in np.sort(values, axis=0).T:
        assert np.abs(column - np.linspace(-1, 1, 20_000)).max() < 0.03
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.03
    choices = DISCRETE.random_actions(rng, 9_000)
    assert choices.dtype == np.float32
    np.testing.assert_array_equal(np.sort(choices, axis=1), np.tile([0, 0, 1], (9_000, 1)))
    assert np.abs(choices.sum(0) - 3_000).max() < 5 * np.sqrt(2_000)


def test_the_replay_holds_what_was_taken():
    """A policy's sample may lie beyond ±1; the environment takes, and the model reads, the clipped one."""
    vectors = np.array([[0.5, -0.25], [3.0, -7.0], [2.0, 0.125]], np.float32)
    env = make()
    env.reset()
    taken = env.spec.to_env(vectors)
    step = env.step(taken)
    replay = store.init(3, 4, SPEC.image_shape, SPEC.num_actions)
    insert = jax.jit(store.insert)
    replay = insert(replay, Transition(step.image, vectors, step.reward, step.terminal, step.is_first))
    np.testing.assert_array_equal(replay.action[:, 0], taken)
    first = np.array([False, True, False])
    replay = insert(replay, Transition(step.image, vectors, step.reward, step.terminal, first))
    np.testing.assert_array_equal(replay.action[:, 1], [[0.5, -0.25], [0.0, 0.0], [1.0, 0.125]])
