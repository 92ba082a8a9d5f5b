"""Everybody's own environment: what is found out about it, what is refused, and how it goes on."""

import json
import logging
import sys

import numpy as np
import pytest

from tests import third
from twister_jax import envs
from twister_jax.envs.gym import GymConfig, GymEnv, examine
from twister_jax.envs.vector import SerialVectorEnv
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.training.train import train

third.register()
envs.admit("gym:tests.third.worlds:Plain-v0")  # as `train --game` does: no name alone makes its code run
SUITE = envs.suite("gym")


def game(world):
    return f"gym:tests.third.worlds:{world}-v0"


def make(world, seed=0, **settings):
    return SUITE.make(game(world).removeprefix("gym:"), GymConfig(**settings), seed)


def said(caplog, world, **settings):
    """What people are told about an environment."""
    examine.cache_clear()
    with caplog.at_level(logging.INFO, "twister_jax"):
        make(world, **settings).close()
    return [record.getMessage().removeprefix(game(world) + ": ") for record in caplog.records]


# ---- pictures and actions ----------------------------------------------------------------------------


def test_what_it_is_and_how_it_behaves_is_said_in_two_lines(caplog):
    assert said(caplog, "Plain") == [
        "observation 48x40x3 → 64x64x3; actions: 3 discrete; no registered time limit",
        "rewards from 2.2 to 3.9 in 64 random steps; follows its seed; "
        "cannot be saved, so a resumed run begins a new episode",
    ]


@pytest.mark.parametrize(
    ("world", "settings", "expected"),
    [
        ("Dictionary", {}, "observation front 48x40x3 → 64x64x3"),
        ("Two", {"image_key": "back"}, "observation back 48x40 → 64x64x3"),
        ("Rendered", {"grayscale": True}, "rendering 48x40x3 → 64x64x1"),
        ("Continuous", {}, "actions: 2 continuous, [-1, 1] rescaled to -3 to 10"),
        ("Cut", {}, "episodes of at most 5 steps"),
        ("Seedless", {}, "does not follow its seed"),
        ("Exact", {}, "saved exactly"),
        ("Forgetful", {}, "its set_state does not restore it, so a resumed run begins a new episode"),
        ("Arrays", {}, "cannot be saved (TypeError: Object of type ndarray is not JSON serializable)"),
    ],
)
def test_what_is_found_out(caplog, world, settings, expected):
    assert expected in "; ".join(said(caplog, world, **settings))


def test_pictures_are_shrunk_by_area():
    env = make("Plain")
    image = env.reset().image
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    noise = env._env.unwrapped.noise
    assert set(np.unique(image)) == {noise, 255}  # 48x40 is enlarged, so each pixel is one of the two
    import gymnasium

    rendered = GymEnv("CartPole-v1", 0, image_key="", time_limit=9, grayscale=False)
    step, source = rendered.reset(), rendered._env.render()
    blocks = [source[r * 400 // 64 : (r + 1) * 400 // 64].mean() for r in range(0, 64, 4)]
    ours = [step.image[r].mean() for r in range(0, 64, 4)]
    assert np.abs(np.array(blocks) - ours).max() < 12
    assert isinstance(rendered._env.unwrapped, gymnasium.Env)


def test_discrete_actions_are_counted_from_where_the_environment_begins():
    env = make("Plain")
    env.reset()
    for action in range(3):
        env.step(action)
    assert env._env.unwrapped.taken == [1, 2, 3]


def test_box_actions_are_rescaled():
    env = make("Continuous")
    env.reset()
    for action in ([-1, -1], [1, 1], [0, 0.5]):
        env.step(np.array(action, np.float32))
    np.testing.assert_allclose(env._env.unwrapped.taken, [[-3, 0], [1, 10], [-1, 7.5]], rtol=1e-6)
    assert env._env.unwrapped.taken[0].dtype == np.float32


def test_truncation_is_not_termination():
    for world, settings, length in [("Cut", {}, 5), ("Endless", {"time_limit": 4}, 4)]:
        env = make(world, **settings)
        env.reset()
        steps = [env.step(0) for _ in range(length)]
        assert not any(step.terminal for step in steps)
        assert steps[-1].episode == (0, pytest.approx(sum(s.reward for s in steps)), length, True)
        assert env.step(0).is_first
    env = make("Plain")
    env.reset()
    steps = [env.step(0) for _ in range(7)]
    assert [step.terminal for step in steps] == [False] * 6 + [True]
    assert steps[-1].episode[2:] == (7, False)


# ---- names -------------------------------------------------------------------------------------------


def test_spellings():
    assert envs.full_name("gym:CartPole-v1") == envs.full_name("gym:cartpole") == "gym:CartPole-v1"
    assert envs.full_name("gym:minigrid-empty-5x5-v0") == "gym:MiniGrid-Empty-5x5-v0"
    assert envs.full_name(game("Plain")) == game("Plain")
    with pytest.raises(UserError, match=r"'gym:CartPoll-v1' \(did you mean CartPole-v1"):
        envs.resolve("gym:CartPoll-v1")
    with pytest.raises(UserError, match=r"unknown game 'CartPole-v1' \(did you mean gym:CartPole-v1"):
        envs.resolve("CartPole-v1")


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            game("Numbers"),
            {},
            r"has no picture: it observes Box\(.*\) and does not render to rgb_array",
        ),
        (game("Two"), {}, "several pictures: choose with --env.image-key back or front"),
        (game("Dictionary"), {"image_key": "frnt"}, r"image_key = frnt: no entry .*\(did you mean front\?\)"),
        (game("Plain"), {"image_key": "front"}, "its observations are no dictionary"),
        (game("Floats"), {}, r"shows float64 of shape \(48, 40, 3\): a picture is uint8"),
        (game("Growing"), {}, r"changed its pictures from uint8 of shape \(48, 40, 3\) to .*\(49, 40, 3\)"),
        (game("Blank"), {}, "does not behave as an environment should: the first 64 images are blank"),
        (game("Undefined"), {}, "gave a reward of nan: rewards must be finite"),
        (game("Several"), {}, r"actions of an unsupported kind, MultiDiscrete\(\[3 3\]\): wrap it"),
        (game("Unbounded"), {}, r"actions of an unsupported kind, Box\(-inf, inf"),
        (game("Failing"), {}, "fails when played: KeyError: 'wheel'"),
        (game("Unmade"), {}, "cannot be made: OSError: the track is missing"),
        (game("Plane"), {}, r"\(did you mean Plain-v0.*\): importing tests.third.worlds registers no such"),
        ("gym:no_such_package:X-v0", {}, "would run the code of the module no_such_package"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name, settings, message):
    with pytest.raises((UserError, RuntimeError), match=message) as refused:
        envs.make_vector_env(name, GymConfig(**settings), 1, 0)
    assert "\n" not in str(refused.value)


def test_a_module_that_cannot_be_imported_is_refused_in_one_line():
    with pytest.raises(UserError, match="module no_such_package cannot be imported"):
        envs.admit("gym:no_such_package:X-v0")


def test_without_gymnasium_there_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert envs.full_name("gym:CartPole-v1") == "gym:CartPole-v1"
    with pytest.raises(UserError, match=r"pip install 'twister_jax\[gym\]'"):
        GymEnv("CartPole-v1", 0, image_key="", time_limit=9, grayscale=False)
    with pytest.raises(UserError, match=r"pip install 'twister_jax\[gym\]'"):
        envs.admit("gym:my_package:Mine-v0")
    assert "pip install 'twister_jax[gym]'" in SUITE.check()


# ---- going on ----------------------------------------------------------------------------------------


def vector(world, seed=0):
    return SerialVectorEnv(lambda seed: make(world, seed), 2, seed, {"game": game(world)})


def test_what_can_be_saved_goes_on_exactly():
    env, other = vector("Exact"), vector("Exact", seed=1)
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, (40, 2))
    env.reset()
    for each in actions[:10]:
        env.step(each)
    assert other.set_state(env.get_state()) == 0
    for each in actions[10:]:
        ours, theirs = env.step(each), other.step(each)
        for x, y in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(x, y)
        assert ours.episodes == theirs.episodes


def test_what_cannot_be_saved_begins_a_new_episode_that_was_not_played_before():
    env = vector("Plain")
    first = env.reset()
    for _ in range(3):
        env.step(np.zeros(2, int))
    resumed, again = vector("Plain"), vector("Plain")
    assert resumed.set_state(env.get_state()) == 2
    step = resumed.step(np.zeros(2, int))
    assert step.is_first.all()
    assert not np.array_equal(step.image, first.image)
    assert again.set_state(resumed.get_state()) == 2  # as the seed and the number of restarts decide
    assert not np.array_equal(again.step(np.zeros(2, int)).image, step.image)


def test_a_resumed_run_says_so_and_goes_on(tmp_path, capsys):
    def run(world, steps):
        settings = {"train.steps": steps, "logdir": str(tmp_path / world), "precision": "float32"}
        assert train(make_config(third.AGENT, "debug", game(world), **settings)) == 0
        return json.loads((tmp_path / world / "evaluation.json").read_text())["protocol"]

    assert run("Plain", 60)["notes"] == []
    record = run("Plain", 90)
    (note,) = record["notes"]
    assert note.startswith("resumed at step 60 with new episodes")
    assert note in capsys.readouterr().out
    assert record["resumption"] == "with a new episode"
    assert record["frames"] == "64x64 RGB, by area from its observation"
    assert record["human_score"] is None
    run("Exact", 60)
    record = run("Exact", 90)
    assert (record["notes"], record["resumption"]) == ([], "exact")
