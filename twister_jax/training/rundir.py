"""The directory of a run: ours alone, writable, and holding the run that was asked for."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from twister_jax.errors import UserError

_log = logging.getLogger(__name__)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunDirectory:
    """A run directory, held by this process as long as the context lasts.

    Raises:
      UserError: on entering, where it cannot be made or written to, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self._lock: int | None = None

    def __enter__(self) -> "RunDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Permissions do not tell: a file system may be read-only, or full.
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"0")
                probe.flush()
            lock = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"the run directory {self.path} is, or lies below, a file: name another LOGDIR"
            ) from None
        except OSError as error:
            raise UserError(
                f"the run directory {self.path} cannot be written to ({error.strerror}): "
                "make it writable or name another LOGDIR"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise UserError(
                f"the run directory {self.path} is in use by process {pid}: "
                "wait for it, stop it, or name another LOGDIR"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(lock)
                raise
            _log.warning(
                "%s cannot be locked (%s): do not start a second run in it", self.path, error.strerror
            )
        self._lock = lock
        with contextlib.suppress(OSError):  # the number only helps the other process's message
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        # The file stays: deleting it could take it from under a process that has just opened it.
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_or_write_config(self, config: dict[str, Any], may_change: Collection[str]) -> None:
        """Writes config.json into a new run directory; in an old one, refuses another run's configuration.

        Args:
          config: the whole resolved configuration, as JSON can hold it.
          may_change: dotted names of fields, or of groups of fields, that a resumed run may change.

        Raises:
          UserError: other fields differ, or the directory's config.json cannot be read, or it is missing
            where there is something to resume.
        """
        config = json.loads(json.dumps(config))
        stored = self._stored_config()
        if stored is not None:
            here, there = dict(_flatten(config)), dict(_flatten(stored))
            differing = [
                f"{name} is {_show(there, name)} there, {_show(here, name)} here"
                for name in (*here, *(name for name in there if name not in here))
                if _show(there, name) != _show(here, name) and not _covered(name, may_change)
            ]
            if differing:
                raise UserError(
                    f"{self.path} holds another run: {'; '.join(differing)}: "
                    "use the stored values, or name another LOGDIR"
                )
        if stored != config:
            try:
                _write_atomically(self.path / "config.json", json.dumps(config, indent=2) + "\n")
            except OSError as error:
                raise UserError(
                    f"{self.path}/config.json cannot be written ({error.strerror}): "
                    "make room or make it writable, or name another LOGDIR"
                ) from None

    def _stored_config(self) -> dict[str, Any] | None:
        path = self.path / "config.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            for name in ("checkpoints", "metrics.jsonl"):
                if (self.path / name).exists():
                    raise UserError(
                        f"{self.path} holds {name} but no config.json, so it cannot be told what run it is: "
                        "put config.json back, or name another LOGDIR"
                    ) from None
            return None
        except (OSError, ValueError, RecursionError):
            stored = None
        if not isinstance(stored, dict):
            raise UserError(
                f"{path} is not the configuration of a run: put back the right one, or name another LOGDIR"
            )
        return stored


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dictionary, by dotted names."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _show(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        return "absent"
    value = fields[name]
    # 1 and 1.0 are the same setting.
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _covered(name: str, may_change: Collection[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in may_change)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_memory(needed: dict[str, int], device: Any = None) -> None:
    """Refuses at the start what would run out of memory hours later.

    Args:
      needed: bytes needed, by what needs them.
      device: the JAX device that is to hold them; None, or one without memory of its own, means the host.

    Raises:
      UserError: the free memory does not suffice. Says nothing where it cannot be known.
    """
    stats = (device.memory_stats() or {}) if device is not None else {}
    if "bytes_limit" in stats:
        where, available = str(device), stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        where, free = "this host", host_available()
        if free is None:
            return
        available = free
    total = sum(needed.values())
    if total > available:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needed.items())
        raise UserError(
            f"not enough memory on {where}: {total / 1e9:.2f} GB needed ({parts}), "
            f"{available / 1e9:.2f} GB available: choose a smaller replay.capacity, model or batch"
        )


def host_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes this process can still take: what the machine has free, or its control group if less."""
    free = []
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        groups = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    for _, controllers, group in groups:
        if controllers == "":
            root, limit, usage = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Every group up to the root may set a limit. In a container the path may not exist; the root does.
        group_path = root / group.strip("/")
        for path in (group_path, *(p for p in group_path.parents if p.is_relative_to(root))):
            try:
                most, used = int((path / limit).read_text()), int((path / usage).read_text())
                stat = dict(line.split() for line in (path / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or no limit ("max")
                continue
            # The page cache counts as used, but makes way.
            free.append(most - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))
    return max(0, min(free)) if free else None
