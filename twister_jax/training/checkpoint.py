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
import secrets
import shutil
import time
from collections.abc import Callable
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
from twister_jax.training.checkpoint_directory import CheckpointDirectory
from twister_jax.training.manifest import Manifest, order

_PAUSES = (0.1, 0.5, 2.0)  # seconds, before something is read again

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
      visits_lost: their visit counts were damaged, and are 0 in `replay`.
      fetch: copies steps of `replay` to the host, as `segments.fetch` does.
    """

    state: Any
    replay: Replay
    env: bytes
    host: dict[str, Any]
    lost: int = 0
    visits_lost: bool = False
    fetch: Callable[[Replay, int, int], np.ndarray] = segments.fetch


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


class Checkpointer(CheckpointDirectory):
    """Writes and reads the checkpoints of one run; one process at a time may write.

    Creating one touches nothing on disk, so that an evaluation can look into a running run's directory.
    All methods raise `files.UnsafePathError`, which is an `OSError` and a `UserError`, where `directory` or
    its replay/ is a symbolic link.
    """

    def __init__(self, directory: Path, keep: int = 3) -> None:
        super().__init__(directory, keep)
        # The segments that hold the present run's steps so far: what the next save need not write again.
        self._segments: tuple[Segment, ...] = ()
        self.restored: tuple[str, bool] | None = None
        """Name of the checkpoint that `restore` gave, and whether steps of it were lost."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

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
          replay_like: an empty store, or its shapes, which may have shardings. Its arrays are donated:
            filled in place, not copied.

        Raises:
          UserError: there are checkpoints but none is usable, or they belong to another model, another
            replay, or an older or newer program.
        """
        checkpoints = self._checkpoints()
        self._remove_temporaries()
        bad: list[Path] = []
        for path in reversed(checkpoints):
            try:
                snapshot, self._segments = self._read_patiently(path, state_like, replay_like)
                self.restored = (path.name, False)
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
                self.restored = (path.name, True)
                return snapshot
        self._refuse_if_any(bad)
        return None

    def restore_the_same(self, restored: tuple[str, bool], state_like: Any, replay_like: Replay) -> Snapshot:
        """What `restore` of another process gave, which is `restored` of its checkpointer.

        Raises:
          UserError: this process cannot read it.
        """
        name, salvage = restored
        try:
            return self._read(self.directory / name, state_like, replay_like, salvage)[0]
        except (UnusableError, OSError) as error:
            raise UserError(
                f"checkpoint {self.directory / name}, which process 0 reads, cannot be read here "
                f"({one_line(error)}): all processes must see the same file system"
            ) from None

    def _read_patiently(
        self, path: Path, state_like: Any, replay_like: Replay
    ) -> tuple[Snapshot, tuple[Segment, ...]]:
        """`_read`, waiting a little for an error of the disk to pass."""
        for pause in (*_PAUSES, None):
            try:
                return self._read(path, state_like, replay_like, salvage=False)
            except OSError as error:
                if not files.may_pass(error):
                    raise
                if pause is None:
                    raise _not_now(path, error) from None
                time.sleep(pause)
        raise AssertionError

    def _read(
        self, path: Path, state_like: Any, replay_like: Replay, salvage: bool
    ) -> tuple[Snapshot, tuple[Segment, ...]]:
        """A checkpoint, and the segments that it and the next one share."""
        manifest = manifests.read(path)
        stored, kept = manifest.replay, manifest.segments
        manifest.check(path, (name for name in manifest.files if not (salvage and name == "visits.npy")))
        state_files.compare(path, manifest.state, state_like)
        segments.compare(path, stored, replay_like)
        layout, visits = stored, np.zeros((stored.streams, stored.size), np.int32)
        if salvage:
            layout, kept = segments.newest_sound(self._replay, kept, stored, replay_like.capacity)
        else:
            segments.check(self._replay, kept, stored)
            layout, kept = segments.for_capacity(kept, stored, replay_like.capacity)
        visits_lost = False
        try:
            manifest.files["visits.npy"].check(path / "visits.npy")
            visits = files.read_array(path / "visits.npy", np.int32, visits.shape)
        except UnusableError:
            if not salvage:
                raise
            visits_lost = True
        env = files.read(path / "env.bin", manifest.files["env.bin"].size)
        state = state_files.read(path / "state", state_like)
        visits = segments.move_visits(visits, stored, layout)
        replay = segments.restore(self._replay, kept, layout, visits, replay_like)
        lost = max(0, stored.size - layout.size)
        snapshot = Snapshot(state, replay, env, manifest.host, lost, visits_lost)
        return snapshot, kept if layout.inserted == stored.inserted else ()

    def load_state(
        self, state_like: Callable[[dict[str, Any]], Any], step: int | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """State and counters of one checkpoint, the newest usable by default, without replay or environment.

        Changes nothing on disk. `state_like` makes of the counters a state of the same structure. `step` is
        the environment steps behind a checkpoint. Where a run goes on beside, checkpoints come and go: what
        vanishes, or fails in a way that may pass, is looked for again.

        Raises:
          UserError: there is no such checkpoint, it is not usable, or it belongs to another model.
        """
        for pause in (*_PAUSES, None):
            unusable: dict[Path, Exception] = {}
            there: list[int] = []
            for path in reversed(self._checkpoints()):
                try:
                    manifest = manifests.read(path)
                    there.append(manifest.env_steps)
                    if step not in (None, manifest.env_steps):
                        continue
                    manifest.check(path, (name for name in manifest.files if name.startswith("state/")))
                    like = state_like(manifest.host)
                    state_files.compare(path, manifest.state, like)
                    state = state_files.read(path / "state", like)
                except (UnusableError, OSError) as error:
                    if pause is not None and (files.may_pass(error) or not path.exists()):
                        time.sleep(pause)
                        break
                    unusable[path] = error
                    continue
                _warn_of(unusable)
                return state, manifest.host
            else:
                break
        for path, reason in unusable.items():
            if files.may_pass(reason):
                raise _not_now(path, reason)
        _warn_of(unusable)
        if not there or step is None:
            self._refuse_if_any(list(unusable))
        listed = ", ".join(f"{steps:,}" for steps in sorted(set(there))) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step:,}"
        raise UserError(
            f"{self.directory} holds {wanted} (there: {listed}); train first or name another LOGDIR"
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
                draft.rows = snapshot.fetch(snapshot.replay, at, stop)
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


def _warn_of(unusable: dict[Path, Exception]) -> None:
    for path, error in unusable.items():
        _log.warning("checkpoint %s is unusable (%s)", path, one_line(error))


def _not_now(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read now ({one_line(error)}), which does not say that it is damaged: look after "
        "the disk, and run the same command again"
    )
