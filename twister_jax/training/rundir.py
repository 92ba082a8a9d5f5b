"""The directory of a run: ours alone, writable, and holding the run that was asked for."""

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from twister_jax import files, foreign_json
from twister_jax.errors import UserError
from twister_jax.files import HeldDirectory, UnsafePathError
from twister_jax.training.lock import Lock, LostError

_MOST_BYTES = 1 << 20  # of a config.json


class RunDirectory:
    """A run directory, held by this process as long as the context lasts.

    Raises:
      UserError: on entering, where it cannot be made or written to, its lock is not a file of its own, or
        another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self._lock = Lock(self.path / "run.lock")
        self._held: HeldDirectory | None = None

    def __enter__(self) -> "RunDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Permissions do not say: a file system may be read-only, or full.
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"0")
                probe.flush()
            self._lock.take()
            self._held = HeldDirectory(self.path, follow=True)
        except UnsafePathError:
            raise
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"the run directory {self.path} is, or lies below, a file: name another LOGDIR"
            ) from None
        except OSError as error:
            raise UserError(
                f"the run directory {self.path} cannot be written to ({error.strerror}): "
                "make it writable or name another LOGDIR"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._held is not None:
            self._held.close()

    def check_held(self) -> None:
        """Raises `LostError` where another directory, or another process, is where this one was locked."""
        self._is_held()

    def _is_held(self) -> bool:
        """False where it vanished, or its lock did; raises as `check_held`."""
        if self._lock.check() and self.path.exists():
            return True
        # Another one need not have been locked ever: a copy of a run, without its lock.
        if self._held is not None and os.path.lexists(self.path / "config.json"):
            with contextlib.suppress(OSError), HeldDirectory(self.path, follow=True) as there:
                if not there.is_same(self._held):
                    raise LostError(self.path)
        return False

    def make_again(self, config: dict[str, Any]) -> None:
        """Makes a directory that vanished anew, locked and with its config.json; otherwise does nothing.

        Raises:
          LostError: as `check_held`, also where somebody else was quicker.
        """
        if self._is_held():
            return
        lock = Lock(self._lock.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.take(new=True)
            held = HeldDirectory(self.path, follow=True)
        except FileExistsError:
            self._lock.check()
            return
        except OSError:  # whatever is to be written there will say so
            return
        self._lock.release()
        self._lock, self._held = lock, held
        # A save that was being written may have made a part of the directory again already.
        if not os.path.lexists(self.path / "config.json"):
            with contextlib.suppress(OSError):
                self._write_config(config)

    def check_config(self, config: dict[str, Any], changeable: Collection[str]) -> None:
        """Refuses another run's configuration; writes nothing.

        Args:
          config: the whole resolved configuration, as JSON can hold it.
          changeable: dotted names of fields, or of groups of fields, that a resumed run may change.

        Raises:
          UserError: other fields differ, or the directory's config.json cannot be read, or it is missing
            where there is something to resume.
        """
        there = self._stored_config()
        if there is not None:
            _refuse_another(self.path, there, _values(config), changeable)

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes config.json where it is not there or differs.

        Raises:
          UserError: it cannot be written.
        """
        if self._stored_config() == _values(config):
            return
        try:
            self._write_config(config)
        except OSError as error:
            raise UserError(
                f"{self.path}/config.json cannot be written ({error.strerror}): "
                "make room or make it writable, or name another LOGDIR"
            ) from None

    def _write_config(self, config: dict[str, Any]) -> None:
        files.write_atomically(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def _stored_config(self) -> dict[str, Any] | None:
        """The values of config.json by dotted names; None where there is none."""
        path = self.path / "config.json"
        try:
            stored = foreign_json.parse(files.read(path, _MOST_BYTES))
            if not isinstance(stored, dict):
                raise ValueError("no object")
            return dict(_flatten(stored))
        except FileNotFoundError:
            for name in ("checkpoints", "metrics.jsonl"):
                if os.path.lexists(self.path / name):
                    raise UserError(
                        f"{self.path} holds {name} but no config.json, so it cannot be told what run it is: "
                        "put config.json back, or name another LOGDIR"
                    ) from None
            return None
        except UnsafePathError:
            raise
        except (OSError, ValueError):
            raise UserError(
                f"{path} is not the configuration of a run: put back the right one, or name another LOGDIR"
            ) from None


def check_same_run(path: Path, stored: Any, config: dict[str, Any], changeable: Collection[str]) -> None:
    """Refuses what another run left in `path`: `stored` is its configuration; None where it is not known.

    Raises:
      UserError: fields differ that may not change.
    """
    if stored is None:
        return
    try:
        there = _values(stored if isinstance(stored, dict) else {})
    except (ValueError, RecursionError):
        there = {}
    if not there:
        raise UserError(f"{path} does not say what run it is of: it is damaged")
    _refuse_another(path, there, _values(config), changeable)


def _refuse_another(
    path: Path, there: dict[str, Any], here: dict[str, Any], changeable: Collection[str]
) -> None:
    differing = [
        name
        for name in (*here, *(name for name in there if name not in here))
        if _show(there, name) != _show(here, name) and not _covered(name, changeable)
    ]
    # Of another agent or game everything differs, and of another version names do.
    decisive = [name for name in ("agent", "game", "preset") if name in differing] or differing
    if here.keys() != there.keys() and decisive is differing and differing:
        raise UserError(
            f"{path} holds a run of another version of twister_jax ({files.printable(differing[0])} is "
            f"{_show(there, differing[0])} there, {_show(here, differing[0])} here)"[:400]
            + ": go on with that version, or name another LOGDIR"
        )
    if differing:
        listed = "; ".join(
            f"{files.printable(name)} is {_show(there, name)} there, {_show(here, name)} here"[:300]
            for name in decisive
        )
        raise UserError(f"{path} holds another run: {listed}: use the stored values, or name another LOGDIR")


def _values(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration, as JSON has them, by dotted names."""
    return dict(_flatten(json.loads(json.dumps(config))))


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


def _covered(name: str, changeable: Collection[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in changeable)
