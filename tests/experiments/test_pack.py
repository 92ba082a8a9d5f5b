"""Packs: complete, checked when read, and refused when changed."""

import json

import pytest

from experiments.__main__ import main
from tests.experiments import simulated


@pytest.fixture
def packed(tmp_path):
    directory = simulated.write_suite(tmp_path, {"Pong": [20.0, 18.0], "Breakout": [30.0]})
    state = directory / "twister/Pong/seed0/checkpoints/000100000-0/state"
    state.mkdir(parents=True)
    (state / "weights").write_bytes(b"w" * 100)
    (state.parent / "visits.npy").write_bytes(b"not for others")
    arguments = ["pack", str(directory), "--out", str(tmp_path / "packed"), "--weights"]
    assert main(arguments) == 0
    return tmp_path / "packed"


def test_a_pack_says_what_is_in_it(packed, capsys):
    manifest = json.loads((packed / "manifest.json").read_text())
    assert (manifest["suite"], manifest["runs"]) == ("some", 3)
    assert manifest["missing"] == ["twister/Breakout/seed1"]
    assert manifest["commits"] == ["0" * 40]
    assert manifest["files"]["twister/Pong/seed0/checkpoints/000100000-0/state/weights"]["bytes"] == 100
    assert not list(packed.rglob("visits.npy"))
    assert main(["aggregate", str(packed), "--partial", "--out", str(packed.parent / "out")]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text(path.read_text().replace("20.0", "21.0")), "was changed since it was"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.with_name("extra").touch(), "which its manifest does not know"),
    ],
)
def test_a_changed_pack_is_refused(packed, change, message, capsys):
    change(packed / "twister/Pong/seed0/evaluation.json")
    assert main(["aggregate", str(packed), "--partial"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_nothing_is_overwritten_and_nothing_empty_is_packed(packed, tmp_path, capsys):
    assert main(["pack", str(tmp_path / "some"), "--out", str(packed)]) == 2
    assert "is there already" in capsys.readouterr().err
    directory = simulated.write_suite(tmp_path, {"Pong": [1.0]}, name="half", done=False)
    assert main(["pack", str(directory), "--out", str(tmp_path / "x")]) == 2
    assert "has no finished run" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
