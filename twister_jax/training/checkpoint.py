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
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.files import HeldDirectory, UnusableError, one_line
from twister_jax.replay import segments
from twister_jax.replay.segments import Segment
from twister_jax.replay.store import Replay
from twister_jax.training import manifest as manifests
from twister_jax.training import state_files
from twister_jax.training.checkpoint_directory import CheckpointDirectory
from twister_jax.training.save import Save, Snapshot

_PAUSES = (0.1, 0.5, 2.0)  # seconds, before something is read again
_MOST_REPLACED = 100  # checkpoints that vanish, one after the other, while they are read

_log = logging.getLogger(__name__)


class Checkpointer(CheckpointDirectory):
    """Writes and reads the checkpoints of one run; one process at a time may write.

    Creating one touches nothing on disk, so that an evaluation can look into a running run's directory.
    All methods raise `files.UnsafePathError`, which is an `OSError` and a `UserError`, where `directory` or
    its replay/ is a symbolic link.
    """

    def __init__(self, directory: Path, keep: int = 3, check_held: Callable[[], None] = lambda: None) -> None:
        """`check_held` raises where the directory that `directory` lies in is not this run's any more."""
        super().__init__(directory, keep)
        self._check_held = check_held
        self._held: HeldDirectory | None = None
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
        save = Save(self._hold(), self.keep, step, snapshot, self._segments)
        if wait:
            self._finish(save)
        else:
            self._writing = self._thread.submit(self._finish, save)

    def _hold(self) -> HeldDirectory:
        """The directory, made where it is missing and looked for anew: it may have been replaced."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with HeldDirectory(self.directory.parent, follow=True) as run, run.named_in_errors():
            self._check_held()  # now that it is open, so it is this one
            path = run.at / self.directory.name
            path.mkdir(exist_ok=True)
            held = HeldDirectory(path, shown=self.directory)
        # The same descriptor as long as it serves: threads of Orbax may still write through it.
        if self._held is None or not self._held.is_same(held):
            self._held = held
        return self._held

    def _finish(self, save: Save) -> None:
        self._segments = save.finish()

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
        checkpoints = self.checkpoints()
        self._check_held()
        self.remove_temporaries()
        bad: list[Path] = []
        for path in reversed(checkpoints):
            try:
                snapshot, self._segments = self._read_patiently(path, state_like, replay_like)
                self.restored = (path.name, False)
            except (UnusableError, OSError) as error:
                _log.warning("checkpoint %s is unusable (%s); trying the one before", path, one_line(error))
                bad.append(path)
                continue
            self._check_held()
            self.set_aside(bad)
            self.delete_unneeded_segments()
            return snapshot
        for path in bad:
            with contextlib.suppress(UnusableError, OSError):
                snapshot, self._segments = self._read(path, state_like, replay_like, salvage=True)
                self.restored = (path.name, True)
                return snapshot
        self.refuse_if_any(bad)
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
            layout, kept = segments.newest_sound(self.replay, kept, stored, replay_like.capacity)
        else:
            segments.check(self.replay, kept, stored)
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
        replay = segments.restore(self.replay, kept, layout, visits, replay_like)
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
        pauses, replaced = list(_PAUSES), 0
        while True:
            unusable: dict[Path, Exception] = {}
            there: list[int] = []
            for path in reversed(self.checkpoints()):
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
                    vanished = not os.path.exists(path)  # of pathlib, a disk's error raises
                    if vanished and not files.may_pass(error) and replaced < _MOST_REPLACED:
                        replaced += 1  # a newer one is there already
                        break
                    if files.may_pass(error) and pauses:
                        time.sleep(pauses.pop(0))
                        break
                    unusable[path] = error
                    continue
                _warn_of(unusable)
                return state, manifest.host
            else:
                break
        for path, reason in unusable.items():
            if files.may_pass(reason) or not os.path.exists(path):
                raise _not_now(path, reason)
        _warn_of(unusable)
        if not there or step is None:
            self.refuse_if_any(list(unusable))
        listed = ", ".join(f"{steps:,}" for steps in sorted(set(there))) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step:,}"
        raise UserError(
            f"{self.directory} holds {wanted} (there: {listed}); train first or name another LOGDIR"
        )


def _warn_of(unusable: dict[Path, Exception]) -> None:
    for path, error in unusable.items():
        _log.warning("checkpoint %s is unusable (%s)", path, one_line(error))


def _not_now(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read now ({one_line(error)}), which does not say that it is damaged: look after "
        "the disk, and run the same command again"
    )
