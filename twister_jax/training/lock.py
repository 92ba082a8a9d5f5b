"""run.lock: one process at a time in a run directory, on one machine or several.

The kernel's lock decides wherever it works. A network file system may grant it on two machines at once, or
know no locks; so the holder also writes a line into the file every few seconds, and whoever finds the line of
another machine watches it for a while. The line of a process that was killed stands still.

    4711 host1 9d5e24f0-…-c4 1f0c9a7e 12       process, machine, its boot, the holder, and how many lines
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from twister_jax import files
from twister_jax.errors import UserError

BEAT_SECONDS = 10.0
"""Time between two lines; an old one is watched for two and a half times as long."""

_LINE = re.compile(r"(\d{1,10}) ([\w.-]{1,64}) ([\w-]{1,64}) [0-9a-f]{8} \d{1,12}\n", re.ASCII)
_MOST_BYTES = 200
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_log = logging.getLogger(__name__)


class LostError(UserError):
    """The run directory is not the one that this process holds: another run may be writing there."""

    exit_code = 1

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"{directory} is not the run directory that this process locked: it was replaced, or another run "
            "was started in it; nothing more is written there"
        )


class Lock:
    """A lock file, held from `take` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._token = secrets.token_hex(4)
        self._written = b""
        self._overwritten = False
        self._stop = threading.Event()

    def take(self, new: bool = False) -> None:
        """Takes the lock; with `new` the file must not be there yet.

        Raises:
          UserError: another process holds it; `UnsafePathError` where it is no file of its own.
          OSError: it cannot be opened or written to; `FileExistsError` where it is not new.
        """
        file = files.open_regular(self.path, "r+b", os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0))
        try:
            locked = self._lock(file)
            self._watch(locked)
        except BaseException:
            file.close()
            raise
        self._file = file
        self._beat()
        threading.Thread(target=self._beat_on, name="lock", daemon=True).start()

    def check(self) -> bool:
        """Whether the file is still there; always true where `take` was not called.

        Raises:
          LostError: another one is there, or another process writes into it.
        """
        if self._file is None:
            return True
        ours = os.fstat(self._file.fileno())
        try:
            there = os.lstat(self.path)
        except FileNotFoundError:
            return False
        except OSError:  # it may pass, and does not say that anything was replaced
            return True
        if self._overwritten or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise LostError(self.path.parent)
        return True

    def release(self) -> None:
        """Lets the lock go. The file stays: deleting it could take it from under another process."""
        self._stop.set()
        if self._file is not None:
            if not self._overwritten:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), 0)  # nobody need watch it
            self._file.close()
            self._file = None

    def _lock(self, file: Any) -> bool:
        """Takes the kernel's lock; False where the file system has none."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(file.read(_MOST_BYTES)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            return False
        return True

    def _watch(self, locked: bool) -> None:
        """Refuses if another holder, whom the kernel's lock does not keep out, is still writing lines."""
        line = self._read()
        found = _LINE.fullmatch(line.decode(errors="replace"))
        if found is None or (locked and found[3] == _boot()):
            return
        seconds = 2.5 * BEAT_SECONDS
        _log.warning(
            "looking for %.0f s whether process %s on %s still uses %s",
            seconds,
            found[1],
            found[2],
            self.path.parent,
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 10)
            if self._read() != line:
                raise self._in_use(line)

    def _read(self) -> bytes:
        """The line, opened anew: a network file system shows what others wrote to new readers alone."""
        with files.open_regular(self.path) as file:
            return file.read(_MOST_BYTES)

    def _in_use(self, line: bytes) -> UserError:
        found = _LINE.fullmatch(line.decode(errors="replace"))
        who = f"process {found[1]}" if found else "another process"
        if found and found[3] != _boot():
            who += f" on {found[2]}"
        return UserError(
            f"the run directory {self.path.parent} is in use by {who}: "
            "wait for it, stop it, or name another LOGDIR"
        )

    def _beat_on(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            self._beat(count)

    def _beat(self, count: int = 0) -> None:
        """Writes the next line, unless the one there is somebody else's."""
        line = f"{os.getpid()} {_host()} {_boot()} {self._token} {count}\n".encode()
        with contextlib.suppress(OSError, ValueError, AttributeError):  # full; closed meanwhile
            descriptor = self._file.fileno()
            if count and os.pread(descriptor, _MOST_BYTES, 0) not in (self._written, b""):
                self._overwritten = True
                return
            os.ftruncate(descriptor, os.pwrite(descriptor, line, 0))
            self._written = line
            os.fsync(descriptor)


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)[:64] or "unknown"


def _boot() -> str:
    """Names this machine since it was started, so that two of the same name are told apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _host()
