"""1. A parity fixture from a stranger is refused in one line; nothing is run, and no file changes."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.faults.test_01_hostile_directory import state_of
from twister_jax import cli, files
from twister_jax.errors import UserError
from twister_jax.files import UnusableError

SOUND = Path(__file__).parents[1] / "fixtures" / "twister_small.npz"


class Payload:
    """What pickle would run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.remove, (self.path,)


def array(values, **header):
    """A .npy file whose header may say something else."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    data = file.getvalue()
    if not header:
        return data
    text = str({"descr": values.dtype.str, "fortran_order": False, "shape": values.shape} | header).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data[128:]


def archive(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as written:
        for name, data in members.items():
            written.writestr(name, data)
    return file.getvalue()


def holding(members):
    return lambda path, home: path.write_bytes(archive(members))


def to(target):
    return lambda path, home: path.symlink_to(home / target)


def pickled(path, home):
    inside = pickle.dumps(np.array([Payload(home / "shell-start-up")], dtype=object))
    header = b"\x93NUMPY\x01\x00" + (76).to_bytes(2, "little")
    text = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(75) + b"\n"
    path.write_bytes(archive({"config_json.npy": header + text + inside, "param/a.npy": array(np.zeros(1))}))


def only_pickled(path, home):
    path.write_bytes(pickle.dumps(Payload(home / "shell-start-up")))


def linked_members(path, home):
    """An archive in which a member is a symbolic link, and others lead outside."""
    link = zipfile.ZipInfo("config_json.npy")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        written.writestr(link, str(home / "shell-start-up"))
        written.writestr("../home/shell-start-up", "x")
        written.writestr(str(home / "shell-start-up"), "x")
    path.write_bytes(file.getvalue())


def sparse(path, home):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def an_array_of_everything(path, home):
    """No archive, but one array as long as the disk."""
    path.write_bytes(array(np.zeros(1, np.uint8), shape=(1 << 40,)))
    os.truncate(path, 1 << 41)


sizes = np.array(json.dumps({"hidden": 1}))
KINDS = {
    "a link to somebody's file": to("shell-start-up"),
    "a link to a folder": to("replay"),
    "a link to itself": lambda path, home: path.symlink_to(path),
    "a link to nothing": to("nothing"),
    "a link to a device": lambda path, home: path.symlink_to("/dev/zero"),
    "a folder": lambda path, home: path.mkdir(),
    "a pipe": lambda path, home: os.mkfifo(path),
    "a file without end": sparse,
    "an array without end": an_array_of_everything,
    "code in a pickled array": pickled,
    "code in a pickle": only_pickled,
    "members that lead outside": linked_members,
    "a shape of a petabyte": holding({"config_json.npy": array(np.zeros(1), shape=(1 << 47,))}),
    "a shape beyond all numbers": holding({"config_json.npy": array(np.zeros(1), shape=(10**30,))}),
    "a header of brackets": holding({"config_json.npy": array(np.zeros(1), shape=(), x="[" * 9_000)}),
    "settings of brackets": holding(
        {"config_json.npy": array(np.array("[" * 100_000)), "param/encoder_network.npy": array(np.zeros(1))}
    ),
    "no settings": holding({"param/encoder_network.npy": array(np.zeros(1))}),
    "a name that moves the cursor": holding(
        {"config_json.npy": array(sizes), "param/\x1b[2J\n.npy": array(np.zeros(1))}
    ),
}


def answer(capsys, *arguments):
    code = cli.main([str(each) for each in arguments])
    said = capsys.readouterr()
    assert code == 2, said.out
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("twister_jax: ")
    assert said.err.rstrip("\n").isprintable(), said.err
    return said.err


@pytest.mark.parametrize("kind", KINDS)
def test_no_canary_changes(kind, tmp_path, home, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fixture.npz"
    KINDS[kind](path, home)
    before, names = state_of(home), sorted(os.listdir(tmp_path))
    answer(capsys, "parity", path)
    assert state_of(home) == before
    assert sorted(os.listdir(tmp_path)) == names


def test_what_unpacks_to_more_than_memory_is_not_unpacked(tmp_path, monkeypatch):
    """A thousandth of its size is on disk."""
    path = tmp_path / "bomb.npz"
    path.write_bytes(archive({"a.npy": array(np.zeros(1 << 24, np.uint8)), "b.npy": array(np.zeros(9))}))
    assert path.stat().st_size < 1 << 16
    assert files.read_archive(path)["a"].nbytes == 1 << 24
    monkeypatch.setattr(np.lib.format, "read_array", None)  # nothing is unpacked
    with pytest.raises(UnusableError, match="it unpacks to 16,777,544 bytes, and 16,777,216 are the most"):
        files.read_archive(path, most=1 << 24)


def test_a_member_that_is_larger_than_the_archive_says_is_cut(tmp_path):
    """The size that the bound is held against is the size that is unpacked."""
    data = bytearray(archive({"a.npy": array(np.zeros(1 << 20, np.uint8))}))
    size = (len(array(np.zeros(1 << 20, np.uint8)))).to_bytes(4, "little")
    assert data.count(size) == 2
    (tmp_path / "lies.npz").write_bytes(bytes(data).replace(size, (200).to_bytes(4, "little")))
    with pytest.raises(UnusableError):
        files.read_archive(tmp_path / "lies.npz", most=1000)


def test_a_link_to_a_fixture_is_the_users_own_choice(tmp_path):
    (tmp_path / "linked.npz").symlink_to(SOUND)
    assert "config_json" in files.read_archive(tmp_path / "linked.npz")
    with pytest.raises(UserError, match="not a regular file: refused"):
        files.read_archive(tmp_path)
