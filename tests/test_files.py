import errno
import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.files import Checksum, UnsafePathError, UnusableError


def refused(path, what):
    return pytest.raises(UnsafePathError, match=rf"\A{path} is {what}: refused\Z")


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    path.write_text("canary")
    yield path
    assert path.read_text() == "canary"
    assert not path.is_symlink()


# Opening


def test_a_link_is_not_opened(tmp_path, canary):
    (tmp_path / "link").symlink_to(canary)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT):
        for name in ("link", "dangling"):
            with refused(tmp_path / name, "a symbolic link"):
                files.open_regular(tmp_path / name, "r+b" if flags else "rb", flags)
    assert not (tmp_path / "nothing").exists()
    with refused(tmp_path / "link", "a symbolic link"):
        files.read(tmp_path / "link", 100)
    with refused(tmp_path / "link", "a symbolic link"):
        files.checksum_of(tmp_path / "link")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_only_regular_files_are_opened_and_nothing_hangs(tmp_path, flags):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "fifo", tmp_path / "socket"):
            with refused(path, "not a regular file"):
                files.open_regular(path, "rb", flags)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with refused("/dev/null", "not a regular file"):
            files.open_regular(Path("/dev/null"), "rb", flags)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        files.open_regular(tmp_path, "rb", flags)


def test_a_directory_that_becomes_a_link_is_not_held(tmp_path, monkeypatch):
    """Between the look at it and the opening, too."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with refused(tmp_path / "link", "a symbolic link"):
        files.HeldDirectory(tmp_path / "link")
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with pytest.raises(NotADirectoryError):
        files.HeldDirectory(tmp_path / "link")
    with files.HeldDirectory(tmp_path / "link", follow=True) as held:
        assert held.is_same(files.HeldDirectory(tmp_path / "real"))


def test_a_file_of_two_names_is_read_but_not_written(tmp_path, canary):
    os.link(canary, tmp_path / "second")
    assert files.read(tmp_path / "second", 6) == b"canary"
    with refused(tmp_path / "second", "a hard link to another file"):
        files.open_regular(tmp_path / "second", "r+b", os.O_RDWR)


def test_a_refusal_is_for_the_disk_and_for_the_user():
    error = UnsafePathError(Path("x"), "a symbolic link")
    assert isinstance(error, OSError)
    assert isinstance(error, UserError)
    assert str(error) == error.strerror == "x is a symbolic link: refused"
    assert error.errno == errno.ELOOP


def test_reading_is_bounded(tmp_path, canary):
    assert files.read(canary, 6) == b"canary"
    with pytest.raises(OSError, match="more than 5 bytes"):
        files.read(canary, 5)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "nothing", 5)


def test_files_below_a_directory(tmp_path):
    for name in ("b/c/one", "b/two", "three"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert sorted(str(p.relative_to(tmp_path)) for p in files.regular_files(tmp_path)) == [
        "b/c/one",
        "b/two",
        "three",
    ]
    (tmp_path / "b" / "d").symlink_to(tmp_path / "b" / "c")
    with refused(tmp_path / "b" / "d", "a symbolic link"):
        list(files.regular_files(tmp_path))
    (tmp_path / "b" / "d").unlink()
    os.mkfifo(tmp_path / "b" / "d")
    with refused(tmp_path / "b" / "d", "not a regular file"):
        list(files.regular_files(tmp_path))


# Writing


def test_writing_atomically(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, "ä")
    assert path.read_bytes() == "ä".encode()
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_writing_atomically_replaces_a_link_and_not_what_it_points_to(tmp_path, canary):
    (tmp_path / "link").symlink_to(canary)
    files.write_atomically(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, canary, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".file.guessed.tmp").symlink_to(canary)
    with pytest.raises(FileExistsError):
        files.write_atomically(tmp_path / "file", "new")
    assert not (tmp_path / "file").exists()


def test_nothing_but_a_file_is_replaced(tmp_path):
    """No device of the machine's own is tried: root would lose it if this failed."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("fifo", "folder", "socket"):
            with refused(tmp_path / name, "not a regular file"):
                files.write_atomically(tmp_path / name, "new")
        assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "socket"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, canary, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space"):
            files.write_atomically(canary, "new")
    assert os.listdir(tmp_path) == ["canary"]


def test_writing_durably_makes_new_files_only(tmp_path, canary):
    assert files.write_durably(tmp_path / "new", b"ab", np.arange(3, dtype=np.uint8)) == Checksum(
        5, files.checksum_of(tmp_path / "new").crc32
    )
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("canary", "link"):
        with pytest.raises(FileExistsError):
            files.write_durably(tmp_path / name, b"new")
    assert not (tmp_path / "nothing").exists()


# Checking


def test_checksums_find_every_damage(tmp_path, canary):
    checksum = files.checksum_of(canary)
    checksum.check(canary)
    path = tmp_path / "copy"
    for data, reason in ((b"canarY", "is damaged"), (b"canar", "has 5 bytes in place of 6")):
        path.write_bytes(data)
        with pytest.raises(UnusableError, match=f"copy {reason}"):
            checksum.check(path)
    path.unlink()
    with pytest.raises(UnusableError, match="copy is missing"):
        checksum.check(path)


@pytest.mark.parametrize("shape", [(3, 2), (0, 2), ()])
def test_arrays_come_back(tmp_path, shape):
    record = np.dtype([("a", np.uint8, (3,)), ("b", np.float32)])
    array = np.zeros(shape, record)
    array["b"] = 7
    checksum = files.write_array(tmp_path / "array.npy", array)
    assert checksum == files.checksum_of(tmp_path / "array.npy")
    assert np.array_equal(files.read_array(tmp_path / "array.npy", record, shape), array)
    assert np.array_equal(np.load(tmp_path / "array.npy"), array)
    with pytest.raises(UnusableError, match="does not hold"):
        files.read_array(tmp_path / "array.npy", record, (*shape, 1))
    with pytest.raises(UnusableError, match="does not hold"):
        files.read_array(tmp_path / "array.npy", np.float32, shape)


def test_an_array_that_is_too_short_cannot_be_read(tmp_path):
    files.write_array(tmp_path / "array.npy", np.zeros(1000))
    os.truncate(tmp_path / "array.npy", 500)
    with pytest.raises(UnusableError, match="cannot be read"):
        files.read_array(tmp_path / "array.npy", np.float64, (1000,))
