import builtins
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import shutil
import subprocess
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.files import UnsafePathError, UnusableError
from twister_jax.replay import segments, store
from twister_jax.replay.segments import Layout
from twister_jax.replay.store import Transition
from twister_jax.training import manifest
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.save import Save, Snapshot

IMAGE, ACTIONS = (4, 4, 3), 2
insert = jax.jit(store.insert, donate_argnums=0)


class State(NamedTuple):
    parameters: dict[str, Any]
    skipped: jax.Array
    step: jax.Array


def make_state(seed=0, width=3):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (2, width), np.uint32).view(np.float32)  # NaNs and denormals too
    parameters = {
        "kernel": jnp.array(bits),
        "half": jnp.array(rng.normal(size=5), jnp.bfloat16),
        "mask": jnp.array([True, False]),
        "empty": jnp.zeros((0, 3)),
        "key": jnp.array(rng.integers(0, 2**32, 2, np.uint32)),
        "nested": [jnp.float32(seed), None, (jnp.int32(-seed),)],
    }
    return State(parameters, jnp.int32(0), jnp.int32(seed))


def state_like(host):
    """What loading a state makes of the counters found with it."""
    assert host["env_steps"] >= 0
    return make_state()


def make_replay(capacity=8, streams=2):
    return store.init(streams, capacity, IMAGE, ACTIONS)


def push(replay, steps, seed=0):
    rng = np.random.default_rng([seed, int(replay.inserted)])
    streams = replay.frames.shape[0]
    for _ in range(steps):
        step = Transition(
            image=rng.integers(0, 256, (streams, *IMAGE), np.uint8),
            action=rng.normal(size=(streams, ACTIONS)).astype(np.float32),
            reward=rng.normal(size=streams).astype(np.float32),
            terminal=rng.random(streams) < 0.5,
            is_first=rng.random(streams) < 0.5,
        )
        replay = insert(replay, step)
    visits = np.array(replay.visits)
    visits[:, : int(replay.size)] = rng.integers(0, 9, visits[:, : int(replay.size)].shape)
    return replay.replace(visits=jnp.array(visits))


def copy(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def assert_same(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


class Run:
    """A run that only inserts and saves, and remembers what it saved."""

    def __init__(self, directory, keep=3, capacity=8, streams=2):
        self.directory, self.keep = directory, keep
        self.replay = make_replay(capacity, streams)
        self.checkpointer = Checkpointer(directory, keep)
        self.saved = {}

    def advance(self, steps=3):
        self.replay = push(self.replay, steps)
        step = int(self.replay.inserted)
        snapshot = Snapshot(make_state(step), self.replay, b"env %d" % step, {"env_steps": step, "loss": 0.1})
        self.saved[step] = copy(snapshot.state), copy(self.replay), snapshot.env, snapshot.host
        return step, snapshot

    def save(self, steps=3):
        step, snapshot = self.advance(steps)
        self.checkpointer.save(step, snapshot)
        return step

    def restore(self):
        """What a new process finds, checked against what was saved; the step it found."""
        self.checkpointer = Checkpointer(self.directory, self.keep)
        like = make_replay(self.replay.capacity, self.replay.frames.shape[0])
        found = self.checkpointer.restore(make_state(), like)
        if found is None:
            return None
        step = found.host["env_steps"]
        state, replay, env, host = self.saved[step]
        assert_same(found.state, state)
        assert_same(found.replay, replay)
        assert (found.env, found.host) == (env, host)
        self.replay = found.replay
        return step


def stored_steps(directory):
    return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in (directory / "replay").iterdir()}


def stored_files(directory):
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def tmp_path():
    """In memory where that can be had: the tests wait for thousands of fsyncs."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


@pytest.fixture
def small(monkeypatch):
    """Chunks of two steps and segments of three, so that small stores have many."""
    record = 2 * (math.prod(IMAGE) + ACTIONS * 4 + 4 + 2)
    monkeypatch.setattr(segments, "_CHUNK_BYTES", 2 * record)
    monkeypatch.setattr(segments, "_SEGMENT_BYTES", 3 * record)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two checkpoints, to be copied."""
    run = Run(tmp_path_factory.mktemp("two") / "checkpoints")
    run.save()
    run.save()
    return run


def copy_of(run, directory):
    shutil.copytree(run.directory, directory)
    other = Run(directory, run.keep, run.replay.capacity)
    other.saved = dict(run.saved)
    return other


# What a checkpoint holds


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pushes=st.lists(st.integers(0, 11), min_size=1, max_size=5),
    shape=st.sampled_from([(1, 8), (2, 8), (2, 5)]),
    keep=st.integers(1, 3),
    resume=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_restores_bit_for_bit_whatever_was_pushed(tmp_path_factory, small, pushes, shape, keep, resume):
    streams, capacity = shape
    run = Run(tmp_path_factory.mktemp("run") / "checkpoints", keep, capacity, streams)
    for steps, again in zip(pushes, resume, strict=False):
        step = run.save(steps)
        if again:
            assert run.restore() == step
    assert run.restore() == step
    assert 1 <= len(run.checkpointer.checkpoints()) <= keep
    # No segment outlives its use: none lies wholly before what the oldest checkpoint still holds.
    oldest = run.checkpointer.steps()[0]
    assert all(int(name.split("-")[1]) > oldest - capacity for name in stored_steps(run.directory))


def test_no_checkpoint_is_none_and_touches_nothing(tmp_path):
    directory = tmp_path / "checkpoints"
    like = make_replay()
    assert Checkpointer(directory).restore(make_state(), like) is None
    assert not directory.exists()
    assert not like.frames.is_deleted()


def test_restored_arrays_are_fresh_and_uncommitted(two, tmp_path):
    run = copy_of(two, tmp_path / "c")
    like = make_replay()
    found = Checkpointer(run.directory).restore(jax.eval_shape(make_state), like)
    for leaf in jax.tree.leaves((found.state, found.replay)):
        assert isinstance(leaf, jax.Array)
        assert not leaf.committed
    assert like.frames.is_deleted()  # filled in place
    found = Checkpointer(run.directory).restore(make_state(), jax.eval_shape(make_replay))
    assert_same(found.replay, run.saved[6][1])


def test_steps_on_disk_are_not_written_again(tmp_path, small):
    run = Run(tmp_path / "c", capacity=20)
    run.save(9)
    before = stored_steps(run.directory)
    run.save(2)
    after = stored_steps(run.directory)
    assert before.items() <= after.items()
    (new,) = after.keys() - before.keys()
    record = Layout.of(run.replay).record.itemsize
    assert after[new][0] == 2 * 2 * record + len(numpy_header(run.directory / "replay" / new))
    run.restore()
    run.save(0)
    assert stored_steps(run.directory) == after


def numpy_header(path):
    data = path.read_bytes()
    return data[: 10 + int.from_bytes(data[8:10], "little")]


def test_only_the_newest_are_kept_and_their_segments(tmp_path):
    run = Run(tmp_path / "c", keep=2, capacity=8)
    for _ in range(6):
        run.save(3)
    assert run.checkpointer.steps() == [15, 18]
    # 15 holds steps 7 to 15 and 18 holds 10 to 18.
    assert sorted(name[:19] for name in stored_steps(run.directory)) == [
        "000000006-000000009",
        "000000009-000000012",
        "000000012-000000015",
        "000000015-000000018",
    ]


def test_the_same_step_may_be_saved_twice(tmp_path):
    run = Run(tmp_path / "c", keep=1)
    step = run.save()
    assert run.save(0) == step
    assert run.restore() == step
    assert run.checkpointer.steps() == [step]


def test_a_longer_run_takes_over_a_smaller_replay(two, tmp_path):
    run = copy_of(two, tmp_path / "c")
    found = Checkpointer(run.directory).restore(make_state(), make_replay(20))
    for name in ("frames", "action", "reward", "terminal", "is_first", "visits"):
        stored = getattr(run.saved[6][1], name)
        assert np.array_equal(getattr(found.replay, name)[:, :6], stored[:, :6], equal_nan=name == "action")
    assert int(found.replay.inserted) == 6
    assert Checkpointer(run.directory).restore(make_state(), make_replay(6)).replay.capacity == 6
    with pytest.raises(UserError, match=r"6 steps per stream, and here is room for 5: .*LOGDIR"):
        Checkpointer(run.directory).restore(make_state(), make_replay(5))


def test_a_replay_that_went_round_grows(tmp_path):
    run = Run(tmp_path / "c", keep=1)
    run.save(9)
    run.save(3)
    before = run.replay
    with pytest.raises(UserError, match=r"8 steps per stream, and here is room for 7: .*LOGDIR"):
        Checkpointer(run.directory).restore(make_state(), make_replay(7))
    run.checkpointer = Checkpointer(run.directory, keep=1)
    run.replay = run.checkpointer.restore(make_state(), make_replay(20)).replay
    assert int(run.replay.inserted) == 8
    for name in ("frames", "reward", "visits"):
        ours, theirs = (store.in_order(each, getattr(each, name)) for each in (run.replay, before))
        assert np.array_equal(ours[:, :8], theirs)
    assert run.save() == run.restore() == 11
    assert all(name.startswith("000000000-0000000") for name in stored_steps(run.directory))


def test_another_model_or_replay_is_refused_by_name(two):
    with pytest.raises(
        UserError, match=r"parameters\.kernel is float32\[2,3\] there and float32\[2,4\] here"
    ):
        Checkpointer(two.directory).restore(make_state(width=4), make_replay())
    with pytest.raises(UserError, match=r"parameters\.empty is float32\[0,3\] there and absent here"):
        Checkpointer(two.directory).load_state(lambda host: make_state()._replace(parameters={}))
    with pytest.raises(UserError, match="streams is 2, here it is 1"):
        Checkpointer(two.directory).restore(make_state(), make_replay(streams=1))
    with pytest.raises(UserError, match="image_shape is"):
        Checkpointer(two.directory).restore(make_state(), store.init(2, 8, (4, 3, 4), ACTIONS))


def test_evaluation_loads_the_state_alone_and_changes_nothing(two, tmp_path, caplog):
    run = copy_of(two, tmp_path / "c")
    shutil.rmtree(run.directory / "replay")
    (run.directory / "tmp-000000009-0123abcd").mkdir()
    before = sorted(run.directory.rglob("*"))
    for step, found in ((None, 6), (3, 3)):
        state, host = Checkpointer(run.directory).load_state(state_like, step)
        assert_same(state, run.saved[found][0])
        assert host == run.saved[found][3]
    with pytest.raises(UserError, match=r"no checkpoint of step 4 \(there: 3, 6\)"):
        Checkpointer(run.directory).load_state(state_like, 4)
    with pytest.raises(UserError, match="no checkpoint"):
        Checkpointer(tmp_path / "none").load_state(state_like)
    assert sorted(run.directory.rglob("*")) == before
    assert not caplog.records
    flip(run.directory / "000000006-0" / "manifest.json", 40)
    assert Checkpointer(run.directory).load_state(state_like)[1] == run.saved[3][3]
    with pytest.raises(UserError, match=r"no checkpoint of step 6 \(there: 3\)"):
        Checkpointer(run.directory).load_state(state_like, 6)
    flip(run.directory / "000000003-0" / "manifest.json", 40)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        Checkpointer(run.directory).load_state(state_like, 6)


# Damage


def flip(path, bit):
    data = bytearray(path.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def damages(path, rng):
    size = path.stat().st_size
    yield "flipped", lambda: flip(path, int(rng.integers(8 * size)))
    yield "truncated", lambda: os.truncate(path, int(rng.integers(size)))
    yield "emptied", lambda: os.truncate(path, 0)
    yield "removed", lambda: path.unlink()


def newest_only(run):
    """The files that only the newest checkpoint needs."""
    new = [p for p in (run.directory / "000000006-0").rglob("*") if p.is_file()]
    return [*new, *(run.directory / "replay").glob("000000003-*")]


def assert_steps_over(run, caplog, reason=""):
    """The checkpoint before the newest is used, once; the run then goes on as if the newest never was."""
    caplog.clear()
    assert run.restore() == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "000000006-0" in record.getMessage()
    assert reason in record.getMessage()
    assert "\n" not in record.getMessage()
    caplog.clear()
    assert run.restore() == 3
    assert not caplog.records
    assert run.save() == 6
    assert run.restore() == 6
    assert len(stored_steps(run.directory)) == 2


def test_damage_to_any_file_is_found(two, tmp_path, caplog):
    rng = np.random.default_rng(0)
    count = 0
    for number in range(len(newest_only(two))):
        for kind in range(4):
            run = copy_of(two, tmp_path / "c")
            name, damage = list(damages(newest_only(run)[number], rng))[kind]
            if newest_only(run)[number].stat().st_size == 0 and name != "removed":
                shutil.rmtree(run.directory)
                continue
            damage()
            caplog.clear()
            assert run.restore() == 3, (newest_only(two)[number], name)
            assert len(caplog.records) == 1
            count += 1
            shutil.rmtree(run.directory)
    assert count > 20


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(bit=st.integers(0, 1 << 20))
def test_any_flipped_bit_of_a_manifest_is_found(two, tmp_path_factory, bit):
    directory = tmp_path_factory.mktemp("flip") / "000000006-0"
    directory.mkdir()
    shutil.copy(two.directory / "000000006-0" / "manifest.json", directory)
    flip(directory / "manifest.json", bit)
    with pytest.raises(UnusableError):
        manifest.read(directory)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"content": {}}', "\0" * 50, "[" * 100_000])
def test_a_garbage_manifest_is_stepped_over(two, tmp_path, caplog, text):
    run = copy_of(two, tmp_path / "c")
    (run.directory / "000000006-0" / "manifest.json").write_text(text)
    assert_steps_over(run, caplog, "manifest.json is damaged")


def test_a_foreign_directory_is_stepped_over(two, tmp_path, caplog):
    run = copy_of(two, tmp_path / "c")
    shutil.rmtree(run.directory / "000000006-0")
    (run.directory / "000000006-0").mkdir()
    assert_steps_over(run, caplog, "no manifest.json")
    (aside,) = run.directory.glob("unusable-*")
    assert aside.name.startswith("unusable-000000006-0-")


def test_few_unusable_checkpoints_are_kept(two, tmp_path):
    run = copy_of(two, tmp_path / "c")
    for _ in range(4):
        (run.directory / "000000009-0").mkdir()
        assert run.restore() == 6
    assert len(list(run.directory.glob("unusable-*"))) == 2


def test_none_usable_is_an_error_and_nothing_is_moved(two, tmp_path, caplog):
    run = copy_of(two, tmp_path / "c")
    for name in ("000000003-0", "000000006-0"):
        flip(run.directory / name / "env.bin", 5)
    before = stored_files(run.directory)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints .* LOGDIR") as error:
        run.restore()
    assert "\n" not in str(error.value)
    assert len(caplog.records) == 2
    assert stored_files(run.directory) == before


@pytest.mark.parametrize(
    ("version", "checked", "message"),
    [
        (manifest.FORMAT + 1, [manifest.FORMAT + 1, {"all": "new"}], r"a newer twister_jax .*: use that pro"),
        (2, [2, {"all": "new"}], r"an older twister_jax .*format 2, .*: use that program, or .*LOGDIR"),
        (1, {"all": "new"}, r"an older twister_jax .*format 1, .*: use that program, or .*LOGDIR"),
    ],
)
def test_another_format_is_refused_and_left_alone(version, checked, message, two, tmp_path):
    run = copy_of(two, tmp_path / "c")
    path = run.directory / "000000006-0" / "manifest.json"
    whole = {"content": {"all": "new"}, "format": version}
    whole["crc32"] = zlib.crc32(json.dumps(checked, sort_keys=True).encode())
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=message):
        run.restore()
    assert json.loads(path.read_text()) == whole
    path.write_text(json.dumps(whole | {"crc32": whole["crc32"] + 1}))  # damaged, then
    assert run.restore() == 3


@pytest.mark.parametrize("version", [manifest.FORMAT + 4, 1, 0, str(manifest.FORMAT), None])
def test_a_damaged_format_is_damage_and_no_other_program(version, two, tmp_path):
    run = copy_of(two, tmp_path / "c")
    path = run.directory / "000000006-0" / "manifest.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"format": version}, sort_keys=True, indent=1) + "\n")
    assert run.restore() == 3


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "c" / "step_100").mkdir(parents=True)
    with pytest.raises(UserError, match=r"'step_100', which is not a checkpoint of this program: .*LOGDIR"):
        Checkpointer(tmp_path / "c").restore(make_state(), make_replay())


def test_a_killed_process_leaves_nothing_behind(two, tmp_path):
    run = copy_of(two, tmp_path / "c")
    (run.directory / "tmp-000000009-0123abcd" / "state").mkdir(parents=True)
    (run.directory / "replay" / "000000006-000000009-aaaaaaaa.npy").write_bytes(b"half")
    before = stored_steps(two.directory).keys()
    assert run.restore() == 6
    assert not list(run.directory.glob("tmp-*"))
    assert stored_steps(run.directory).keys() == before


# Interruptions


class Killed(BaseException):
    """The process is gone: no handler of ours runs."""


CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")


@contextlib.contextmanager
def failing(monkeypatch, at, error):
    """The `at`-th call that changes the disk raises; yields a list that holds its name once it has."""
    hit, count = [], 0
    with monkeypatch.context() as patch:

        def fail_in(name, real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == at:
                    hit.append(name)
                    raise error
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            patch.setattr(os, name, fail_in(name, getattr(os, name)))

        def open_to_write(file, mode="r", *args, **kwargs):
            return (opening if "x" in mode else builtins_open)(file, mode, *args, **kwargs)

        builtins_open = builtins.open
        opening = fail_in("open", builtins_open)
        patch.setattr(files, "open", open_to_write, raising=False)
        yield hit


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A replay that went round and as many checkpoints as are kept: a save deletes both kinds of things."""
    run = Run(tmp_path_factory.mktemp("full") / "checkpoints", keep=2, capacity=5)
    for _ in range(4):
        run.save()
    return run


def test_a_kill_at_any_instant_of_a_save_leaves_the_old_or_the_new(full, tmp_path, monkeypatch):
    names, found = set(), []
    for at in range(1, 1000):
        run = copy_of(full, tmp_path / "c")
        assert run.restore() == 12
        step, snapshot = run.advance()
        with failing(monkeypatch, at, Killed()) as hit, contextlib.suppress(Killed):
            run.checkpointer.save(step, snapshot)
        if not hit:
            break
        names.update(hit)
        # Orbax writes a file more or less from one time to the next, so which call publishes varies.
        published = max(run.checkpointer.steps())
        found.append(run.restore())
        assert found[-1] == published
        assert run.save() == published + 3  # and the run goes on
        shutil.rmtree(run.directory)
    assert {"rename", "fsync", "unlink", "mkdir", "open"} <= names
    assert set(found) == {12, 15}
    assert (found[0], found[-1]) == (12, 15)


def test_a_kill_at_any_instant_of_a_restart_leaves_it_as_it_was(two, tmp_path, monkeypatch):
    for at in range(1, 1000):
        run = copy_of(two, tmp_path / "c")
        flip(run.directory / "000000006-0" / "env.bin", 3)
        for aside in ("unusable-000000001-0-0000000a", "unusable-000000001-0-0000000b"):
            (run.directory / aside).mkdir()
        (run.directory / "tmp-000000009-0123abcd" / "state").mkdir(parents=True)
        with failing(monkeypatch, at, Killed()) as hit, contextlib.suppress(Killed):
            run.restore()
        assert run.restore() == 3
        if not hit:
            break
        shutil.rmtree(run.directory)
    assert at > 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_save_that_fails_anywhere_harms_nothing_and_can_be_tried_again(full, tmp_path, monkeypatch, code):
    failed = 0
    for at in range(1, 1000):
        run = copy_of(full, tmp_path / "c")
        run.restore()
        step, snapshot = run.advance()
        with failing(monkeypatch, at, OSError(code, os.strerror(code))) as hit:
            try:
                run.checkpointer.save(step, snapshot)
            except OSError as error:
                failed += os.strerror(code) in str(error)
        if not hit:
            break
        if at % 3 == 0:  # a restart instead
            assert run.restore() in (12, 15)
            shutil.rmtree(run.directory)
            continue
        run.checkpointer.save(step, snapshot)
        assert run.restore() == 15
        assert not list(run.directory.glob("tmp-*"))
        shutil.rmtree(run.directory)
    assert failed > 10


def test_a_vanished_directory_is_made_again_with_the_whole_replay(tmp_path):
    run = Run(tmp_path / "run" / "c")
    run.save()
    shutil.rmtree(tmp_path / "run")
    run.save()
    assert run.restore() == 6
    shutil.rmtree(run.directory / "replay")
    run.save()
    assert run.restore() == 9


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's loops end roughly
def test_a_full_file_system_harms_nothing(tmp_path):
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        run = Run(tmp_path / "c")
        run.save()
        ballast, one = tmp_path / "ballast", shutil.disk_usage(tmp_path).used
        # Free is this share of the space that a checkpoint takes, which Orbax makes vary by a quarter.
        for share in (0, 0.15, 0.3, 0.45, 0.6):
            ballast.write_bytes(bytes(shutil.disk_usage(tmp_path).free - int(share * one)))
            step, snapshot = run.advance(1)
            with pytest.raises(OSError, match="No space left on device"):
                run.checkpointer.save(step, snapshot)
            ballast.unlink()
            time.sleep(0.05)  # Orbax's threads may still be writing
            assert not any(path.is_dir() or path.stat().st_size for path in run.directory.glob("tmp-*"))
            assert len(stored_steps(run.directory)) == 1
            fresh = Checkpointer(run.directory).load_state(state_like)
            assert_same(fresh[0], run.saved[3][0])
        run.checkpointer.save(step, snapshot)
        assert not list(run.directory.glob("tmp-*"))
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        last, snapshot = run.advance(1)
        with pytest.raises(OSError, match="Read-only file system"):
            run.checkpointer.save(last, snapshot)
        assert run.restore() == step
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("full", [0, 3])
def test_what_a_failed_save_left_cannot_come_back(tmp_path, monkeypatch, full):
    """Orbax raises while threads of it still write; also where the empty file fits only at the fourth try."""
    run = Run(tmp_path / "c")
    paths = []

    def broken(save):
        paths.append(run.directory / save._temporary.name)
        (paths[-1] / "state" / "d").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    def touch(path, exist_ok):
        failures.append(path)
        if len(failures) <= full:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(b"")

    failures = []
    with monkeypatch.context() as patch:
        patch.setattr(Save, "_write_checkpoint", broken)
        patch.setattr(Path, "touch", touch)
        for _ in range(2):
            failures.clear()
            with pytest.raises(OSError, match="No space left"):
                run.save()
            with pytest.raises(NotADirectoryError):
                (paths[-1] / "state" / "d").mkdir(parents=True)
            assert len(failures) == full + 1
    assert len(set(paths)) == 2
    assert run.restore() is None
    run.save()
    assert not list(run.directory.glob("tmp-*"))


# In the background


def test_training_goes_on_while_a_save_is_written(tmp_path):
    run = Run(tmp_path / "c")

    @functools.partial(jax.jit, donate_argnums=0)
    def change_in_place(tree):
        return jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, tree)

    for _ in range(3):
        step, snapshot = run.advance()
        state = jax.tree.map(jnp.copy, snapshot.state)
        run.checkpointer.save(step, dataclasses.replace(snapshot, state=state), wait=False)
        change_in_place(state)
        run.replay = push(run.replay, 1)  # donates the arrays that were saved
    run.checkpointer.wait()
    run.checkpointer.wait()
    assert run.restore() == step


def test_a_failure_in_the_background_is_told_once(tmp_path, monkeypatch, caplog):
    run = Run(tmp_path / "c")
    run.save()

    def fail(step, snapshot):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Save, "_write_checkpoint", full)
            run.checkpointer.save(step, snapshot, wait=False)
            with contextlib.suppress(OSError):
                run.checkpointer._writing.result()

    step, snapshot = run.advance()
    fail(step, snapshot)
    with pytest.raises(OSError, match="No space"):
        run.checkpointer.wait()
    fail(step, snapshot)
    assert not caplog.records
    run.checkpointer.save(step, snapshot)
    (record,) = caplog.records
    assert "No space" in record.getMessage()
    assert run.restore() == step


# Run directories from strangers


def forge(checkpoint, change):
    """Rewrites a manifest, with the right checksum."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())["content"]
    change(content)
    text = json.dumps([manifest.FORMAT, content], sort_keys=True).encode()
    whole = {"format": manifest.FORMAT, "crc32": zlib.crc32(text), "content": content}
    path.write_text(json.dumps(whole, sort_keys=True, indent=1) + "\n")


def rename_file(content, old, new):
    content["files"][new] = content["files"].pop(old)


FORGERIES = {
    "no host": lambda c: c.pop("host"),
    "one more field": lambda c: c.update(more=1),
    "host is a list": lambda c: c.update(host=[1]),
    "another step": lambda c: c.update(step=7),
    "step is true": lambda c: c.update(step=True),
    "step is text": lambda c: c.update(step="6"),
    "negative size": lambda c: c["files"]["env.bin"].update(size=-1),
    "size is a fraction": lambda c: c["files"]["env.bin"].update(size=5.0),
    "checksum beyond 32 bits": lambda c: c["files"]["env.bin"].update(crc32=2**32),
    "no env.bin": lambda c: c["files"].pop("env.bin"),
    "file above": lambda c: rename_file(c, "env.bin", "../env.bin"),
    "file far above": lambda c: c["files"].update({"state/../../../canary": {"size": 1, "crc32": 1}}),
    "absolute file": lambda c: c["files"].update({"/etc/passwd": {"size": 1, "crc32": 1}}),
    "segment elsewhere": lambda c: c["segments"][0].update(name="../000000000-000000003-0123abcd.npy"),
    "segment of another name": lambda c: c["segments"][0].update(name="canary.npy"),
    "segment named otherwise": lambda c: c["segments"][0].update(stop=2),
    "gap": lambda c: c["segments"].pop(0),
    "no segments": lambda c: c["segments"].clear(),
    "twice": lambda c: c["segments"].append(c["segments"][-1]),
    "more steps than stored": lambda c: c["replay"].update(inserted=9),
    "steps beyond 32 bits": lambda c: c["replay"].update(inserted=2**40),
    "negative capacity": lambda c: c["replay"].update(capacity=-8),
    "capacity beyond 32 bits": lambda c: c["replay"].update(capacity=2**31),
    "capacity 0": lambda c: c["replay"].update(capacity=0),
    "image of two axes": lambda c: c["replay"].update(image_shape=[4, 4]),
    "image is text": lambda c: c["replay"].update(image_shape="443"),
    "state is a list": lambda c: c.update(state=[]),
    "type of many lines": lambda c: c["state"].update(step="int32[]\nand more"),
    "name of many lines": lambda c: c["state"].update({"a\nb": "int32[]"}),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_manifest_is_stepped_over(kind, two, tmp_path, caplog):
    run = copy_of(two, tmp_path / "c")
    forge(run.directory / "000000006-0", FORGERIES[kind])
    assert_steps_over(run, caplog, "manifest.json is not valid")


def test_forged_arrays_are_not_read(two, tmp_path, caplog):
    """Orbax's own description of the arrays is another than that of the manifest."""
    run = copy_of(two, tmp_path / "c")
    other = Run(tmp_path / "other")
    step, snapshot = other.advance(6)
    large = make_state(width=1000)
    other.checkpointer.save(step, dataclasses.replace(snapshot, state=large))
    shutil.rmtree(run.directory / "000000006-0" / "state")
    shutil.copytree(other.directory / "000000006-0" / "state", run.directory / "000000006-0" / "state")
    theirs = json.loads((other.directory / "000000006-0" / "manifest.json").read_text())["content"]["files"]

    def change(content):
        ours = {name: file for name, file in content["files"].items() if not name.startswith("state/")}
        content["files"] = theirs | ours

    forge(run.directory / "000000006-0", change)
    assert_steps_over(run, caplog, "other arrays than it should")


def test_what_does_not_belong_to_the_state_makes_it_unusable(two, tmp_path, caplog):
    run = copy_of(two, tmp_path / "c")
    (run.directory / "000000006-0" / "state" / "more").write_text("")
    assert_steps_over(run, caplog, "state/more does not belong there")


@pytest.fixture
def canaries(tmp_path):
    """A folder of somebody's files, among them some with names of ours; checked at the end."""
    folder = tmp_path / "home"
    for name in ("replay", "state", "tmp-000000009-0123abcd"):
        (folder / name).mkdir(parents=True)
        (folder / name / "000000000-000000003-0123abcd.npy").write_text("canary")
        (folder / name / "canary.npy").write_text("canary")
    (folder / "manifest.json").write_text("canary")
    before = stored_files(folder), sorted(folder.rglob("*"))
    yield folder
    assert (stored_files(folder), sorted(folder.rglob("*"))) == before
    assert all(path.read_text() == "canary" for path in folder.rglob("*") if path.is_file())


def refused(path):
    """Expects the refusal of a symbolic link, on one line, as errors of the disk and of the user."""
    return pytest.raises(UnsafePathError, match=rf"\A{path} is a symbolic link: refused\Z")


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", ["", "replay"])
def test_a_linked_directory_is_refused_and_not_touched(name, dangling, two, tmp_path, canaries):
    run = copy_of(two, tmp_path / "c")
    step, snapshot = run.advance()
    link = run.directory / name if name else run.directory
    shutil.rmtree(link)
    link.symlink_to(tmp_path / "nothing" if dangling else canaries / name)
    for wait in (True, False):
        with pytest.raises(OSError, match=r"symbolic link|File exists"):
            run.checkpointer.save(step, snapshot, wait)
    with refused(link):
        Checkpointer(run.directory).restore(make_state(), make_replay())
    with refused(link):
        Checkpointer(run.directory).load_state(state_like)
    with refused(link):
        Checkpointer(run.directory).steps()
    assert link.is_symlink()
    assert not (tmp_path / "nothing").exists()


def test_a_linked_checkpoint_is_stepped_over_and_not_touched(two, tmp_path, caplog, canaries):
    run = copy_of(two, tmp_path / "c")
    # Sound in itself: it would be used if it were no link.
    moved = tmp_path / "elsewhere"
    (run.directory / "000000006-0").rename(moved)
    (run.directory / "000000006-0").symlink_to(moved)
    before = stored_files(moved)
    assert Checkpointer(run.directory).load_state(state_like)[1]["env_steps"] == 3
    caplog.clear()
    assert run.restore() == 3
    assert "000000006-0 is a symbolic link: refused" in caplog.text
    for number in range(4):  # unusable ones are deleted in time, and so are old ones
        (run.directory / f"{100 + number:09d}-0").symlink_to(canaries)
        (run.directory / f"{number:09d}-7").symlink_to(canaries)
        assert run.restore() == 3 + 3 * number
        run.save()
    assert run.restore() == 15
    assert stored_files(moved) == before


@pytest.mark.parametrize("name", ["manifest.json", "env.bin", "visits.npy", "state", "state/_METADATA", "d"])
def test_a_linked_file_of_a_checkpoint_is_stepped_over(name, two, tmp_path, caplog):
    run = copy_of(two, tmp_path / "c")
    path = run.directory / "000000006-0" / (f"state/{name}" if name == "d" else name)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert_steps_over(run, caplog, "is a symbolic link: refused")


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_a_segment_that_is_no_file_is_stepped_over(kind, two, tmp_path, caplog):
    run = copy_of(two, tmp_path / "c")
    (path,) = (run.directory / "replay").glob("000000003-*")
    path.rename(tmp_path / "moved")
    if kind == "link":
        path.symlink_to(tmp_path / "moved")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert run.restore() == 3
    assert "refused" in caplog.text
    assert (tmp_path / "moved").stat().st_size > 0


def test_nothing_that_bears_no_name_of_ours_is_deleted(two, tmp_path, canaries):
    run = copy_of(two, tmp_path / "c")
    kept = [
        "tmp-mine",
        "tmp-000000009",
        "unusable-mine",
        "replay/mine.npy",
        "replay/000000000-000000003-mine.npy",
        ".hidden",
    ]
    for name in kept:
        (run.directory / name).write_text("canary")
    for name in ("tmp-000000009-0123abcd", "unusable-000000009-0-0123abcd", "unusable-000000008-0-0123abcd"):
        (run.directory / name).symlink_to(canaries)
    (run.directory / "replay" / "000000000-000000003-0123abcd.npy").symlink_to(canaries / "manifest.json")
    for _ in range(4):
        flip(sorted(run.directory.glob("0*"))[-1] / "env.bin", 3)
        run.restore()
        run.save()
    assert [(run.directory / name).read_text() for name in kept] == ["canary"] * len(kept)
    assert not os.path.lexists(run.directory / "tmp-000000009-0123abcd")
    assert not os.path.lexists(run.directory / "replay" / "000000000-000000003-0123abcd.npy")
