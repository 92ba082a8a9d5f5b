"""manifest.json: what a checkpoint holds, and what each of its files must be to be trusted.

A checksum finds damage but no ill will, since anyone can compute it: the type and range of every field are
checked too.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import typing
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twister_jax import files, foreign_json
from twister_jax.errors import UserError
from twister_jax.files import Checksum, UnusableError
from twister_jax.replay import segments
from twister_jax.replay.segments import Layout, Segment

FORMAT = 4
"""Version of a checkpoint's layout and of what agents keep in their state; raise it when either changes."""

CHECKPOINT_NAME = re.compile(r"(\d{9,18})-(\d{1,9})", re.ASCII)
"""A checkpoint's directory: step, and which save at that step."""

_FILE_NAME = re.compile(r"env\.bin|visits\.npy|state(/\.?[A-Za-z0-9_][A-Za-z0-9_.\-]*)+", re.ASCII)
_LEAF_TYPE = re.compile(r"\w{1,40}\[[\d,]{0,200}\]", re.ASCII)
_MOST_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    Attributes:
      step: the step of the checkpoint.
      host: counters of the host loop. Whoever reads them must check their types and ranges.
      state: name -> type and shape ("float32[2,3]") of the leaves of the agent's state.
      replay: sizes of the replay.
      segments: where its steps are, without a gap from the oldest to the newest.
      files: name -> checksum of all files of the checkpoint's directory but manifest.json.
    """

    step: int
    host: dict[str, Any]
    state: dict[str, str]
    replay: Layout
    segments: tuple[Segment, ...]
    files: dict[str, Checksum]

    @property
    def env_steps(self) -> int:
        """Environment steps behind the checkpoint; `step` also counts pretraining updates."""
        counters = self.host.get("counters")
        steps = counters.get("env_steps") if isinstance(counters, dict) else None
        return steps if type(steps) is int else self.step

    def check(self, path: Path, names: Iterable[str]) -> None:
        """Raises `UnusableError` or `OSError` unless those files of `path` are as they were written."""
        # Orbax opens by itself what lies below state/: there must be nothing else.
        there = {file.relative_to(path).as_posix() for file in files.regular_files(path / "state")}
        for name in sorted(there - self.files.keys()):
            raise UnusableError(f"{name} does not belong there")
        for name in names:
            self.files[name].check(path / name)

    def render(self) -> str:
        """manifest.json: the format, the content, and a checksum of both."""
        content = dataclasses.asdict(self)
        whole = {"format": FORMAT, "crc32": _crc32(FORMAT, content), "content": content}
        return json.dumps(whole, sort_keys=True, indent=1) + "\n"

    def write(self, path: Path) -> None:
        """Writes it into the checkpoint directory `path`; raises `OSError` where it cannot."""
        text = self.render()
        _manifest(json.loads(text)["content"])  # what could not be read again must not be written
        files.write_durably(path / "manifest.json", text.encode())


def newest_host(checkpoints: Path) -> dict[str, Any]:
    """Counters of the newest checkpoint whose manifest is readable, without looking at its other files.

    Empty where there is none. Whoever reads them must check their types and ranges.
    """
    try:
        found = [path for path in checkpoints.iterdir() if CHECKPOINT_NAME.fullmatch(path.name)]
    except OSError:
        return {}
    for path in sorted(found, key=order, reverse=True):
        with contextlib.suppress(OSError, UserError, UnusableError):
            return read(path).host
    return {}


def read(path: Path) -> Manifest:
    """What the manifest of the checkpoint directory `path` says.

    Raises:
      UnusableError: it is missing, damaged or not ours.
      OSError: it cannot be read; `UnsafePathError` where it or the directory is a symbolic link.
      UserError: an older or newer program wrote it; stepping over it would throw that program's work away.
    """
    files.check_directory(path)
    try:
        text = files.read(path / "manifest.json", _MOST_BYTES).decode()
        whole = foreign_json.parse(text)
        content, version = whole["content"], whole["format"]
        if version != FORMAT and type(version) is int and _crc32(version, content) == whole["crc32"]:
            age = "a newer" if version > FORMAT else "an older"
            raise UserError(
                f"{path} was written by {age} twister_jax (checkpoint format {version}, this one reads "
                f"{FORMAT}): use that program, or name another LOGDIR"
            )
        if whole["crc32"] != _crc32(version, content):
            raise UnusableError("manifest.json is damaged")
        manifest = _manifest(content)
        if text != manifest.render():
            raise UnusableError("manifest.json is damaged")
    except FileNotFoundError:
        raise UnusableError("it has no manifest.json") from None
    except _InvalidError as error:
        raise UnusableError(f"manifest.json is not valid: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnusableError("manifest.json is damaged") from None
    if path.name.partition("-")[0] != f"{manifest.step:09d}":
        raise UnusableError(f"manifest.json is not valid: it belongs to step {manifest.step}")
    return manifest


def _crc32(version: int, content: Any) -> int:
    """Format 1 had one of the content alone."""
    return zlib.crc32(json.dumps(content if version == 1 else [version, content], sort_keys=True).encode())


class _InvalidError(Exception):
    """What is wrong with a value that was written on purpose, since its checksum is right."""


def _parse(kind: Any, value: Any) -> Any:
    """A value as JSON holds it, as the type that it should have; numbers are counts and not negative."""
    inner = typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and type(value) is dict:
        hints = typing.get_type_hints(kind)
        if hints.keys() == value.keys():
            return kind(**{name: _parse(hints[name], value[name]) for name in hints})  # type: ignore[operator]
    elif typing.get_origin(kind) is tuple and type(value) is list:
        return tuple(_parse(inner[0], item) for item in value)
    elif typing.get_origin(kind) is dict and type(value) is dict:
        return {name: _parse(inner[1], item) for name, item in value.items()}
    elif kind is Any or (type(value) is kind and (kind is str or (kind is int and 0 <= value < 2**63))):
        return value
    raise _InvalidError(f"{repr(value)[:60]} in place of {getattr(kind, '__name__', kind)}")


def _manifest(content: Any) -> Manifest:
    """Raises `_InvalidError` unless all that a manifest says can be true."""
    manifest = _parse(Manifest, content)
    replay, parts, names = manifest.replay, manifest.segments, manifest.files.keys()
    sizes = (replay.streams, replay.capacity, replay.num_actions, *replay.image_shape)
    rules = {
        "step": manifest.step < 10**18,
        "state": all(
            name.isprintable() and _LEAF_TYPE.fullmatch(kind) for name, kind in manifest.state.items()
        ),
        "replay": len(replay.image_shape) == 3 and min(sizes) > 0 and max(*sizes, replay.inserted) < 2**31,
        "names of segments": all(
            (match := segments.NAME.fullmatch(part.name))
            and (part.start, part.stop) == tuple(map(int, match.groups()))
            for part in parts
        ),
        # All steps that are held lie in the segments, each once.
        "steps of segments": all(part.start < part.stop for part in parts)
        and all(one.stop == next.start for one, next in itertools.pairwise(parts))
        and (
            parts[0].start <= replay.oldest and parts[-1].stop == replay.inserted
            if parts
            else not replay.size
        ),
        "names of files": all(map(_FILE_NAME.fullmatch, names)) and {"env.bin", "visits.npy"} <= names,
        "checksums": all(file.crc32 < 2**32 for file in (*manifest.files.values(), *(p.file for p in parts))),
    }
    for what, holds in rules.items():
        if not holds:
            raise _InvalidError(f"its {what} cannot be")
    return manifest


def order(path: Path) -> tuple[int, int]:
    """(step, serial) of a checkpoint's directory."""
    step, serial = path.name.split("-")
    return int(step), int(serial)
