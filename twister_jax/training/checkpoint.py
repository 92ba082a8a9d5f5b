"""Checkpoints: complete or invisible, cheap to write, checked before they are believed.

    checkpoints/
      000005000-0/        step 5000; a second save at the same step is 000005000-1
        manifest.json     format version, counters, and size and checksum of every file
        state/            the agent's state, written by Orbax
        env.bin           `VectorEnv.get_state()`
        visits.npy        the replay's visit counts
      replay/             segments of stored steps, never changed, shared by all checkpoints
        000000000-000005000-1f0c9a7e.npy
      tmp-*               unfinished, failed or half deleted; removed at the next save or start
      unusable-*          damaged checkpoints that a restart stepped over

A save writes the segments that are not on disk yet, then everything else into a temporary directory, and
makes it visible with one rename. Only then is anything deleted, so that a kill at any instant leaves the
newest complete checkpoint as it was.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from twister_jax.errors import UserError
from twister_jax.replay import Replay

FORMAT = 2
"""Version of the layout above and of what agents keep in their state; raise it when either changes."""

_NAME = re.compile(r"(\d{9,})-(\d+)")
_FIELDS = ("frames", "action", "reward", "terminal", "is_first")
# Steps go to and from the device in pieces of the one size, and lie on disk in files of the other: a save
# takes host memory for the state and one such file, however long the replay.
_CHUNK_BYTES = 16 << 20
_SEGMENT_BYTES = 64 << 20
_UNUSABLE_KEPT = 2

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on as if nothing had happened.

    Attributes:
      state: the agent's pytree of plain arrays.
      replay: the replay store.
      env: `VectorEnv.get_state()`.
      host: counters of the host loop, as JSON can hold them.
    """

    state: Any
    replay: Replay
    env: bytes
    host: dict[str, Any]


class _UnusableError(Exception):
    """Why a checkpoint cannot be used, as a person should read it."""


@dataclasses.dataclass(frozen=True)
class _File:
    """What a file must be to be believed."""

    size: int
    crc32: int

    def check(self, path: Path) -> None:
        """Raises `_UnusableError` unless `path` is that file."""
        size = path.stat().st_size
        if size != self.size:
            raise _UnusableError(f"{path.name} has {size} bytes in place of {self.size}")
        if _crc32_of(path) != self.crc32:
            raise _UnusableError(f"{path.name} is damaged")


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A file with the steps `start` to `stop` (counted as `Replay.inserted` does) of every stream."""

    name: str
    start: int
    stop: int
    file: _File


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """What manifest.json says."""

    host: dict[str, Any]
    state: dict[str, str]
    replay: dict[str, Any]
    segments: tuple[_Segment, ...]
    files: dict[str, _File]


@dataclasses.dataclass
class _Draft:
    """A checkpoint on its way from the device to the disk."""

    step: int
    description: dict[str, Any]
    segments: list[_Segment]
    kept: int
    """How many of `segments` were on disk before."""
    state: dict[str, np.ndarray]
    visits: np.ndarray
    env: bytes
    host: dict[str, Any]
    rows: np.ndarray | None = None
    """What the newest segment is to hold, while it is not written."""
    token: str = dataclasses.field(default_factory=lambda: secrets.token_hex(4))
    """Keeps apart what different attempts and different pasts of the run write."""


class Checkpointer:
    """Writes and reads the checkpoints of one run; one process at a time may write.

    Creating one touches nothing on disk, so that an evaluation can look into a running run's directory.
    """

    def __init__(self, directory: Path, keep: int = 3) -> None:
        self.directory = Path(directory).absolute()
        self.keep = keep
        # The segments that hold the present run's steps so far: what the next save need not write again.
        self._segments: tuple[_Segment, ...] = ()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, usable or not, oldest first."""
        return sorted({step for step, _ in map(_order, self._checkpoints())})

    def save(self, step: int, snapshot: Snapshot, wait: bool = True) -> None:
        """Adds a checkpoint, then deletes what the newest `keep` do not need.

        With `wait` False it returns as soon as everything is copied off the device, so that training can go
        on and donate the arrays; the writing goes on in a thread, and `wait()` says how it ended.

        Raises:
          OSError: it could not be written. Earlier checkpoints are unharmed, and the next call tries anew.
        """
        try:
            self.wait()
        except OSError as error:
            _log.warning("the checkpoint before this one was not written: %s", error)
        draft = self._begin(step, snapshot)
        if wait:
            self._finish(draft)
        else:
            self._writing = self._thread.submit(self._finish, draft)

    def wait(self) -> None:
        """Waits for what `save(..., wait=False)` left to do.

        Raises:
          OSError: it failed, as `save` would have. Said once.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(self, state_like: Any, replay_like: Replay) -> Snapshot | None:
        """The newest usable checkpoint, or None when there is none at all.

        Logs one line for each unusable one that is stepped over, and moves it aside; removes what a killed
        process left behind.

        Args:
          state_like: a state of the same structure; only shapes and types are looked at.
          replay_like: an empty store, or its shapes. Its arrays are donated: filled in place, not copied.

        Raises:
          UserError: there are checkpoints but none is usable, or they belong to another model, another
            replay, or an older or newer program.
        """
        self._remove_temporaries()
        bad: list[Path] = []
        for path in reversed(self._checkpoints()):
            try:
                manifest = _read_manifest(path)
                self._check(path, manifest, manifest.files)
                _compare_state(path, manifest, state_like)
                _compare_replay(path, manifest, replay_like)
                self._check_segments(manifest)
                state = _read_state(path, state_like)
                visits = np.load(path / "visits.npy", allow_pickle=False)
                env = (path / "env.bin").read_bytes()
            except (_UnusableError, OSError) as error:
                _log.warning("checkpoint %s is unusable (%s); trying the one before", path, _line(error))
                bad.append(path)
                continue
            replay = self._read_replay(manifest, replay_like, visits)
            self._segments = manifest.segments
            self._set_aside(bad)
            self._delete_unneeded_segments()
            return Snapshot(state=state, replay=replay, env=env, host=manifest.host)
        self._refuse_if_any(bad)
        return None

    def load_state(self, state_like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """State and counters of one checkpoint, the newest usable by default, without replay or environment.

        Changes nothing on disk.

        Raises:
          UserError: there is no such checkpoint, it is not usable, or it belongs to another model.
        """
        paths = [path for path in self._checkpoints() if step in (None, _order(path)[0])]
        for path in reversed(paths):
            try:
                manifest = _read_manifest(path)
                self._check(path, manifest, (name for name in manifest.files if name.startswith("state/")))
                _compare_state(path, manifest, state_like)
                return _read_state(path, state_like), manifest.host
            except (_UnusableError, OSError) as error:
                _log.warning("checkpoint %s is unusable (%s)", path, _line(error))
        self._refuse_if_any(paths)
        there = ", ".join(map(str, self.steps())) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(
            f"{self.directory} holds {wanted} (there: {there}); train first or name another LOGDIR"
        )

    # Looking at the directory

    def _checkpoints(self) -> list[Path]:
        """Directories of complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=_order)

    def _refuse_if_any(self, unusable: Sequence[Path]) -> None:
        """Raises `UserError` where training anew would bury something."""
        if unusable:
            raise UserError(
                f"none of the {len(unusable)} checkpoints in {self.directory} is usable (reasons above): "
                "put back a sound copy, or delete the run directory or name another LOGDIR to start anew"
            )
        if not self.directory.is_dir():
            return
        known = re.compile(r"replay|(tmp|unusable)-.*|\..*")
        foreign = sorted(p.name for p in self.directory.iterdir() if not known.fullmatch(p.name))
        if foreign and not self._checkpoints():
            raise UserError(
                f"{self.directory} holds {foreign[0]!r}, which is not a checkpoint of this program: "
                "name another LOGDIR, or move it away"
            )

    def _check(self, path: Path, manifest: _Manifest, names: Iterable[str]) -> None:
        for name in names:
            try:
                manifest.files[name].check(path / name)
            except FileNotFoundError:
                raise _UnusableError(f"{name} is missing") from None

    def _check_segments(self, manifest: _Manifest) -> None:
        dtype = _record_type(manifest.replay)
        for segment in manifest.segments:
            path = self.directory / "replay" / segment.name
            try:
                segment.file.check(path)
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
            except FileNotFoundError:
                raise _UnusableError(f"replay/{segment.name} is missing") from None
            except ValueError as error:
                raise _UnusableError(f"replay/{segment.name}: {error}") from None
            shape = (segment.stop - segment.start, manifest.replay["streams"])
            if rows.dtype != dtype or rows.shape != shape:
                raise _UnusableError(f"replay/{segment.name} does not hold the steps it should")

    # Writing

    def _begin(self, step: int, snapshot: Snapshot) -> _Draft:
        """The part of a save that needs the device."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "replay").mkdir(exist_ok=True)
        self._remove_temporaries()
        replay = snapshot.replay
        segments = list(self._segments_on_disk(replay))
        draft = _Draft(
            step=step,
            description=_describe(replay),
            segments=segments,
            kept=len(segments),
            state=_fetch_state(snapshot.state),
            visits=np.ascontiguousarray(_own(replay.visits)[:, : int(replay.size)]),
            env=snapshot.env,
            host=json.loads(json.dumps(snapshot.host)),
        )
        inserted = draft.description["inserted"]
        start = segments[-1].stop if segments else inserted - int(replay.size)
        length = max(1, _SEGMENT_BYTES // _step_bytes(replay))
        try:
            for begin in range(start, inserted, length):
                # The one before goes to disk now: only one segment is ever in memory.
                self._write_segment(draft)
                end = min(begin + length, inserted)
                name = f"{begin:09d}-{end:09d}-{draft.token}.npy"
                segments.append(_Segment(name, begin, end, _File(0, 0)))
                draft.rows = _fetch(replay, begin, end)
        except Exception:
            self._abandon(draft)
            raise
        return draft

    def _finish(self, draft: _Draft) -> None:
        """The rest of a save: everything that only needs the disk."""
        serial = max((s for n, s in map(_order, self._checkpoints()) if n == draft.step), default=-1) + 1
        final = self.directory / f"{draft.step:09d}-{serial}"
        try:
            self._write_segment(draft)
            _fsync(self.directory / "replay", self.directory)
            self._temporary(draft).mkdir()
            _write_checkpoint(self._temporary(draft), draft)
            os.rename(self._temporary(draft), final)
        except Exception:
            self._abandon(draft)
            raise
        self._segments = tuple(draft.segments)
        _fsync(self.directory, self.directory.parent)
        self._delete_superseded(final)

    def _abandon(self, draft: _Draft) -> None:
        """Gives back the space, which may be what was lacking; what stays, the next save removes.

        Orbax raises while threads of it still write, and they make directories that are missing: an empty
        file takes the place of the draft's, so that nothing can come back.
        """
        path = self._temporary(draft)
        for _ in range(100 if path.is_dir() else 0):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.touch(exist_ok=False)
                break
        self._delete_segments(segment.name for segment in draft.segments[draft.kept :])

    def _temporary(self, draft: _Draft) -> Path:
        return self.directory / f"tmp-{draft.step:09d}-{draft.token}"

    def _segments_on_disk(self, replay: Replay) -> tuple[_Segment, ...]:
        """The known segments that still hold live steps; none where any of them has gone."""
        inserted = int(replay.inserted)
        if self._segments and self._segments[-1].stop > inserted:
            return ()  # another run's replay
        oldest = inserted - int(replay.size)
        needed = tuple(segment for segment in self._segments if segment.stop > oldest)
        for segment in needed:
            path = self.directory / "replay" / segment.name
            if not path.is_file() or path.stat().st_size != segment.file.size:
                return ()
        return needed

    def _write_segment(self, draft: _Draft) -> None:
        """Writes the newest segment of `draft` if it is not on disk yet."""
        if draft.rows is not None:
            segment = draft.segments[-1]
            file = _write_array(self.directory / "replay" / segment.name, draft.rows)
            draft.segments[-1] = dataclasses.replace(segment, file=file)
            draft.rows = None

    # Reading

    def _read_replay(self, manifest: _Manifest, like: Replay, visits: np.ndarray) -> Replay:
        inserted, stored_capacity = manifest.replay["inserted"], manifest.replay["capacity"]
        oldest = inserted - min(inserted, stored_capacity)
        capacity = like.capacity
        all_visits = np.zeros(like.visits.shape, np.int32)
        all_visits[:, : visits.shape[1]] = visits
        fields = {name: getattr(like, name) for name in _FIELDS}
        if not isinstance(like.frames, jax.Array):
            fields = _zeros(tuple((name, field.shape, field.dtype) for name, field in fields.items()))
        for segment in manifest.segments:
            rows = np.load(self.directory / "replay" / segment.name, mmap_mode="r", allow_pickle=False)
            at = max(segment.start, oldest)
            while at < segment.stop:
                length = min(_chunk_length(like), segment.stop - at, capacity - at % capacity)
                part = rows[at - segment.start : at - segment.start + length]
                chunk = {name: np.ascontiguousarray(np.swapaxes(part[name], 0, 1)) for name in _FIELDS}
                fields = _put(fields, chunk, at % capacity)
                at += length
        return like.replace(  # type: ignore[attr-defined]
            **fields, visits=jnp.array(all_visits), inserted=jnp.array(inserted, jnp.int32)
        )

    # Deleting

    def _remove_temporaries(self) -> None:
        if self.directory.is_dir():
            for path in self.directory.glob("tmp-*"):
                shutil.rmtree(path, ignore_errors=True)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)  # what a save that failed left: see _abandon

    def _delete_superseded(self, newest: Path) -> None:
        """Deletes what is not among the newest `keep`; failing at it is no failure to save."""
        try:
            older = [path for path in self._checkpoints() if path != newest]
            for path in older[: max(0, len(older) - self.keep + 1)]:
                self._delete(path)
        except OSError as error:
            _log.warning("cannot delete an old checkpoint in %s: %s", self.directory, error)
            return
        self._delete_unneeded_segments()

    def _delete(self, path: Path) -> None:
        """Deletes a checkpoint: invisible first, so that no half of one is ever found."""
        hidden = path.with_name(f"tmp-delete-{path.name}")
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _set_aside(self, paths: Sequence[Path]) -> None:
        """Moves unusable checkpoints out of the way of those that the resumed run will write."""
        try:
            for path in paths:
                os.rename(path, path.with_name(f"unusable-{path.name}-{secrets.token_hex(4)}"))
            aside = sorted(self.directory.glob("unusable-*"), key=lambda p: p.stat().st_mtime)
            for path in aside[: max(0, len(aside) - _UNUSABLE_KEPT)]:
                self._delete(path)
        except OSError as error:
            _log.warning("cannot move an unusable checkpoint in %s away: %s", self.directory, error)

    def _delete_unneeded_segments(self) -> None:
        """Deletes the segments that no checkpoint lists; none while one cannot be asked."""
        try:
            needed = {s.name for path in self._checkpoints() for s in _read_manifest(path).segments}
            there = {path.name for path in (self.directory / "replay").glob("*.npy")}
        except (_UnusableError, UserError, OSError):
            return
        self._delete_segments(there - needed)

    def _delete_segments(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                os.unlink(self.directory / "replay" / name)
            except FileNotFoundError:
                pass
            except OSError as error:
                _log.warning("cannot delete replay segment %s: %s", name, error)


def _write_checkpoint(path: Path, draft: _Draft) -> None:
    """Fills the directory of one checkpoint, and sees it onto the disk."""
    files = {
        "env.bin": _write(path / "env.bin", draft.env),
        "visits.npy": _write_array(path / "visits.npy", draft.visits),
    }
    # Orbax refuses arrays without elements; their shape in the manifest says all about them.
    tree = {name: leaf for name, leaf in draft.state.items() if leaf.size}
    needed, free = sum(leaf.nbytes for leaf in tree.values()), shutil.disk_usage(path).free
    if needed > free:  # found out now, and not after half of it was written
        text = f"{os.strerror(errno.ENOSPC)} ({needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free)"
        raise OSError(errno.ENOSPC, text, str(path))
    try:
        with _quiet_orbax(), _orbax() as orbax:
            orbax.save(path / "state", args=ocp.args.PyTreeSave(tree))
    except OSError:
        raise
    except Exception as error:  # Orbax says of a full disk: ValueError
        raise _as_os_error(error) from error
    for file in sorted(p for p in (path / "state").rglob("*") if p.is_file()):
        _fsync(file)
        files[file.relative_to(path).as_posix()] = _File(file.stat().st_size, _crc32_of(file))
    content = {
        "step": draft.step,
        "host": draft.host,
        "state": {name: _describe_leaf(leaf) for name, leaf in draft.state.items()},
        "replay": draft.description,
        "segments": [dataclasses.asdict(segment) for segment in draft.segments],
        "files": {name: dataclasses.asdict(file) for name, file in files.items()},
    }
    _write(path / "manifest.json", _render(content).encode())
    _fsync(*(p for p in path.rglob("*") if p.is_dir()), path)


# The manifest


def _render(content: dict[str, Any]) -> str:
    """manifest.json: the format, the content, and a checksum of both."""
    whole = {"format": FORMAT, "crc32": _checksum(FORMAT, content), "content": content}
    return json.dumps(whole, sort_keys=True, indent=1) + "\n"


def _checksum(version: int, content: Any) -> int:
    """Format 1 had one of the content alone."""
    return zlib.crc32(json.dumps(content if version == 1 else [version, content], sort_keys=True).encode())


def _read_manifest(path: Path) -> _Manifest:
    """What a checkpoint's manifest says.

    Raises:
      _UnusableError: it is missing, damaged or not ours.
      UserError: an older or newer program wrote it; stepping over it would throw that program's work away.
    """
    try:
        text = (path / "manifest.json").read_text(encoding="utf-8")
        whole = json.loads(text)
        content = whole["content"]
        version = whole["format"]
        if version != FORMAT and _checksum(version, content) == whole["crc32"]:
            age, fix = (
                ("a newer", "upgrade twister_jax") if version > FORMAT else ("an older", "go on with it")
            )
            raise UserError(
                f"{path} was written by {age} twister_jax (checkpoint format {version}, this one reads "
                f"{FORMAT}): {fix}, or name another LOGDIR"
            )
        if text != _render(content):
            raise _UnusableError("manifest.json is damaged")
        segments = tuple(_Segment(**{**s, "file": _File(**s["file"])}) for s in content["segments"])
        files = {name: _File(**file) for name, file in content["files"].items()}
        return _Manifest(content["host"], content["state"], content["replay"], segments, files)
    except FileNotFoundError:
        raise _UnusableError("it has no manifest.json") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _UnusableError("manifest.json is damaged") from None


def _compare_state(path: Path, manifest: _Manifest, state_like: Any) -> None:
    """Raises `UserError` naming the first leaf in which the stored state and `state_like` differ."""
    here = {name: _describe_leaf(leaf) for name, leaf in _named_leaves(state_like).items()}
    for name in (*here, *manifest.state):
        wanted, stored = here.get(name, "absent"), manifest.state.get(name, "absent")
        if wanted != stored:
            raise UserError(
                f"{path} holds another agent or model size: {name} is {stored} there and {wanted} here; "
                "use the settings it was trained with, or name another LOGDIR"
            )


def _compare_replay(path: Path, manifest: _Manifest, like: Replay) -> None:
    """Raises `UserError` unless the stored steps can lie in `like` as they lay."""
    stored, here = manifest.replay, _describe(like)
    for name in ("streams", "image_shape", "num_actions"):
        if stored[name] != here[name]:
            raise UserError(
                f"{path} holds another replay: its {name} is {stored[name]}, here it is {here[name]}; "
                "use the settings it was trained with, or name another LOGDIR"
            )
    inserted = stored["inserted"]
    if stored["capacity"] != like.capacity and inserted > min(stored["capacity"], like.capacity):
        raise UserError(
            f"{path} holds {inserted} steps per stream in a replay of capacity {stored['capacity']}, which "
            f"capacity {like.capacity} cannot take over: keep the stored capacity, or name another LOGDIR"
        )


# The state


def _orbax() -> ocp.Checkpointer:
    # Floats hardly compress; trying costs more than the disk does.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax from logging a page of tracebacks for an error that it raises anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_state(path: Path, state_like: Any) -> Any:
    """The state, on the default device. Its files must have been checked."""
    leaves = _named_leaves(state_like)
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name, leaf in leaves.items() if leaf.size}
    try:
        with _quiet_orbax(), _orbax() as orbax:
            arrays = orbax.restore(path / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        # One by one, so that the host copy of each goes before the next comes. They are not committed to a
        # device, like those of an undisturbed run: a resumed run compiles to the same program.
        restored = [
            jnp.array(arrays.pop(name)) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
            for name, leaf in leaves.items()
        ]
    except Exception as error:  # whatever Orbax and its parts raise
        raise _UnusableError(f"state cannot be read: {_line(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(state_like), restored)


def _fetch_state(state: Any) -> dict[str, np.ndarray]:
    """The leaves of a state on the host, by name."""
    for leaf in jax.tree.leaves(state):
        leaf.copy_to_host_async()
    return {name: _own(leaf) for name, leaf in _named_leaves(state).items()}


def _own(x: jax.Array) -> np.ndarray:
    """A host copy that outlives the array's donation: on the CPU NumPy would look at its very memory."""
    return np.array(x, copy=True) if next(iter(x.devices())).platform == "cpu" else np.asarray(x)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return named


def _describe_leaf(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


# The replay


def _describe(replay: Replay) -> dict[str, Any]:
    """The replay's sizes, and how many steps were inserted where it has values."""
    inserted = int(replay.inserted) if isinstance(replay.inserted, jax.Array) else 0
    return {
        "streams": replay.frames.shape[0],
        "capacity": replay.capacity,
        "image_shape": list(replay.image_shape),
        "num_actions": replay.action.shape[-1],
        "inserted": inserted,
    }


def _record_type(description: dict[str, Any]) -> np.dtype:
    """How one step of one stream lies in a segment."""
    return np.dtype(
        [
            ("frames", np.uint8, (int(np.prod(description["image_shape"])),)),
            ("action", np.float32, (description["num_actions"],)),
            ("reward", np.float32),
            ("terminal", np.bool_),
            ("is_first", np.bool_),
        ]
    )


def _chunk_length(replay: Replay) -> int:
    """Steps that cross between host and device at once."""
    return min(replay.capacity, max(1, _CHUNK_BYTES // _step_bytes(replay)))


def _step_bytes(replay: Replay) -> int:
    return replay.frames.shape[0] * _record_type(_describe(replay)).itemsize


def _fetch(replay: Replay, start: int, stop: int) -> np.ndarray:
    """Steps `start` to `stop`, counted as `inserted` does: records shaped [time, stream]."""
    fields = {name: getattr(replay, name) for name in _FIELDS}
    rows = np.empty((stop - start, replay.frames.shape[0]), _record_type(_describe(replay)))
    chunk = _chunk_length(replay)
    at = start
    while at < stop:
        slot = at % replay.capacity
        # Always a whole chunk, so that one compiled slice serves; what was not asked for is dropped here.
        first = min(slot, replay.capacity - chunk)
        length = min(stop - at, first + chunk - slot)
        part = jax.device_get(_take(fields, first, chunk))
        for name in _FIELDS:
            wanted = part[name][:, slot - first : slot - first + length]
            rows[name][at - start : at - start + length] = np.swapaxes(wanted, 0, 1)
        at += length
    return rows


@functools.partial(jax.jit, static_argnums=2)
def _take(fields: dict[str, jax.Array], first: Any, length: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, axis=1), fields)


@functools.partial(jax.jit, donate_argnums=0)
def _put(fields: dict[str, jax.Array], chunk: dict[str, Any], slot: Any) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x, c: jax.lax.dynamic_update_slice_in_dim(x, c, slot, axis=1), fields, chunk)


@functools.partial(jax.jit, static_argnums=0)
def _zeros(fields: tuple[tuple[str, tuple[int, ...], Any], ...]) -> dict[str, jax.Array]:
    return {name: jnp.zeros(shape, dtype) for name, shape, dtype in fields}


# Files


def _order(path: Path) -> tuple[int, int]:
    """(step, serial) of a checkpoint's directory."""
    step, serial = path.name.split("-")
    return int(step), int(serial)


def _write(path: Path, *parts: Any) -> _File:
    """Writes a file so that it survives a power cut, and returns what it must be from now on."""
    size = crc32 = 0
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            size += len(part)
            crc32 = zlib.crc32(part, crc32)
        file.flush()
        os.fsync(file.fileno())
    return _File(size, crc32)


def _write_array(path: Path, array: np.ndarray) -> _File:
    """The same for a contiguous array, in NumPy's own format."""
    header: list[bytes] = []

    class Collect:
        write = header.append

    np.lib.format.write_array_header_1_0(Collect(), np.lib.format.header_data_from_array_1_0(array))  # type: ignore[arg-type]
    return _write(path, *header, array.reshape(-1).view(np.uint8))


def _crc32_of(path: Path) -> int:
    crc32 = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            crc32 = zlib.crc32(part, crc32)
    return crc32


def _fsync(*paths: Path) -> None:
    """Makes files and directory entries survive a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _as_os_error(error: Exception) -> OSError:
    """What Orbax's own exceptions about the disk mean."""
    text = str(error)
    codes = {os.strerror(code): code for code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)}
    code = next((code for said, code in codes.items() if said in text), errno.EIO)
    return OSError(code, f"{os.strerror(code)} ({_line(error)})")


def _line(error: Exception) -> str:
    """An exception's message on one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
