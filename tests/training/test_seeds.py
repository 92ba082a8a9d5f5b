"""Several seeds in one program: each does what it does alone."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from tests import third
from tests.runs import ROOT, Killed, assert_same_run, config_of, final_state, killed_env, rows_of
from twister_jax.cli import main, of_seeds, take_seeds
from twister_jax.envs import make_vector_env
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.group import Group
from twister_jax.training.load import load_run
from twister_jax.training.train import train, train_seeds

STEPS = 60
OPTIONS = {"train.log_every": 5, "train.checkpoint_every": 20, "algorithm.warm_up": 5}


def configs(directory, seeds=(0, 1), **overrides):
    return of_seeds(config_of(directory, STEPS, **OPTIONS, **overrides), seeds)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same seeds, each by itself."""
    directory = tmp_path_factory.mktemp("alone")
    for config in configs(directory):
        assert train(config) == 0
    return directory


def test_a_seed_in_a_group_does_what_it_does_alone(tmp_path, alone):
    assert train_seeds(configs(tmp_path)) == 0
    for seed in ("seed0", "seed1"):
        assert len(rows_of(tmp_path / seed)) > 8
        assert_same_run(tmp_path / seed, alone / seed)
    assert rows_of(tmp_path / "seed0") != rows_of(tmp_path / "seed1")
    assert json.loads((tmp_path / "seed1" / "config.json").read_text())["seed"] == 1


def test_agents_that_read_rewards_are_shown_them_in_a_group_too(tmp_path):
    """Up to the rounding of continuous actions."""

    def those(directory):
        asked = {"algorithm.reads_reward": True, "evaluation.episodes": 1, "train.steps": 60}
        return of_seeds(
            make_config(third.AGENT, "debug", "slider:easy", logdir=str(directory), **asked), (0, 1)
        )

    for config in those(tmp_path / "alone"):
        assert train(config) == 0
    assert train_seeds(those(tmp_path / "group")) == 0
    for seed in ("seed0", "seed1"):
        found, expected = (
            [row["episode/score"] for row in rows_of(tmp_path / name / seed) if "episode/score" in row]
            for name in ("group", "alone")
        )
        assert len(expected) > 1
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_group_is_killed_and_goes_on_as_one(tmp_path, alone):
    with pytest.raises(Killed):
        train_seeds(configs(tmp_path), make_env=lambda *args, **kwargs: killed_env(47, *args, **kwargs))
    assert train_seeds(configs(tmp_path)) == 0
    for seed in ("seed0", "seed1"):
        assert_same_run(tmp_path / seed, alone / seed)
    before = (tmp_path / "seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert train_seeds(configs(tmp_path)) == 0  # nothing is left to do
    assert (tmp_path / "seed0" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_signal_is_answered_between_two_updates_of_all(tmp_path, monkeypatch):
    """However many are due: here 20 after each step, of which a signal comes with the seventh."""
    update, count = Group._update, 0

    def counted(self, kind, *args):
        nonlocal count
        update(self, kind, *args)
        count += kind == "update"
        if count == 47 and kind == "update":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Group, "_update", counted)
    assert train_seeds(configs(tmp_path, **{"train.updates_per_step": 20.0})) == 143
    for seed in ("seed0", "seed1"):
        counters = load_run(tmp_path / seed).counters
        assert (counters.updates, counters.acted) == (47, True)


def test_a_seed_that_fails_stops_alone(tmp_path, alone, capsys):
    made = []

    def one_breaks(*args, evaluation=False, **kwargs):
        env = make_vector_env(*args, evaluation=evaluation, **kwargs)
        made.append(env)
        if len(made) == 1:  # that of seed 0
            env.step = _failing_after(40, env.step)
        return env

    assert train_seeds(configs(tmp_path), make_env=one_breaks) == 1
    assert "seed 0 stops: emulator lost; the last checkpoint is kept" in capsys.readouterr().out
    assert not (tmp_path / "seed0" / "evaluation.json").exists()
    assert_same_run(tmp_path / "seed1", alone / "seed1")
    assert train_seeds(configs(tmp_path)) == 0  # and goes on when the cause has gone
    assert_same_run(tmp_path / "seed0", alone / "seed0")


def test_a_seed_whose_directory_refuses_it_is_saved_elsewhere_and_the_others_go_on(
    tmp_path, alone, monkeypatch, capsys
):
    save = Checkpointer.save

    def full(self, step, snapshot, wait=True):
        if self.directory.parent == tmp_path / "seed0":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, step, snapshot, wait)

    monkeypatch.setattr(Checkpointer, "save", full)
    monkeypatch.chdir(tmp_path)
    assert train_seeds(configs(tmp_path)) == 1
    assert "NOT SAVED in" in capsys.readouterr().out
    (place,) = tmp_path.glob("seed0-rescued-*")
    assert final_state(place)[1]["env_steps"] == STEPS
    for seed in ("seed0", "seed1"):
        assert (tmp_path / seed / "evaluation.json").exists()
    assert_same_run(tmp_path / "seed1", alone / "seed1")


@pytest.mark.parametrize("at", ["a signal", "the end", "its evaluation"])
def test_a_seed_that_loses_its_directory_is_saved_elsewhere_and_the_others_go_on(
    tmp_path, alone, monkeypatch, capsys, at
):
    made = []

    def exchanging(call, count):
        left = [count]

        def calling(*args):
            left[0] -= 1
            if left[0] == 0:
                (tmp_path / "seed0").rename(tmp_path / "old")
                (tmp_path / "seed0").mkdir()
                (tmp_path / "seed0" / "config.json").write_text("{}")
                if at == "a signal":
                    os.kill(os.getpid(), signal.SIGTERM)
            return call(*args)

        return calling

    def make_env(*args, **kwargs):
        env = make_vector_env(*args, **kwargs)
        made.append(env)
        if len(made) == (3 if at == "its evaluation" else 1):
            env.step = exchanging(env.step, {"a signal": 47, "the end": STEPS, "its evaluation": 3}[at])
        return env

    monkeypatch.chdir(tmp_path)
    assert train_seeds(configs(tmp_path), make_env=make_env) == (143 if at == "a signal" else 1)
    assert "seed 0 stops:" in capsys.readouterr().out
    assert os.listdir(tmp_path / "seed0") == ["config.json"]
    (place,) = tmp_path.glob("seed0-rescued-*")
    assert final_state(place)[1]["env_steps"] >= 40
    assert train_seeds(configs(tmp_path)[1:]) == 0
    assert_same_run(tmp_path / "seed1", alone / "seed1")


def _failing_after(steps, step):
    count = 0

    def failing(actions):
        nonlocal count
        count += 1
        if count > steps:
            raise RuntimeError("emulator lost")
        return step(actions)

    return failing


@pytest.mark.slow
def test_seeds_lie_on_devices_of_their_own(tmp_path, alone):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    flags = [f"--{name}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "tests.third", "train", "--agent", "minimal", "--game", "Catch"]
    command += ["--preset", "debug", "--precision", "float32", "--steps", str(STEPS), *flags]
    command += ["--seeds", "0", "1", "--logdir", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "idle" not in done.stdout
    for seed in ("seed0", "seed1"):
        assert rows_of(tmp_path / seed) == rows_of(alone / seed)


@pytest.mark.parametrize(
    ("flags", "seeds"),
    [
        (["--seeds", "0", "1", "2", "--game", "Pong"], [0, 1, 2]),
        (["--seeds", "0,1,2"], [0, 1, 2]),
        (["--seeds=3,1"], [3, 1]),
        (["--game", "Pong"], None),
    ],
)
def test_seeds_as_people_write_them(flags, seeds):
    taken, rest = take_seeds(flags)
    assert taken == seeds
    assert rest == (["--game", "Pong"] if "--game" in flags else [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0", "1", "0"], "0 is there twice"),
        (["--seeds"], "must be whole numbers"),
        (["--seeds", "0", "x"], "must be whole numbers"),
        (["--seeds", "0", "1", "--seed", "2"], "exclude each other"),
        (["--seeds", "0", "4294967296"], "seed = 4294967296"),
        (["--seeds", "0", "1", "--parallel.data", "2"], "parallel.data = 2: must be 1 with --seeds"),
    ],
)
def test_seeds_that_cannot_be(flags, message, capsys):
    assert main(["train", "--game", "Catch", "--preset", "debug", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_each_seed_has_a_directory_of_its_own(tmp_path):
    named, unnamed = config_of(tmp_path), dataclasses.replace(config_of(tmp_path), logdir="")
    assert [config.logdir for config in of_seeds(named, [4, 7])] == [f"{tmp_path}/seed4", f"{tmp_path}/seed7"]
    assert [config.logdir for config in of_seeds(unnamed, [4, 7])] == ["", ""]
    with pytest.raises(UserError, match="must be 1"):
        of_seeds(config_of(tmp_path, **{"parallel.data": 2}), [0, 1])
