import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twister_jax.errors import UserError
from twister_jax.files import Checksum, UnsafePathError, UnusableError
from twister_jax.replay import segments, store
from twister_jax.replay.segments import Layout, Segment

IMAGE, ACTIONS, STREAMS = (2, 3, 3), 2, 2
FIELDS = ("frames", "action", "reward", "terminal", "is_first")


def make(capacity, inserted, seed=0):
    """A store after `inserted` steps; what was never inserted is zero."""
    rng = np.random.default_rng(seed)
    shape = (STREAMS, max(inserted, capacity))
    steps = {
        "frames": rng.integers(0, 256, (*shape, int(np.prod(IMAGE))), np.uint8),
        "action": rng.normal(size=(*shape, ACTIONS)).astype(np.float32),
        "reward": rng.normal(size=shape).astype(np.float32),
        "terminal": rng.random(shape) < 0.5,
        "is_first": rng.random(shape) < 0.5,
        "visits": rng.integers(0, 9, shape, np.int32),
    }
    like = store.init(STREAMS, capacity, IMAGE, ACTIONS)
    fields = {}
    for name, values in steps.items():
        held = np.zeros_like(np.asarray(getattr(like, name)))
        for step in range(max(0, inserted - capacity), inserted):
            held[:, step % capacity] = values[:, step]
        fields[name] = jnp.array(held)
    return like.replace(**fields, inserted=jnp.int32(inserted))


def write(replay, directory, stops):
    start, written = Layout.of(replay).oldest, []
    for stop in stops:
        written.append(segments.write(directory, start, segments.fetch(replay, start, stop)))
        start = stop
    return written


@pytest.fixture
def chunks_of_three(monkeypatch):
    record = Layout.of(make(1, 0)).record.itemsize
    monkeypatch.setattr(segments, "_CHUNK_BYTES", 3 * STREAMS * record)


@pytest.mark.parametrize("stops", [[17], [11, 12, 17], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17]])
@pytest.mark.parametrize(("capacity", "shapes"), [(10, False), (10, True), (17, False), (30, True)])
def test_restores_what_was_stored(tmp_path, chunks_of_three, stops, capacity, shapes):
    replay = make(capacity, 17)
    layout = Layout.of(replay)
    parts = write(replay, tmp_path, stops)
    segments.check(tmp_path, parts, layout)
    like = make(capacity, 0)
    visits = np.asarray(replay.visits)[:, : layout.size]
    restored = segments.restore(
        tmp_path, parts, layout, visits, jax.eval_shape(lambda: like) if shapes else like
    )
    assert like.frames.is_deleted() != shapes  # filled in place
    for name in (*FIELDS, "visits", "inserted"):
        stored = getattr(replay, name)
        assert getattr(restored, name).dtype == stored.dtype
        assert np.array_equal(getattr(restored, name), stored), name


def test_steps_move_to_the_slots_of_another_capacity(tmp_path, chunks_of_three):
    replay = make(10, 7)
    parts = write(replay, tmp_path, [2, 7])
    for capacity in (7, 8, 25):
        like = make(capacity, 0)
        segments.compare(tmp_path, Layout.of(replay), like)
        restored = segments.restore(
            tmp_path, parts, Layout.of(replay), np.asarray(replay.visits)[:, :7], like
        )
        for name in FIELDS:
            assert np.array_equal(getattr(restored, name)[:, :7], getattr(replay, name)[:, :7])
            assert not np.any(getattr(restored, name)[:, 7:])
    with pytest.raises(UserError, match=r"7 steps per stream, and here is room for 6: set train\.steps"):
        segments.compare(tmp_path, Layout.of(replay), make(6, 0))


@pytest.mark.parametrize("stops", [[17], [9, 12, 17], [3, 17]])
def test_steps_of_a_replay_that_went_round_move_into_a_larger_one(tmp_path, chunks_of_three, stops):
    """They are counted from the oldest one held, wherever the segments begin."""
    replay, longer = make(10, 17), make(17, 17)
    parts = []
    start = 0
    for stop in stops:
        parts.append(segments.write(tmp_path, start, segments.fetch(longer, start, stop)))
        start = stop
    kept = [part for part in parts if part.stop > 7]
    before = Layout.of(replay)
    for capacity in (10, 11, 25):
        after, moved = segments.for_capacity(kept, before, capacity)
        visits = segments.move_visits(np.asarray(replay.visits), before, after)
        restored = segments.restore(tmp_path, moved, after, visits, make(capacity, 0))
        assert int(restored.inserted) == (17 if capacity == 10 else 10)
        for name in (*FIELDS, "visits"):
            ours, theirs = (store.in_order(each, getattr(each, name)) for each in (restored, replay))
            assert np.array_equal(ours[:, :10], theirs[:, :10]), name
            assert not np.any(ours[:, 10:])


def test_the_number_of_compiled_programs_does_not_depend_on_the_segments(tmp_path, chunks_of_three):
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: events.append(name) if name.endswith("backend_compile_duration") else None
    )
    counts = []
    for number, stops in enumerate([[31], [8, 10, 13, 17, 22, 23, 25, 31], range(5, 32)]):
        replay = make(27, 31)
        directory = tmp_path / str(number)
        directory.mkdir()
        parts = write(replay, directory, stops)
        like, visits = make(27, 0), np.asarray(replay.visits)
        jax.clear_caches()
        events.clear()
        segments.restore(directory, parts, Layout.of(replay), visits, like)
        counts.append(len(events))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] >= 1


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    replay = make(10, 5)
    rows = segments.fetch(replay, 0, 5)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        segments.write(tmp_path, 0, rows)
    assert not list(tmp_path.iterdir())


def test_reusable_segments(tmp_path):
    replay = make(10, 17)
    parts = write(replay, tmp_path, [9, 13, 17])
    layout = Layout.of(replay)
    assert segments.reusable(tmp_path, parts, layout) == parts
    assert segments.reusable(tmp_path, parts, Layout.of(make(10, 19))) == parts[1:]
    assert segments.reusable(tmp_path, parts, Layout.of(make(10, 16))) == []  # those of another past
    os.truncate(tmp_path / parts[1].name, 5)
    assert segments.reusable(tmp_path, parts, layout) == []


def test_damage_is_named(tmp_path):
    replay = make(10, 5)
    (part,) = write(replay, tmp_path, [5])
    path, layout = tmp_path / part.name, Layout.of(replay)
    other = Segment(part.name, 0, 4, part.file)
    with pytest.raises(UnusableError, match="does not hold what it should"):
        segments.check(tmp_path, [other], layout)
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(UnusableError, match=f"{tmp_path.name}/{part.name} is damaged"):
        segments.check(tmp_path, [part], layout)
    path.unlink()
    with pytest.raises(UnusableError, match=f"{tmp_path.name}/{part.name} is missing"):
        segments.check(tmp_path, [part], layout)


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535, bytes(200)])
def test_a_forged_array_is_damage(tmp_path, data):
    name = "000000000-000000005-0123abcd.npy"
    (tmp_path / name).write_bytes(data)
    part = Segment(name, 0, 5, Checksum(len(data), zlib.crc32(data)))
    with pytest.raises(UnusableError, match="cannot be read"):
        segments.check(tmp_path, [part], Layout.of(make(10, 5)))


def test_only_names_of_ours_are_on_disk(tmp_path):
    ours = "000000000-000000005-0123abcd.npy"
    for name in (ours, "mine.npy", f"x{ours}", f"{ours}x", "000000000-000000005-0123ABCD.npy", ".npy"):
        (tmp_path / name).write_text("")
    assert segments.on_disk(tmp_path) == {ours}


def test_segments_are_not_looked_for_behind_a_link(tmp_path):
    """Those that no checkpoint needs are deleted."""
    (tmp_path / "home").mkdir()
    (tmp_path / "replay").symlink_to(tmp_path / "home")
    with pytest.raises(UnsafePathError, match="is a symbolic link: refused"):
        segments.on_disk(tmp_path / "replay")
