"""Checkpoints: complete or invisible, cheap to write, checked before they are trusted.

    checkpoints/
      000005000-0/        step 5000; a second save at the same step is 000005000-1
        manifest.json     format version, counters, and size and checksum of every file
        state/            the agent's state, written by Orbax
        env.bin           `VectorEnv.get_state()`
        visits.npy        the replay's visit counts
      replay/             stored steps, shared by all checkpoints (`twister_jax.replay.segments`)
      tmp-*               unfinished, failed or half deleted; removed at the next save or start
      unusable-*          damaged checkpoints that a restart stepped over

A save writes the segments that are not on disk yet, then everything else into a temporary directory, and
makes it visible with one rename. Only then is anything deleted, so that a kill at any instant leaves the
newest complete checkpoint as it was.

The directory may come from a stranger: nothing is opened through a symbolic link, and what has none of the
names above is neither opened nor deleted.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.files import UnusableError, one_line
from twister_jax.replay import segments
from twister_jax.replay.segments import Layout, Segment
from twister_jax.replay.store import Replay
from twister_jax.training import manifest as manifests
from twister_jax.training import state_files
from twister_jax.training.manifest import CHECKPOINT_NAME, Manifest, order

_TEMPORARY_NAME = re.compile(r"tmp-(\d{9,}|delete)-[0-9a-f]{8}", re.ASCII)
_UNUSABLE_NAME = re.compile(r"unusable-\d{9,}-\d+-[0-9a-f]{8}", re.ASCII)
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
      lost: steps per stream that were damaged on disk, or older than such, and are not in `replay`.
    """

    state: Any
    replay: Replay
    env: bytes
    host: dict[str, Any]
    lost: int = 0


@dataclasses.dataclass
class _Draft:
    """A checkpoint on its way from the device to the disk."""

    step: int
    state: dict[str, np.ndarray]
    layout: Layout
    visits: np.ndarray
    env: bytes
    host: dict[str, Any]
    segments: list[Segment]
    """Those on disk."""
    rows: np.ndarray | None = None
    """What the next segment is to hold, while it is not written."""
    temporary: Path = Path()


class Checkpointer:
    """Writes and reads the checkpoints of one run; one process at a time may write.

    Creating one touches nothing on disk, so that an evaluation can look into a running run's directory.
    All methods raise `files.UnsafePathError`, which is an `OSError` and a `UserError`, where `directory` or
    its replay/ is a symbolic link.
    """

    def __init__(self, directory: Path, keep: int = 3) -> None:
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._replay = self.directory / "replay"
        # The segments that hold the present run's steps so far: what the next save need not write again.
        self._segments: tuple[Segment, ...] = ()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, usable or not, oldest first."""
        return sorted({step for step, _ in map(order, self._checkpoints())})

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
        process left. Where none is usable because stored steps are damaged, which all share, the newest one
        is restored without those and older ones; then nothing is moved or deleted.

        Args:
          state_like: a state of the same structure; only shapes and types are looked at.
          replay_like: an empty store, or its shapes. Its arrays are donated: filled in place, not copied.

        Raises:
          UserError: there are checkpoints but none is usable, or they belong to another model, another
            replay, or an older or newer program.
        """
        checkpoints = self._checkpoints()
        self._remove_temporaries()
        bad: list[Path] = []
        for path in reversed(checkpoints):
            try:
                snapshot, self._segments = self._read(path, state_like, replay_like, salvage=False)
            except (UnusableError, OSError) as error:
                _log.warning("checkpoint %s is unusable (%s); trying the one before", path, one_line(error))
                bad.append(path)
                continue
            self._set_aside(bad)
            self._delete_unneeded_segments()
            return snapshot
        for path in bad:
            with contextlib.suppress(UnusableError, OSError):
                snapshot, self._segments = self._read(path, state_like, replay_like, salvage=True)
                return snapshot
        self._refuse_if_any(bad)
        return None

    def _read(
        self, path: Path, state_like: Any, replay_like: Replay, salvage: bool
    ) -> tuple[Snapshot, tuple[Segment, ...]]:
        """A checkpoint, and the segments that it and the next one share."""
        manifest = manifests.read(path)
        layout, kept = manifest.replay, manifest.segments
        _check(path, manifest, (name for name in manifest.files if not (salvage and name == "visits.npy")))
        state_files.compare(path, manifest.state, state_like)
        segments.compare(path, layout, replay_like)
        if salvage:
            layout, kept = segments.newest_sound(self._replay, kept, layout)
            visits = np.zeros((layout.streams, layout.size), np.int32)
        else:
            segments.check(self._replay, kept, layout)
            visits = files.read_array(path / "visits.npy", np.int32, (layout.streams, layout.size))
        env = files.read(path / "env.bin", manifest.files["env.bin"].size)
        state = state_files.read(path / "state", state_like)
        replay = segments.restore(self._replay, kept, layout, visits, replay_like)
        lost = manifest.replay.size - layout.size
        return Snapshot(state, replay, env, manifest.host, lost), () if salvage else kept

    def load_state(
        self, state_like: Callable[[dict[str, Any]], Any], step: int | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """State and counters of one checkpoint, the newest usable by default, without replay or environment.

        Changes nothing on disk. `state_like` makes of the counters a state of the same structure.

        Raises:
          UserError: there is no such checkpoint, it is not usable, or it belongs to another model.
        """
        paths = [path for path in self._checkpoints() if step in (None, order(path)[0])]
        for path in reversed(paths):
            try:
                manifest = manifests.read(path)
                _check(path, manifest, (name for name in manifest.files if name.startswith("state/")))
                like = state_like(manifest.host)
                state_files.compare(path, manifest.state, like)
                return state_files.read(path / "state", like), manifest.host
            except (UnusableError, OSError) as error:
                _log.warning("checkpoint %s is unusable (%s)", path, one_line(error))
        self._refuse_if_any(paths)
        there = ", ".join(map(str, self.steps())) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(
            f"{self.directory} holds {wanted} (there: {there}); train first or name another LOGDIR"
        )

    # Looking at the directory

    def _paths(self, name: re.Pattern[str]) -> list[Path]:
        """What has such a name; nothing where the directory is missing."""
        for path in (self.directory, self._replay):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                files.check_directory(path)
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if name.fullmatch(path.name)]

    def _checkpoints(self) -> list[Path]:
        """Directories of complete checkpoints, oldest first."""
        return sorted(self._paths(CHECKPOINT_NAME), key=order)

    def _refuse_if_any(self, unusable: Sequence[Path]) -> None:
        """Raises `UserError` where training anew would bury something."""
        if unusable:
            raise UserError(
                f"none of the {len(unusable)} checkpoints in {self.directory} is usable (reasons above): "
                "put back a sound copy, or name another LOGDIR to start anew"
            )
        known = re.compile(r"replay|(tmp|unusable)-.*|\..*")
        foreign = sorted(
            p.name for p in self._paths(re.compile(".*", re.DOTALL)) if not known.fullmatch(p.name)
        )
        if foreign and not self._checkpoints():
            raise UserError(
                f"{self.directory} holds {foreign[0]!r}, which is not a checkpoint of this program: "
                "name another LOGDIR, or move it away"
            )

    # Writing

    def _begin(self, step: int, snapshot: Snapshot) -> _Draft:
        """The part of a save that needs the device."""
        self.directory.mkdir(parents=True, exist_ok=True)
        files.check_directory(self.directory)
        self._replay.mkdir(exist_ok=True)
        self._remove_temporaries()
        layout = Layout.of(snapshot.replay)
        draft = _Draft(
            step=step,
            state=state_files.fetch(snapshot.state),
            layout=layout,
            visits=np.ascontiguousarray(state_files.host_copy(snapshot.replay.visits)[:, : layout.size]),
            env=snapshot.env,
            host=json.loads(json.dumps(snapshot.host)),
            segments=segments.reusable(self._replay, self._segments, layout),
            temporary=self.directory / f"tmp-{step:09d}-{secrets.token_hex(4)}",
        )
        at = draft.segments[-1].stop if draft.segments else layout.oldest
        try:
            while at < layout.inserted:
                self._write_segment(draft)  # the one before, so that only one is ever in memory
                stop = min(at + layout.segment, layout.inserted)
                draft.rows = segments.fetch(snapshot.replay, at, stop)
                at = stop
        except Exception:
            self._abandon(draft)
            raise
        return draft

    def _finish(self, draft: _Draft) -> None:
        """The rest of a save: everything that only needs the disk."""
        try:
            serial = max((s for n, s in map(order, self._checkpoints()) if n == draft.step), default=-1) + 1
            final = self.directory / f"{draft.step:09d}-{serial}"
            self._write_segment(draft)
            files.fsync(self._replay, self.directory)
            draft.temporary.mkdir()
            _write_checkpoint(draft.temporary, draft)
            os.rename(draft.temporary, final)
        except Exception:
            self._abandon(draft)
            raise
        self._segments = tuple(draft.segments)
        files.fsync(self.directory, self.directory.parent)
        self._delete_superseded(final)

    def _write_segment(self, draft: _Draft) -> None:
        """Writes the newest segment of `draft` if it is not on disk yet."""
        if draft.rows is not None:
            start = draft.segments[-1].stop if draft.segments else draft.layout.oldest
            draft.segments.append(segments.write(self._replay, start, draft.rows))
            draft.rows = None

    def _abandon(self, draft: _Draft) -> None:
        """Frees the space, which may be what was lacking; the next save removes what is left.

        Orbax raises while threads of it still write, and they make directories that are missing: an empty
        file takes the place of the draft's, so that nothing can come back.
        """
        path = draft.temporary
        for _ in range(100 if path.is_dir() else 0):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.touch(exist_ok=False)
                break
        new = set(draft.segments) - set(self._segments)
        segments.delete(self._replay, (segment.name for segment in new))

    # Deleting. `shutil.rmtree` neither follows links nor deletes through them.

    def _remove_temporaries(self) -> None:
        for path in self._paths(_TEMPORARY_NAME):
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
        hidden = path.with_name(f"tmp-delete-{secrets.token_hex(4)}")
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _set_aside(self, paths: Sequence[Path]) -> None:
        """Moves unusable checkpoints out of the way of those that the resumed run will write."""
        try:
            for path in paths:
                os.rename(path, path.with_name(f"unusable-{path.name}-{secrets.token_hex(4)}"))
            aside = sorted(self._paths(_UNUSABLE_NAME), key=lambda path: path.lstat().st_mtime)
            for path in aside[: max(0, len(aside) - _UNUSABLE_KEPT)]:
                self._delete(path)
        except OSError as error:
            _log.warning("cannot move an unusable checkpoint in %s away: %s", self.directory, error)

    def _delete_unneeded_segments(self) -> None:
        """Deletes the segments that no checkpoint lists; none while one cannot be asked."""
        try:
            needed = {s.name for path in self._checkpoints() for s in manifests.read(path).segments}
            there = segments.on_disk(self._replay)
        except (UnusableError, UserError, OSError):
            return
        segments.delete(self._replay, there - needed)


def _write_checkpoint(path: Path, draft: _Draft) -> None:
    """Fills the directory of one checkpoint, and sees it onto the disk."""
    checksums = {
        "env.bin": files.write_durably(path / "env.bin", draft.env),
        "visits.npy": files.write_array(path / "visits.npy", draft.visits),
    }
    state_files.write(path / "state", draft.state)
    for file in files.regular_files(path / "state"):
        files.fsync(file)
        checksums[file.relative_to(path).as_posix()] = files.checksum_of(file)
    Manifest(
        step=draft.step,
        host=draft.host,
        state=state_files.describe(draft.state),
        replay=draft.layout,
        segments=tuple(draft.segments),
        files=checksums,
    ).write(path)
    files.fsync(*(p for p in path.rglob("*") if p.is_dir()), path)


def _check(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raises `UnusableError` or `OSError` unless those files of a checkpoint are as they were written."""
    # Orbax opens by itself what lies below state/: there must be nothing else.
    there = {file.relative_to(path).as_posix() for file in files.regular_files(path / "state")}
    for name in sorted(there - manifest.files.keys()):
        raise UnusableError(f"{name} does not belong there")
    for name in names:
        manifest.files[name].check(path / name)
