"""What a run tells: averages kept on the device, `metrics.jsonl`, TensorBoard, pictures, the progress line.

One row of `metrics.jsonl` is a JSON object: `env_steps`, `updates`, `wall_seconds`, then every metric as the
mean over the updates since the row before (null where none was finite), then, if games ended since then,
`episode/score`, `episode/length` (means) and `episode/count`. Rows of a pretraining phase also have `phase`
and `phase_updates`. Everything but `wall_seconds` is the same whenever the same run is repeated.
"""

import json
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct as flax_struct
from jaxtyping import Array, Float, UInt8

from twister_jax.agent import Metrics

# ------------------------------------------------------------------------------------- on the device


@flax_struct.dataclass
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
        """What `to_host` gave."""
        total, count = jax.tree.map(jnp.float32, values)
        return cls(total=total, count=count)


# ------------------------------------------------------------------------------------------- on disk


class MetricsFile:
    """`metrics.jsonl`: appended row by row, cut back to a checkpoint on resumption.

    A row that cannot be written (disk full, directory gone) is kept and written with the next one, so
    that training goes on.
    """

    def __init__(self, path: Path, offset: int = 0, pending: list[str] | None = None):
        """Goes on after the first `offset` bytes; what lies behind them belongs to a lost future."""
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
            with self.path.open("ab") as file:
                if file.tell() > self.offset:
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


def png(picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A picture as a PNG file."""
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row starts with its filter type, 0
    rows[:, 1:] = picture.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


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
        tell: "Progress",
        tensorboard: bool,
        offset: int = 0,
        pending: list[str] | None = None,
        resumed_at: int | None = None,
    ):
        self.directory = directory
        self.file = MetricsFile(directory / "metrics.jsonl", offset, pending)
        self._tell = tell
        self._tensorboard: TensorBoard | None = None
        if error := self.file.flush():
            tell.say(f"metrics.jsonl could not be written ({error}); its rows are kept for the next try")
        if tensorboard:
            try:
                self._tensorboard = TensorBoard(directory, resumed_at)
            except OSError as error:
                self._give_up_tensorboard(error)

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        if error := self.file.write(row):
            self._tell.say(
                f"metrics.jsonl could not be written ({error}); its rows are kept for the next try"
            )

    def plot(self, step: int, values: Mapping[str, float | None]) -> None:
        """Curves in TensorBoard."""
        if self._tensorboard:
            try:
                self._tensorboard.scalars(step, values)
            except OSError as error:
                self._give_up_tensorboard(error)

    def pictures(self, step: int, pictures: Mapping[str, Any]) -> None:
        """PNG files under `pictures/`, and the same in TensorBoard."""
        encoded = {name: (png(np.asarray(picture)), np.shape(picture)) for name, picture in pictures.items()}
        try:
            folder = self.directory / "pictures"
            folder.mkdir(exist_ok=True)
            for name, (data, _) in encoded.items():
                (folder / f"{name.replace('/', '-')}-{step:07d}.png").write_bytes(data)
        except OSError as error:
            self._tell.say(f"pictures could not be written ({error}); training goes on")
        if self._tensorboard:
            try:
                self._tensorboard.pictures(step, encoded)
            except OSError as error:
                self._give_up_tensorboard(error)

    def _give_up_tensorboard(self, error: OSError) -> None:
        self._tensorboard = None
        self._tell.say(f"TensorBoard events could not be written ({error}); none are written from here on")


# ---------------------------------------------------------------------------------------- for people


class Progress:
    """A status line that rewrites itself on a terminal, and a plain line now and then elsewhere."""

    def __init__(self, every_seconds: float = 15.0):
        """`every_seconds`: time between lines where there is no terminal."""
        self._live = sys.stdout.isatty()
        self._every = 0.5 if self._live else every_seconds
        self._next = 0.0
        self._status: Any = None
        self._last = ""

    def due(self) -> bool:
        """Whether it is time for another line."""
        return time.monotonic() >= self._next

    def update(self, line: str) -> None:
        """Shows where the run stands."""
        self._next = time.monotonic() + self._every
        if not self._live:
            if line != self._last:
                print(line, flush=True)
            self._last = line
            return
        from rich.console import Console
        from rich.markup import escape

        if self._status is None:
            self._status = Console().status("", spinner="dots")
            self._status.start()
        self._status.update(escape(line))

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._status is None:
            print(line, flush=True)
        else:
            self._status.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Gives the terminal back."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def duration(seconds: float) -> str:
    """`2h13m`, `4m05s` or `12s`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
