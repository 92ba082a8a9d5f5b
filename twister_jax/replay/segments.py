"""Stored steps on disk: files that are written once, never changed, and shared by all checkpoints.

    000000000-000005000-1f0c9a7e.npy

holds the steps 0 to 5000 of every stream, counted as `Replay.inserted` does, as records [time, stream]. The
last part of a name keeps apart what different attempts and different pasts of a run wrote.
"""

import dataclasses
import functools
import logging
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.files import Checksum, UnusableError
from twister_jax.replay.store import Replay

NAME = re.compile(r"(\d{9,})-(\d{9,})-[0-9a-f]{8}\.npy", re.ASCII)
"""Nothing of another name is ever opened or deleted."""

_FIELDS = ("frames", "action", "reward", "terminal", "is_first")
# Steps go to and from the device in pieces of the one size, and lie on disk in files of the other: a save
# takes host memory for one such file, however long the replay.
_CHUNK_BYTES = 16 << 20
_SEGMENT_BYTES = 64 << 20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A file with the steps `start` to `stop` of every stream."""

    name: str
    start: int
    stop: int
    file: Checksum


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes of a replay, and how many steps were inserted."""

    streams: int
    capacity: int
    image_shape: tuple[int, ...]
    num_actions: int
    inserted: int

    @classmethod
    def of(cls, replay: Replay) -> "Layout":
        """The layout of a store; a store of shapes alone holds no steps."""
        return cls(
            streams=replay.frames.shape[0],
            capacity=replay.capacity,
            image_shape=tuple(replay.image_shape),
            num_actions=replay.action.shape[-1],
            inserted=int(replay.inserted) if isinstance(replay.inserted, jax.Array) else 0,
        )

    @property
    def size(self) -> int:
        """Steps each stream holds."""
        return min(self.inserted, self.capacity)

    @property
    def oldest(self) -> int:
        """The oldest step that is held."""
        return self.inserted - self.size

    @property
    def record(self) -> np.dtype:
        """How one step of one stream lies in a segment."""
        return np.dtype(
            [
                ("frames", np.uint8, (int(np.prod(self.image_shape)),)),
                ("action", np.float32, (self.num_actions,)),
                ("reward", np.float32),
                ("terminal", np.bool_),
                ("is_first", np.bool_),
            ]
        )

    @property
    def chunk(self) -> int:
        """Steps that cross between host and device at once."""
        return min(self.capacity, max(1, _CHUNK_BYTES // (self.streams * self.record.itemsize)))

    @property
    def segment(self) -> int:
        """Steps that a segment holds at most."""
        return max(1, _SEGMENT_BYTES // (self.streams * self.record.itemsize))


# To disk


def fetch(replay: Replay, start: int, stop: int) -> np.ndarray:
    """Steps `start` to `stop`, which the store must hold, as records [time, stream]."""
    layout = Layout.of(replay)
    fields = {name: getattr(replay, name) for name in _FIELDS}
    rows = np.empty((stop - start, layout.streams), layout.record)
    at = start
    while at < stop:
        slot = at % layout.capacity
        # Always a whole chunk, so that one compiled slice serves; what was not asked for is dropped here.
        first = min(slot, layout.capacity - layout.chunk)
        length = min(stop - at, first + layout.chunk - slot)
        take = _take if replay.frames.is_fully_addressable else _take_everywhere(replay.frames.sharding)
        part = jax.device_get(take(fields, first, layout.chunk))
        for name in _FIELDS:
            wanted = part[name][:, slot - first : slot - first + length]
            rows[name][at - start : at - start + length] = np.swapaxes(wanted, 0, 1)
        at += length
    return rows


def write(directory: Path, start: int, rows: np.ndarray) -> Segment:
    """Writes what `fetch` gave; `start` is its first step. Where it raises `OSError` it leaves nothing."""
    stop = start + len(rows)
    name = f"{start:09d}-{stop:09d}-{secrets.token_hex(4)}.npy"
    return Segment(name, start, stop, files.write_array(directory / name, rows))


def reusable(directory: Path, known: Sequence[Segment], layout: Layout) -> list[Segment]:
    """Segments of `known` that hold steps of the store; none if one is missing or another run's."""
    if known and known[-1].stop > layout.inserted:
        return []
    needed = [segment for segment in known if segment.stop > layout.oldest]
    there = all(
        (directory / segment.name).is_file()
        and (directory / segment.name).stat().st_size == segment.file.size
        for segment in needed
    )
    return needed if there else []


def on_disk(directory: Path) -> set[str]:
    """Names of the segments in a directory. Raises `OSError`, also where the directory is a link."""
    files.check_directory(directory)
    return {name for name in os.listdir(directory) if NAME.fullmatch(name)}


def delete(directory: Path, names: Iterable[str]) -> None:
    """Deletes segments; logs those that it cannot delete."""
    for name in names:
        try:
            os.unlink(directory / name)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("cannot delete replay segment %s: %s", name, error)


# From disk


def compare(path: Path, stored: Layout, like: Replay) -> None:
    """Raises `UserError` unless the steps of the checkpoint `path` can lie in `like` as they lay."""
    here = Layout.of(like)
    for name in ("streams", "image_shape", "num_actions"):
        if getattr(stored, name) != getattr(here, name):
            raise UserError(
                f"{path} holds another replay: its {name} is {getattr(stored, name)}, here it is "
                f"{getattr(here, name)}; use the settings it was trained with, or name another LOGDIR"
            )
    if here.capacity < stored.size:
        raise UserError(
            f"{path} holds {stored.size:,} steps per stream, and here is room for {here.capacity:,}: set "
            "train.steps no lower than it was, or name another LOGDIR"
        )


def check(directory: Path, segments: Sequence[Segment], layout: Layout) -> None:
    """Reads all segments to see that they are sound.

    Raises:
      UnusableError: one is missing, damaged, or does not hold the steps that it should.
      OSError: one cannot be read.
    """
    for segment in segments:
        try:
            segment.file.check(directory / segment.name)
            _open(directory, segment, layout)
        except UnusableError as error:
            raise UnusableError(f"{directory.name}/{error}") from None


def newest_sound(
    directory: Path, segments: Sequence[Segment], layout: Layout, capacity: int
) -> tuple[Layout, tuple[Segment, ...]]:
    """The steps after the last damaged segment, for a store of this capacity.

    Raises:
      OSError: one cannot be read, which is no proof of damage.
    """
    kept: list[Segment] = []
    for segment in reversed(segments):
        try:
            check(directory, [segment], layout)
        except UnusableError:  # an error of the disk may pass, and is raised
            break
        kept.insert(0, segment)
    return _count_from(kept[0].start if kept else layout.inserted, kept, layout, capacity)


def for_capacity(
    segments: Sequence[Segment], layout: Layout, capacity: int
) -> tuple[Layout, tuple[Segment, ...]]:
    """The steps for a store of this capacity: those of a full replay are counted anew for a larger one."""
    grows = layout.inserted > layout.capacity and capacity > layout.capacity
    return _count_from(layout.oldest if grows else 0, segments, layout, capacity)


def _count_from(
    oldest: int, segments: Sequence[Segment], layout: Layout, capacity: int
) -> tuple[Layout, tuple[Segment, ...]]:
    """The steps from `oldest` on, which is number 0 now."""
    moved = (dataclasses.replace(s, start=s.start - oldest, stop=s.stop - oldest) for s in segments)
    return dataclasses.replace(layout, capacity=capacity, inserted=layout.inserted - oldest), tuple(moved)


def move_visits(visits: np.ndarray, before: Layout, after: Layout) -> np.ndarray:
    """Visit counts [stream, slot] of the steps that are still held, at the slots where they lie now."""
    newest = np.arange(-min(before.size, after.size), 0)
    moved = np.zeros((after.streams, after.size), visits.dtype)
    here, there = ((layout.inserted + newest) % layout.capacity for layout in (after, before))
    moved[:, here] = visits[:, there]
    return moved


def restore(
    directory: Path,
    segments: Sequence[Segment],
    layout: Layout,
    visits: np.ndarray,
    like: Replay,
) -> Replay:
    """The stored replay.

    Args:
      directory: where the segments are.
      segments: sound ones that hold the steps from `layout.oldest` to `layout.inserted`.
      layout: that of the store to be made.
      visits: its visit counts [stream, layout.size].
      like: an empty store, which is filled in place (donated), or its shapes. Where these have shardings,
        every device is given its own streams, one device after the other.
    """
    if isinstance(like.frames, jax.Array) or like.frames.sharding is None:
        return _restore(directory, segments, layout, visits, like, slice(0, layout.streams))
    shards = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), like)
    parts = []
    for device, index in like.frames.sharding.addressable_devices_indices_map(like.frames.shape).items():
        streams = slice(*index[0].indices(layout.streams)[:2])
        with jax.default_device(device):
            part = _restore(directory, segments, layout, visits[streams], shards, streams)
        parts.append(jax.device_put(part, device))

    def join(x: jax.ShapeDtypeStruct, *parts: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, list(parts))

    return jax.tree.map(join, like, *parts)


def _restore(
    directory: Path,
    segments: Sequence[Segment],
    layout: Layout,
    visits: np.ndarray,
    like: Replay,
    streams: slice,
) -> Replay:
    """`streams` of the stored replay, on the default device."""
    fields = {name: getattr(like, name) for name in _FIELDS}
    if not isinstance(like.frames, jax.Array):
        fields = _zeros(tuple((name, field.shape, field.dtype) for name, field in fields.items()))
    capacity, chunk = like.capacity, Layout.of(like).chunk
    # Always whole chunks of slots, whatever the segments hold: one compiled program serves all.
    for begin in range(0, min(layout.inserted, capacity), chunk):
        first = min(begin, capacity - chunk)
        slots = np.arange(first, first + chunk)
        # The newest step that went to each slot; below 0 where none did.
        steps = slots + capacity * ((layout.inserted - 1 - slots) // capacity)
        rows = np.zeros((chunk, streams.stop - streams.start), layout.record)
        for segment in segments:
            if segment.start <= steps.max() and steps.min() < segment.stop:
                here = (steps >= max(0, segment.start)) & (steps < segment.stop)
                rows[here] = _open(directory, segment, layout)[steps[here] - segment.start, streams]
        swapped = {name: np.ascontiguousarray(np.swapaxes(rows[name], 0, 1)) for name in _FIELDS}
        fields = _put(fields, swapped, first)
    all_visits = np.zeros(like.visits.shape, np.int32)
    all_visits[:, : layout.size] = visits
    return dataclasses.replace(
        like, **fields, visits=jnp.array(all_visits), inserted=jnp.array(layout.inserted, jnp.int32)
    )


def _open(directory: Path, segment: Segment, layout: Layout) -> np.ndarray:
    shape = (segment.stop - segment.start, layout.streams)
    return files.read_array(directory / segment.name, layout.record, shape)


@functools.cache
def _take_everywhere(sharding: Any) -> Any:
    """As `_take`, of a store that lies with several processes, to all of which it gives everything."""
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(_take, static_argnums=2, out_shardings=whole)


@functools.partial(jax.jit, static_argnums=2)
def _take(fields: dict[str, jax.Array], first: Any, length: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, axis=1), fields)


@functools.partial(jax.jit, donate_argnums=0)
def _put(fields: dict[str, jax.Array], chunk: dict[str, Any], slot: Any) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x, c: jax.lax.dynamic_update_slice_in_dim(x, c, slot, axis=1), fields, chunk)


@functools.partial(jax.jit, static_argnums=0)
def _zeros(fields: tuple[tuple[str, tuple[int, ...], Any], ...]) -> dict[str, jax.Array]:
    return {name: jnp.zeros(shape, dtype) for name, shape, dtype in fields}
