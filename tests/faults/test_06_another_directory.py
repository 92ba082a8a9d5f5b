"""6. A run that finds its directory is not the one that it locked stops writing there, and says so."""

import json
import os
import re
import shutil
import time
from functools import partial

import pytest

from tests.runs import config_of
from twister_jax.envs import make_vector_env
from twister_jax.training import lock
from twister_jax.training.load import load_run
from twister_jax.training.lock import Lock, LostError
from twister_jax.training.rundir import RunDirectory
from twister_jax.training.train import train


def env_that(at, action, *args, **kwargs):
    """An environment during whose step number `at` something happens."""
    env, count = make_vector_env(*args, **kwargs), 0
    step = env.step

    def acting_step(actions):
        nonlocal count
        count += 1
        if count == at:
            action()
        return step(actions)

    env.step = acting_step
    return env


def test_another_run_in_its_place_is_not_written_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    directory, seen = tmp_path / "run", {}

    def replace():
        shutil.rmtree(directory)
        assert train(config_of(directory, 60, seed=1)) == 0
        seen.update({path: path.read_bytes() for path in directory.rglob("*") if path.is_file()})

    # Nothing is being saved at that moment: a save that is under way might still find the new directory.
    config = config_of(directory, **{"train.checkpoint_every": 10**6})
    with pytest.raises(LostError, match=r"is not the run directory that this process locked") as error:
        train(config, make_env=partial(env_that, 45, replace))
    assert error.value.exit_code == 1
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == seen
    place = re.search(r"NOT SAVED in \S+: .* lies in (\S+)", capsys.readouterr().out)[1]
    assert load_run(place).counters.env_steps >= 40  # nothing was lost either
    assert load_run(directory).config.seed == 1


def test_a_result_of_another_directory_is_printed(tmp_path, monkeypatch, capsys):
    """The directory is replaced during the final evaluation."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run"

    def make_env(*args, **kwargs):
        if not kwargs.get("evaluation"):
            return make_vector_env(*args, **kwargs)
        return env_that(5, lambda: (directory.rename(tmp_path / "old"), other.__enter__()), *args, **kwargs)

    other = RunDirectory(directory)
    try:
        with pytest.raises(LostError):
            train(config_of(directory, 60), make_env=make_env)
    finally:
        other.__exit__()
    assert sorted(os.listdir(directory)) == ["run.lock"]
    (record,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert json.loads(record)["episodes"] == 5


def test_a_vanished_directory_is_made_again_and_locked(tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        shutil.rmtree(tmp_path / "run")
        directory.check_held()
        directory.make_again({"seed": 3})
        assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"seed": 3}
        with pytest.raises(Exception, match="in use by process"), RunDirectory(tmp_path / "run"):
            pass
        shutil.rmtree(tmp_path / "run")
        with RunDirectory(tmp_path / "run"), pytest.raises(LostError):
            directory.make_again({"seed": 3})


# 21. Locks that keep nobody out


@pytest.fixture
def no_locks(monkeypatch):
    """A network file system on which every process gets the lock; lines are written often."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)


def test_a_holder_on_another_machine_is_seen_by_its_lines(tmp_path, no_locks, monkeypatch, caplog):
    with RunDirectory(tmp_path) as first:
        monkeypatch.setattr(lock, "_boot", lambda: "another-machine")
        message = rf"in use by process {os.getpid()} on [\w.-]+: wait for it, stop it, or name another LOGDIR"
        with pytest.raises(Exception, match=message), RunDirectory(tmp_path):
            pass
        first.check_held()
    assert "looking for" in caplog.text
    caplog.clear()
    with RunDirectory(tmp_path):  # it was left in good order
        assert not caplog.records


def test_a_holder_that_was_killed_is_waited_for_and_no_longer(tmp_path, no_locks, monkeypatch, caplog):
    (tmp_path / "run.lock").write_text("4711 host1 9d5e24f0-0c4 1f0c9a7e 12\n")
    started = time.monotonic()
    with RunDirectory(tmp_path):
        assert 0.2 < time.monotonic() - started < 5
    assert "process 4711 on host1 still uses" in caplog.text


def test_two_that_started_at_once_find_out(tmp_path, no_locks):
    first, second = Lock(tmp_path / "run.lock"), Lock(tmp_path / "run.lock")
    first._watch = second._watch = lambda locked: None
    first.take()
    second.take()
    time.sleep(0.5)
    lost = 0
    for each in (first, second):
        try:
            each.check()
        except LostError:
            lost += 1
        each.release()
    assert lost == 1


def test_a_file_system_without_locks_relies_on_lines(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with RunDirectory(tmp_path), pytest.raises(Exception, match=f"in use by process {os.getpid()}:"):
        RunDirectory(tmp_path).__enter__()


@pytest.mark.parametrize("text", ["", "junk", "1 a\nb c d 5\n", "\0" * 500, "9" * 400])
def test_a_lock_file_of_a_stranger_is_only_a_file(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    with RunDirectory(tmp_path):
        assert lock._LINE.fullmatch((tmp_path / "run.lock").read_text())
