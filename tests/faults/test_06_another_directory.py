"""6. A run that finds its directory is not the one that it locked stops writing there, and says so."""

import contextlib
import json
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from tests.runs import config_of
from tests.training.test_checkpoint import make_replay, make_state, push
from twister_jax.envs import make_vector_env
from twister_jax.files import HeldDirectory, UnsafePathError
from twister_jax.training import lock
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.load import load_run
from twister_jax.training.lock import Lock, LostError
from twister_jax.training.rundir import RunDirectory
from twister_jax.training.save import Save, Snapshot
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

    config = config_of(directory, **{"train.checkpoint_every": 10**6})
    with pytest.raises(LostError, match=r"is not the run directory that this process locked") as error:
        train(config, make_env=partial(env_that, 45, replace))
    assert error.value.exit_code == 1
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == seen
    place = re.search(r"NOT SAVED in \S+: .* lies in (\S+)", capsys.readouterr().out)[1]
    assert load_run(place).counters.env_steps >= 40  # nothing was lost either
    assert load_run(directory).config.seed == 1


def contents(directory):
    """Everything below a directory: what is in files, and when it was written."""
    found = {}
    for path in directory.rglob("*"):
        stat = os.lstat(path)
        found[path] = (path.read_bytes() if path.is_file() else None, stat.st_ino, stat.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def small_run():
    return Snapshot(make_state(), push(make_replay(), 5), b"env", {"env_steps": 5})


@pytest.fixture
def under_way(monkeypatch):
    """Calls something in the middle of a save that goes on beside training, before or after its files."""

    def hook(name, action):
        original = getattr(Save, name)

        def acting(save):
            if name == "finish":
                action()
                return original(save)
            original(save)
            action()

        monkeypatch.setattr(Save, name, acting)

    return hook


@pytest.mark.parametrize("moment", ["finish", "_write_segment", "_write_checkpoint"])
@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_save_under_way_never_reaches_another_directory(tmp_path, under_way, small_run, moment, how):
    """The directory is exchanged for a copy of another run, whose checkpoints have the same names."""
    directory, other = tmp_path / "run", tmp_path / "other"
    Checkpointer(other / "checkpoints", keep=1).save(7, small_run)
    (other / "checkpoints" / "tmp-000000009-0123abcd").mkdir()  # of a save of its own that is under way
    with RunDirectory(directory) as home:
        checkpointer = Checkpointer(directory / "checkpoints", 1, home.check_held)
        checkpointer.save(5, small_run)
        seen, exchanged = {}, []

        def exchange():
            if exchanged:
                return
            exchanged.append(True)
            directory.rename(tmp_path / "old") if how == "moved" else shutil.rmtree(directory)
            other.rename(directory)
            seen.update(contents(directory))

        under_way(moment, exchange)
        with contextlib.suppress(OSError):
            checkpointer.save(7, small_run, wait=False)
            checkpointer.wait()
        assert exchanged
        assert contents(directory) == seen
        if how == "moved":  # it ended where it began
            assert Checkpointer(tmp_path / "old" / "checkpoints").steps() == [7]
        (directory / "run.lock").touch()
        seen = contents(directory)
        with pytest.raises(LostError):
            checkpointer.save(9, small_run)
        assert contents(directory) == seen


def test_where_descriptors_are_no_paths_a_save_sees_that_its_directory_is_another(
    tmp_path, under_way, small_run, monkeypatch
):
    monkeypatch.setattr(HeldDirectory, "_BY_DESCRIPTOR", "/nowhere/{}")
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.save(5, small_run)

    def exchange():
        (tmp_path / "run").rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", tmp_path / "run")

    under_way("_write_checkpoint", exchange)
    with pytest.raises(OSError, match=r"it was replaced: .*run/checkpoints"):
        checkpointer.save(7, small_run)
    assert checkpointer.steps() == [5]


def test_messages_name_the_directory_and_not_its_descriptor(tmp_path, small_run):
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "replay").symlink_to(tmp_path)
    with pytest.raises(UnsafePathError) as error:
        checkpointer.save(5, small_run)
    assert str(error.value) == f"{tmp_path}/run/checkpoints/replay is a symbolic link: refused"


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


def test_a_copy_of_another_run_without_its_lock_is_not_taken_for_the_vanished_one(tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        directory.write_config({"seed": 3})
        (tmp_path / "run" / "run.lock").unlink()
        directory.check_held()  # it is the same directory
        directory.make_again({"seed": 3})
        (tmp_path / "run").rename(tmp_path / "old")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text('{"seed": 4}')
        for call in (directory.check_held, lambda: directory.make_again({"seed": 3})):
            with pytest.raises(LostError):
                call()
    assert os.listdir(tmp_path / "run") == ["config.json"]


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


def test_somebody_quicker_keeps_the_directory_that_vanished(tmp_path, monkeypatch):
    """Another process makes the directory between our look and our lock, and has not locked it yet."""
    path, mkdir = tmp_path / "run", Path.mkdir

    def quicker(self, *args, **kwargs):
        mkdir(self, *args, **kwargs)
        if self == path:
            (path / "run.lock").touch()

    with RunDirectory(path) as directory:
        shutil.rmtree(path)
        monkeypatch.setattr(Path, "mkdir", quicker)
        with pytest.raises(LostError):
            directory.make_again({"seed": 3})
        assert os.listdir(path) == ["run.lock"]
        theirs = Lock(path / "run.lock")
        theirs.take()  # nobody else holds it
        theirs.release()


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
