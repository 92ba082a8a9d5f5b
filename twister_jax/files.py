"""Files that survive a power cut, are checked before they are trusted, and may come from a stranger.

Run directories are passed from hand to hand, so a path in one says nothing about what lies behind it: no file
is opened through a symbolic link, and nothing but regular files is opened. The directory of a run itself, and
what lies above it, are the user's own choice and may be links.
"""

import contextlib
import dataclasses
import errno
import os
import secrets
import stat
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from twister_jax.errors import UserError

_WRITABLE = os.O_WRONLY | os.O_RDWR


class UnsafePathError(OSError, UserError):
    """A path in a run directory that could lead out of it. The message is complete and on one line."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.ELOOP, f"{path} is {what}: refused")

    def __str__(self) -> str:
        return str(self.strerror)


class UnusableError(Exception):
    """Why something stored cannot be used, as a person should read it."""


_MAY_PASS = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM),
    *(errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENXIO),
    *(errno.ENODEV, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENETUNREACH),
)


def may_pass(error: Exception) -> bool:
    """Whether an error comes from the disk, the network or permissions, and so is no sign of damaged data."""
    return isinstance(error, OSError) and error.errno in _MAY_PASS


@dataclasses.dataclass(frozen=True)
class Checksum:
    """Size and CRC that a file must have to be trusted."""

    size: int
    crc32: int

    def check(self, path: Path) -> None:
        """Reads the whole file.

        Raises:
          UnusableError: it is missing or differs.
          OSError: it cannot be read; `UnsafePathError` where it is no regular file.
        """
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.size:
                    raise UnusableError(f"{path.name} has {size} bytes in place of {self.size}")
                if _crc32_of(file) != self.crc32:
                    raise UnusableError(f"{path.name} is damaged")
        except FileNotFoundError:
            raise UnusableError(f"{path.name} is missing") from None


def checksum_of(path: Path) -> Checksum:
    """The checksum of a regular file as it is now."""
    with open_regular(path) as file:
        return Checksum(os.fstat(file.fileno()).st_size, _crc32_of(file))


def _crc32_of(file: BinaryIO) -> int:
    crc32 = 0
    while part := file.read(1 << 20):
        crc32 = zlib.crc32(part, crc32)
    return crc32


# Opening


def open_regular(path: Path, mode: str = "rb", flags: int = os.O_RDONLY) -> Any:
    """Opens a regular file, never through a symbolic link, and never waits for the other end of a pipe.

    Args:
      path: only its last component is looked at; for the directories before it see `check_directory`.
      mode: of the file object.
      flags: as for `os.open`. Truncating is left to the caller: here it would come before the check.

    Raises:
      UnsafePathError: it is something else, or is to be written and has a second name (a hard link).
      OSError: it cannot be opened.
    """
    # A pipe that nobody reads would otherwise block here for good.
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafePathError(path, "a symbolic link") from None
        if error.errno == errno.ENXIO:
            raise UnsafePathError(path, "not a regular file") from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnsafePathError(path, "not a regular file")
        if flags & _WRITABLE and found.st_nlink > 1:
            raise UnsafePathError(path, "a hard link to another file")
        return os.fdopen(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise


def open_named(path: Path) -> Any:
    """Opens a file that a person named: links are their own choice, but only a regular file is read.

    Raises:
      UnsafePathError: it is something else.
      OSError: it cannot be opened.
    """
    try:
        return open_regular(Path(os.path.realpath(path)))
    except UnsafePathError:
        raise UnsafePathError(path, "not a regular file") from None


def read(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Raises:
      OSError: it cannot be read, or has more than `limit` bytes; `UnsafePathError` as `open_regular` does.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, limit) + 1)  # which takes so much memory, whatever is there
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data


def check_directory(path: Path) -> None:
    """Raises `UnsafePathError` where `path` is a symbolic link, `OSError` where it is no directory at all."""
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        raise UnsafePathError(path, "a symbolic link")
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def check_working_directory() -> None:
    """Raises `UserError` if the working directory was deleted, before any relative path is used."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working directory was deleted: change to another one") from None


def check_no_link(*paths: Path) -> None:
    """Raises `UnsafePathError` at the first that is a symbolic link; one that is missing may be made."""
    for path in paths:
        if path.is_symlink():
            raise UnsafePathError(path, "a symbolic link")


def regular_files(directory: Path) -> Iterator[Path]:
    """All files below a directory; raises `UnsafePathError` at the first that is no regular file."""
    check_directory(directory)
    for path in sorted(directory.iterdir()):
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode):
            yield path
        elif stat.S_ISLNK(mode) or stat.S_ISDIR(mode):
            yield from regular_files(path)
        else:
            raise UnsafePathError(path, "not a regular file")


class HeldDirectory:
    """A directory by its descriptor: what is done below `at` is done in it, wherever it was moved meanwhile.

    Attributes:
      shown: what messages call it.
      at: leads into it. Where the system does not show descriptors as paths this is the path itself, and
        `check` tells whether it still leads there.

    Args:
      path: of the directory.
      follow: whether its last component may be a symbolic link.
      shown: what messages call it, by default `path`.

    Raises:
      UnsafePathError: it is a link.
      OSError: it is missing, or no directory.
    """

    _BY_DESCRIPTOR = "/proc/self/fd/{}"

    def __init__(self, path: Path, follow: bool = False, shown: Path | None = None):
        self.shown = shown or path
        if not follow and path.is_symlink():  # as a check for its message alone: O_NOFOLLOW is what decides
            raise UnsafePathError(self.shown, "a symbolic link")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        self._descriptor = os.open(path, flags)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self.at = Path(self._BY_DESCRIPTOR.format(self._descriptor))
        if not self._leads_here():
            self.at = path

    def __enter__(self) -> "HeldDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the descriptor; so does garbage collection."""
        self._close()

    def is_same(self, other: "HeldDirectory") -> bool:
        """Whether both are one directory."""
        return os.path.samestat(os.fstat(self._descriptor), os.fstat(other._descriptor))

    def check(self) -> None:
        """Raises `OSError` where `at` has come to lead somewhere else."""
        if not self._leads_here():
            raise OSError(errno.ESTALE, "it was replaced", str(self.shown))

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """In this context the messages of `OSError` have the directory's name in place of `at`."""
        try:
            yield
        except OSError as error:
            for name in ("filename", "filename2", "strerror"):
                if isinstance(text := getattr(error, name), str):
                    setattr(error, name, f"{text}/".replace(f"{self.at}/", f"{self.shown}/")[:-1])
            raise

    def _leads_here(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.at), os.fstat(self._descriptor))
        except OSError:
            return False


# Writing


def write_durably(path: Path, *parts: Any) -> Checksum:
    """Writes a new file so that it survives a power cut (its directory is left to `fsync`).

    Raises:
      OSError: there is something of that name, or it could not be written; what was written is removed.
    """
    size = crc32 = 0
    with open(path, "xb") as file:
        try:
            for part in parts:
                file.write(part)
                size += len(part)
                crc32 = zlib.crc32(part, crc32)
            file.flush()
            os.fsync(file.fileno())
        except Exception:
            with contextlib.suppress(OSError):  # the space may be what was lacking
                os.unlink(path)
            raise
    return Checksum(size, crc32)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replaces a file, or makes one, so that at any instant there is the old one or the new one.

    A symbolic link of that name is itself replaced; what it points to is not touched.

    Raises:
      OSError: it could not be written, and the old one is as it was; `UnsafePathError` where `path` is there
        and is no file (a device, a pipe, a directory).
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise UnsafePathError(path, "not a regular file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    write_durably(temporary, data.encode() if isinstance(data, str) else data)
    try:
        os.replace(temporary, path)
    except Exception:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync(path.parent)


def fsync(*paths: Path) -> None:
    """Makes files and directory entries survive a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Arrays


def write_array(path: Path, array: np.ndarray) -> Checksum:
    """`write_durably` for a contiguous array, in NumPy's own format."""
    header: list[bytes] = []

    class Collect:
        write = header.append

    np.lib.format.write_array_header_1_0(Collect(), np.lib.format.header_data_from_array_1_0(array))  # type: ignore[arg-type]
    return write_durably(path, *header, array.reshape(-1).view(np.uint8))


def read_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What `write_array` wrote, mapped into memory and not yet read.

    Raises:
      UnusableError: the file does not hold such an array.
      OSError: it cannot be read; `UnsafePathError` where it is no regular file.
    """
    with open_regular(path) as file:
        try:
            np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file)
            if found != (shape, False, np.dtype(dtype)):
                raise UnusableError(f"{path.name} does not hold what it should")
            return np.memmap(file, dtype, "r", file.tell(), shape)
        except (ValueError, MemoryError, RecursionError) as error:
            raise UnusableError(f"{path.name} cannot be read: {one_line(error)}") from None


def read_archive(path: Path, most: int = 1 << 32) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that a person named; nothing is unpickled.

    Raises:
      UnusableError: it is no such file, is damaged, or unpacks to more than `most` bytes.
      OSError: it cannot be read; `UnsafePathError` where it is no regular file.
    """
    with open_named(path) as file:
        try:
            if file.read(2) != b"PK":  # or NumPy would read an array of any size
                raise UnusableError("it is no archive of arrays")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                unpacked = sum(member.file_size for member in archive.zip.infolist())
                if unpacked > most:
                    raise UnusableError(f"it unpacks to {unpacked:,} bytes, and {most:,} are the most")
                arrays = {name: archive[name] for name in archive.files}
            for name, array in arrays.items():
                if not isinstance(array, np.ndarray):
                    raise UnusableError(f"{printable(name)} in it is no array")
            return arrays
        except (UnusableError, OSError):
            raise
        except Exception as error:  # whatever zipfile and NumPy raise
            raise UnusableError(one_line(error)) from None


def printable(text: str, most: int = 200) -> str:
    """Text from a file, for messages: of bearable length, and escaped where it would move the cursor."""
    shown = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[:most])
    return "".join(shown)


def one_line(message: object) -> str:
    """An exception's message, or any other, on one line of limited length."""
    return printable(" ".join(str(message).split()), 300) or type(message).__name__
