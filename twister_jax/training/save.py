"""One save of a checkpoint, on its way from the device to the disk. See `checkpoint` for what lies where.

A save goes on beside training, and the run's directory may be replaced meanwhile. So a save reaches it by its
descriptor: whatever takes the directory's place is neither written to nor cleared.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from twister_jax import files
from twister_jax.files import HeldDirectory
from twister_jax.replay import segments
from twister_jax.replay.segments import Layout, Segment
from twister_jax.replay.store import Replay
from twister_jax.training import state_files
from twister_jax.training.checkpoint_directory import CheckpointDirectory
from twister_jax.training.manifest import Manifest, order


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


class Save:
    """A save that has copied all it needs off the device; `finish` does what only needs the disk.

    Args:
      held: the directory of the checkpoints.
      keep: checkpoints that stay.
      step: what the checkpoint is named after.
      snapshot: what it holds.
      known: segments on disk that hold steps of this run.

    Raises:
      OSError: it could not be written. What was there is unharmed.
    """

    def __init__(
        self,
        held: HeldDirectory,
        keep: int,
        step: int,
        snapshot: Snapshot,
        known: Sequence[Segment],
    ):
        self._held, self._step, self._known = held, step, known
        self._directory = CheckpointDirectory(held.at, keep, shown=held.shown)
        self._replay = self._directory.replay
        self._temporary = held.at / f"tmp-{step:09d}-{secrets.token_hex(4)}"
        self._segments: list[Segment] = []
        self._rows: np.ndarray | None = None
        """What the next segment is to hold, while it is not written."""
        with self._freeing():
            self._replay.mkdir(exist_ok=True)
            self._directory.remove_temporaries()
            self._layout = layout = Layout.of(snapshot.replay)
            self._state = state_files.fetch(snapshot.state)
            visits = state_files.host_copy(snapshot.replay.visits)
            self._visits = np.ascontiguousarray(visits[:, : layout.size])
            self._env, self._host = snapshot.env, json.loads(json.dumps(snapshot.host))
            self._segments = segments.reusable(self._replay, known, layout)
            at = self._segments[-1].stop if self._segments else layout.oldest
            while at < layout.inserted:
                self._write_segment()  # the one before, so that only one is ever in memory
                stop = min(at + layout.segment, layout.inserted)
                self._rows = snapshot.fetch(snapshot.replay, at, stop)
                at = stop

    def finish(self) -> tuple[Segment, ...]:
        """Writes the rest, makes the checkpoint visible, and clears away what `keep` of them do not need.

        Returns:
          The segments that hold the run's steps now.

        Raises:
          OSError: as the class.
        """
        with self._freeing():
            checkpoints = map(order, self._directory.checkpoints())
            serial = max((serial for step, serial in checkpoints if step == self._step), default=-1) + 1
            final = self._held.at / f"{self._step:09d}-{serial}"
            self._write_segment()
            files.fsync(self._replay, self._held.at)
            self._temporary.mkdir()
            self._write_checkpoint()
            self._held.check()
            os.rename(self._temporary, final)
        with self._held.named_in_errors():
            files.fsync(self._held.at, self._held.at / "..")
            self._directory.delete_superseded(final)
        return tuple(self._segments)

    def _write_segment(self) -> None:
        """Writes the newest segment if it is not on disk yet."""
        if self._rows is not None:
            start = self._segments[-1].stop if self._segments else self._layout.oldest
            self._segments.append(segments.write(self._replay, start, self._rows))
            self._rows = None

    def _write_checkpoint(self) -> None:
        """Fills the directory of the checkpoint, and sees it onto the disk."""
        path = self._temporary
        checksums = {
            "env.bin": files.write_durably(path / "env.bin", self._env),
            "visits.npy": files.write_array(path / "visits.npy", self._visits),
        }
        state_files.write(path / "state", self._state)
        for file in files.regular_files(path / "state"):
            files.fsync(file)
            checksums[file.relative_to(path).as_posix()] = files.checksum_of(file)
        Manifest(
            step=self._step,
            host=self._host,
            state=state_files.describe(self._state),
            replay=self._layout,
            segments=tuple(self._segments),
            files=checksums,
        ).write(path)
        files.fsync(*(p for p in path.rglob("*") if p.is_dir()), path)

    @contextlib.contextmanager
    def _freeing(self) -> Iterator[None]:
        """Where it fails, frees the space, which may be what was lacking."""
        try:
            with self._held.named_in_errors():
                yield
        except Exception:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """The next save removes what is left.

        Orbax raises while threads of it still write, and they make directories that are missing: an empty
        file takes the place of the checkpoint's, so that nothing can come back.
        """
        for _ in range(100 if self._temporary.is_dir() else 0):
            shutil.rmtree(self._temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._temporary.touch(exist_ok=False)
                break
        new = set(self._segments) - set(self._known)
        segments.delete(self._replay, (segment.name for segment in new))
