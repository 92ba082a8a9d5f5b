"""DeepMind Control: as the paper has it, saved exactly, and drawn without a screen."""

import itertools
import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from tests import third
from twister_jax import envs
from twister_jax.envs import renderer
from twister_jax.envs.dmc import TASKS, DmcConfig, DmcEnv
from twister_jax.envs.probe import probe
from twister_jax.envs.renderer import choose_renderer, try_renderer
from twister_jax.errors import UserError
from twister_jax.presets import make_config, validate
from twister_jax.training.train import train

third.register()
CHEAP = ("cartpole_balance", "reacher_easy")  # reacher puts its target into the model


def same(ours, theirs):
    np.testing.assert_array_equal(ours.image, theirs.image)
    assert ours[1:] == theirs[1:]


def actions_of(env, count):
    return np.random.default_rng(0).uniform(-1, 1, (count, env.spec.num_actions)).astype(np.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in TASKS]
)
def test_a_task_is_played_drawn_saved_and_goes_on_exactly(name):
    """Across two ends of an episode, in an environment with another seed and another past."""
    env, other = DmcEnv(name, 0, episode_steps=24), DmcEnv(name, 1, episode_steps=24)
    try:
        first = env.reset()
        assert first.is_first
        assert (first.image.shape, first.image.dtype) == ((64, 64, 3), np.uint8)
        actions = actions_of(env, 40)
        steps = [env.step(action) for action in actions[:20]]
        assert len(np.unique(first.image)) > 20
        assert any(not np.array_equal(step.image, first.image) for step in steps)
        assert not any(step.terminal for step in steps)
        (end,) = [step for step in steps if step.episode]
        assert end is steps[11]  # 24 simulator steps, two at a time
        assert end.episode == (0, pytest.approx(sum(step.reward for step in steps[:12])), 12, True)
        assert [step.is_first for step in steps] == [index == 12 for index in range(20)]

        other.reset()
        other.step(actions[0])
        other.set_state(json.loads(json.dumps(env.get_state())))
        for action in actions[20:]:
            same(env.step(action), other.step(action))
    finally:
        env.close()
        other.close()


def test_the_reward_is_the_sum_over_the_repeats_and_a_fresh_environment_resets_first():
    once, twice = (DmcEnv("cartpole_swingup", 0, action_repeat=repeat) for repeat in (1, 2))
    push = np.array([0.7], np.float32)
    assert twice.step(push).is_first
    once.reset()
    for _ in range(5):
        halves = [once.step(push), once.step(push)]
        whole = twice.step(push)
        assert whole.reward == pytest.approx(sum(half.reward for half in halves), abs=1e-12)
        np.testing.assert_array_equal(whole.image, halves[1].image)


def test_the_paper_s_settings():
    config = make_config("twister", "paper", "dmc:walker_walk")
    assert config.env == DmcConfig(num_envs=4, action_repeat=2, episode_steps=1_000)
    train = config.train
    assert (train.steps, train.updates_per_step, train.prefill_steps) == (500_000, 0.5, 348)
    evaluation = config.evaluation
    assert (evaluation.episodes, evaluation.sample_actions) == (10, False)
    algorithm = config.algorithm
    assert (algorithm.batch_size, algorithm.batch_length, algorithm.imagination_horizon) == (16, 64, 15)
    # The prefill stores a reset and 87 steps of each of 4 streams: 25 windows of 64 steps in each.
    assert 4 * (1 + train.prefill_steps // 4 - algorithm.batch_length + 1) == 100
    for preset in ("paper", "cpu", "debug"):
        validate(make_config("twister", preset, "dmc:walker_walk"))


def test_the_twenty_tasks_and_their_spellings():
    assert len(TASKS) == 20
    for name in TASKS:
        assert envs.full_name(f"dmc:{name}") == f"dmc:{name}"
    assert envs.full_name("dmc:Ball-in-cup catch") == "dmc:ball_in_cup_catch"
    with pytest.raises(UserError, match=r"'dmc:walker_wlk' \(did you mean walker_walk"):
        envs.resolve("dmc:walker_wlk")
    with pytest.raises(UserError, match=r"'walker_walk' \(did you mean dmc:walker_walk\?\)"):
        envs.resolve("walker_walk")


def test_the_record_of_an_evaluation_says_what_was_played():
    suite = envs.suite("dmc")
    record = suite.protocol("walker_walk", DmcConfig())
    assert record["frame_skip"] == 2
    assert record["episode"] == "1000 simulator steps, never terminal"
    assert record["best_score"] == 1_000
    assert record["mujoco"].startswith("3.")
    assert suite.normalize("walker_walk", 500.0) is None


def test_a_probe_sees_an_episode_end(monkeypatch):
    suite = envs.suite("dmc")
    env = suite.make("pendulum_swingup", suite.for_probe(DmcConfig()), 0)
    seen, step = [], env.step
    monkeypatch.setattr(env, "step", lambda action: seen.append(step(action)) or seen[-1])
    try:
        probe(env, "dmc:pendulum_swingup")
    finally:
        env.close()
    assert any(each.is_first for each in seen)  # the reset after the end; `probe` passes without one too


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_as_if_undisturbed(tmp_path):
    def run(directory, make_env=envs.make_vector_env):
        settings = {"train.steps": 240, "logdir": str(tmp_path / directory), "precision": "float32"}
        game = {"env.num_envs": 2, "env.episode_steps": 50, "evaluation.episodes": 2}
        config = make_config(third.AGENT, "debug", "dmc:finger_turn_easy", **settings, **game)
        return train(config, make_env=make_env)

    def terminated_in_an_episode(*arguments, **evaluation):
        env = envs.make_vector_env(*arguments, **evaluation)
        step, steps = env.step, itertools.count(1)

        def step_and_be_terminated(actions):
            if next(steps) == 60:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(actions)

        env.step = step_and_be_terminated
        return env

    def results(directory):
        lines = (tmp_path / directory / "metrics.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if k != "wall_seconds"} for line in lines]
        return rows, json.loads((tmp_path / directory / "evaluation.json").read_text())["scores"]

    assert run("undisturbed") == 0
    assert run("interrupted", terminated_in_an_episode) == 128 + signal.SIGTERM
    assert run("interrupted") == 0
    assert results("interrupted") == results("undisturbed")


# ---- drawing without a screen ------------------------------------------------------------------------


def test_a_driver_that_hangs_is_given_up():
    started = time.monotonic()
    problem = try_renderer("egl", "import signal, time; time.sleep(60)", patience=0.2)
    assert problem == "no picture within 0.2 seconds"
    assert time.monotonic() - started < 5


def test_a_driver_that_fails_says_why():
    assert try_renderer("egl", "raise OSError('no such device')") == "OSError: no such device"
    assert try_renderer("egl", "import os; os._exit(3)") == "it ended with code 3"
    assert try_renderer("egl", "import os; os.kill(os.getpid(), 11)") == "it ended with code -11"


@pytest.fixture
def tried(monkeypatch):
    """Backends by what is wrong with them; records which were tried."""

    def install(problems):
        asked = []

        def fake(backend):
            asked.append(backend)
            return problems[backend]

        monkeypatch.setattr(renderer, "try_renderer", fake)
        choose_renderer.cache_clear()
        return asked

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    yield install
    choose_renderer.cache_clear()


def test_egl_is_preferred_and_osmesa_takes_its_place(tried, monkeypatch):
    asked = tried({"egl": None, "osmesa": None})
    assert choose_renderer() == choose_renderer() == "egl"
    assert asked == ["egl"]
    monkeypatch.delenv("MUJOCO_GL")
    asked = tried({"egl": "it hangs", "osmesa": None})
    assert choose_renderer() == "osmesa"
    assert asked == ["egl", "osmesa"]


def test_what_mujoco_gl_names_is_taken_or_refused(tried, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    asked = tried({"osmesa": None})
    assert choose_renderer() == "osmesa"
    assert asked == ["osmesa"]
    tried({"osmesa": "no library"})
    with pytest.raises(UserError, match=r"\(osmesa: no library\): unset MUJOCO_GL, or set it to one of egl"):
        choose_renderer()


def test_without_any_renderer_there_is_one_line(tried):
    tried({"egl": "no device", "osmesa": "no library"})
    with pytest.raises(UserError, match=r"\(egl: no device; osmesa: no library\): install EGL or OSMesa"):
        choose_renderer()


def test_without_the_packages_there_is_the_line_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(UserError, match=r"^dmc:walker_walk needs .* pip install 'twister_jax\[dmc\]'$"):
        DmcEnv("walker_walk", 0)
    assert "pip install 'twister_jax[dmc]'" in envs.suite("dmc").check()
