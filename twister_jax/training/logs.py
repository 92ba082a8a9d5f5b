"""What a run writes for people and plots: averages, `metrics.jsonl`, TensorBoard, pictures.

One row of `metrics.jsonl` is a JSON object: `env_steps`, `updates`, `wall_seconds`, then every metric as the
mean over the updates since the row before (null where none was finite), then, if games ended since then,
`episode/score`, `episode/length` (means) and `episode/count`. Rows of a pretraining phase also have `phase`
and `phase_updates`. Everything but `wall_seconds` is the same whenever the same run is repeated.
"""

import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, UInt8
from PIL import Image

from twister_jax import files
from twister_jax.agents.base import Metrics
from twister_jax.training.progress import Progress

# ------------------------------------------------------------------------------------- on the device


@struct.dataclass
class Averages:
    """Running sums of metrics, so that nothing waits for a number that nobody reads yet."""

    total: dict[str, Float[Array, ""]]
    count: dict[str, Float[Array, ""]]
    """How many finite values went into each."""

    @classmethod
    def empty(cls, metrics: Mapping[str, Any]) -> "Averages":
        """No values yet, for the names in `metrics`."""
        return cls(
            total={name: jnp.zeros((), jnp.float32) for name in metrics},
            count={name: jnp.zeros((), jnp.float32) for name in metrics},
        )

    def add(self, metrics: Metrics) -> "Averages":
        """One update's metrics; values that are not finite are left out."""
        finite = {name: jnp.isfinite(value) for name, value in metrics.items()}
        return Averages(
            total={
                name: self.total[name] + jnp.where(finite[name], metrics[name], 0.0) for name in self.total
            },
            count={name: self.count[name] + finite[name] for name in self.count},
        )

    def means(self) -> dict[str, float | None]:
        """Waits for the device and gives the averages; None where no value was finite."""
        total, count = jax.device_get((self.total, self.count))
        return {name: float(total[name] / count[name]) if count[name] else None for name in total}

    def to_host(self) -> list[dict[str, float]]:
        """The sums and counts as JSON can hold them, exactly."""
        return jax.tree.map(float, list(jax.device_get((self.total, self.count))))

    @classmethod
    def from_host(cls, values: list[dict[str, float]]) -> "Averages":
        """What `to_host` gave; raises `ValueError`, `TypeError` or `AttributeError` for anything else."""
        total, count = ({str(name): jnp.float32(float(x)) for name, x in sums.items()} for sums in values)
        if total.keys() != count.keys():
            raise ValueError("averages of other metrics than their counts")
        return cls(total=total, count=count)


# ------------------------------------------------------------------------------------------- on disk


class MetricsFile:
    """`metrics.jsonl`: appended row by row, cut back to a checkpoint on resumption.

    A row that cannot be written (disk full, directory gone) is kept and written with the next one, so
    that training goes on.
    """

    def __init__(self, path: Path, offset: int = 0, pending: list[str] | None = None):
        """Goes on after the first `offset` bytes; what follows is newer than the checkpoint."""
        self.path = path
        self.offset = offset
        self.pending = list(pending or [])

    def write(self, row: Mapping[str, Any]) -> OSError | None:
        """Appends a row; returns what went wrong, if anything."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.pending.append(json.dumps(clean, allow_nan=False) + "\n")
        return self.flush()

    def flush(self) -> OSError | None:
        """Writes what is pending; returns what went wrong, if anything."""
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with files.open_regular(self.path, "ab", flags) as file:
                if file.seek(0, os.SEEK_END) > self.offset:
                    file.truncate(self.offset)
                file.seek(0, os.SEEK_END)
                start = file.tell()
                data = "".join(self.pending).encode()
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error
        self.offset = start + len(data)
        self.pending.clear()
        return None


class TensorBoard:
    """Scalars and pictures for TensorBoard.

    tensorboardX's own `SummaryWriter` writes from a thread that dies on a full disk and then blocks its
    caller, so the events are written from here, and given up for the rest of the run when that fails.
    """

    def __init__(self, directory: Path, resumed_at: int | None = None):
        """Opens an event file; what TensorBoard shows from step `resumed_at` on is taken back."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.time_ns() % 10**9}")
        if resumed_at is not None:
            from tensorboardX.proto.event_pb2 import SessionLog

            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(self._event(wall_time=time.time(), step=resumed_at, session_log=start))
            self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point for each value."""
        points = [
            self._summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
            if value is not None
        ]
        self._add(step, points)

    def pictures(self, step: int, encoded: Mapping[str, tuple[bytes, tuple[int, ...]]]) -> None:
        """PNG files with their shapes."""
        values = []
        for tag, (data, (height, width, channels)) in encoded.items():
            image = self._summary.Image(
                height=height, width=width, colorspace=channels, encoded_image_string=data
            )
            values.append(self._summary.Value(tag=tag, image=image))
        self._add(step, values)

    def _add(self, step: int, values: list[Any]) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()


class Log:
    """Everything a run writes for people and plots; no failure of the disk stops it."""

    def __init__(
        self,
        directory: Path,
        progress: Progress,
        tensorboard: bool,
        offset: int = 0,
        pending: list[str] | None = None,
        resumed_at: tuple[int, int] | None = None,
    ):
        """`resumed_at`: agent steps and pretraining updates behind a resumed run."""
        self.directory = directory
        self.file = MetricsFile(directory / "metrics.jsonl", offset, pending)
        self._progress, self._tensorboard = progress, tensorboard
        self._resumed_at = resumed_at
        self._writers: dict[bool, TensorBoard] = {}
        self._say_if_failed(self.file.flush())

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        self._say_if_failed(self.file.write(row))

    def _say_if_failed(self, error: OSError | None) -> None:
        if error:
            self._progress.say(
                f"metrics.jsonl could not be written ({error}); its rows are kept for the next try"
            )

    def plot(self, env_steps: int, values: Mapping[str, float | None]) -> None:
        """Curves in TensorBoard."""
        self._write_events(False, lambda writer: writer.scalars(env_steps, values))

    def plot_pretraining(self, updates: int, values: Mapping[str, float | None]) -> None:
        """The same over pretraining updates, in pretraining/: a resumption takes back points by one count."""
        self._write_events(True, lambda writer: writer.scalars(updates, values))

    def pictures(self, step: int, pictures: Mapping[str, Any]) -> None:
        """PNG files under `pictures/`, and the same in TensorBoard."""
        encoded = {name: (_png(np.asarray(picture)), np.shape(picture)) for name, picture in pictures.items()}
        try:
            folder = self._folder("pictures")
            for name, (data, _) in encoded.items():
                files.write_atomically(folder / f"{name.replace('/', '-')}-{step:07d}.png", data)
        except OSError as error:
            self._progress.say(f"pictures could not be written ({error}); training goes on")
        self._write_events(False, lambda writer: writer.pictures(step, encoded))

    def _folder(self, name: str) -> Path:
        folder = self.directory / name
        folder.mkdir(exist_ok=True)
        files.check_directory(folder)
        return folder

    def _write_events(self, pretraining: bool, write: Callable[[TensorBoard], None]) -> None:
        if not self._tensorboard:
            return
        try:
            if pretraining not in self._writers:
                directory = self._folder("pretraining") if pretraining else self.directory
                resumed_at = None if self._resumed_at is None else self._resumed_at[pretraining]
                self._writers[pretraining] = TensorBoard(directory, resumed_at)
            write(self._writers[pretraining])
        except OSError as error:
            self._tensorboard = False
            self._progress.say(
                f"TensorBoard events could not be written ({error}); none are written from here on"
            )


def _png(picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
