"""The Ray launcher: refusals here, and a real cluster of this machine's own in `make test-slow`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import runs
from experiments.__main__ import main
from tests.experiments.test_local import wait_for

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


def launch(root, *flags):
    return main(["run", "smoke", "--root", str(root), "--launcher", "ray", *flags])


def test_no_cluster_at_the_address_is_one_line(tmp_path, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.monotonic()
    assert launch(tmp_path, "--address", f"127.0.0.1:{port}") == 2
    assert time.monotonic() - started < 20
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"no Ray cluster answers at 127.0.0.1:{port}" in line
    assert launch(tmp_path, "--address", "somewhere") == 2
    assert "must be HOST:PORT" in capsys.readouterr().err


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setitem(sys.modules, "ray", None)
    assert launch(tmp_path) == 2
    assert "pip install 'twister_jax[ray]'" in capsys.readouterr().err


def start(*arguments, **environment):
    words = [sys.executable, "-m", "experiments", *map(str, arguments)]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


SUITE = """
preset = "debug"
games = ["slider:easy"]
seeds = [0, 1]
register = "tests.third:register"
[sets.minimal]
agent = "minimal"
overrides = { "train.steps" = 4000, "train.checkpoint_every" = 100, "train.tensorboard" = false }
"""


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_run_goes_on(tmp_path):
    (tmp_path / "third.toml").write_text(SUITE)
    home = tmp_path / "home"
    home.mkdir()
    process = start(
        "run", tmp_path / "third.toml", "--root", tmp_path, "--launcher", "ray", "--cpus", "1", HOME=str(home)
    )
    folder = tmp_path / "third/minimal/slider-easy/seed0"
    wait_for(lambda: process.poll() is not None or any((folder / "checkpoints").glob("0*")), 300)
    assert process.poll() is None, process.communicate()[0]
    record = runs.read_json(folder / runs.RECORD)
    worker = parent_of(record["pid"])
    assert "ray::" in Path(f"/proc/{worker}/cmdline").read_text()
    os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert "2 finished" in said
    log = (folder / runs.LOG).read_text()
    assert "saved; the same command goes on from there" in log
    assert log.count("resuming") == 1
    rows = [row["updates"] for row in runs.rows(folder) if "phase" not in row]
    assert rows == sorted(set(rows))  # none twice
    assert runs.evaluation(folder)["env_steps"] == 4000
    assert not any(path.name == ".ray" for path in home.iterdir())


@pytest.mark.slow
def test_a_signal_lets_tasks_save(tmp_path):
    (tmp_path / "third.toml").write_text(SUITE.replace("4000", "400000"))
    process = start("run", tmp_path / "third.toml", "--root", tmp_path, "--launcher", "ray")
    folder = tmp_path / "third/minimal/slider-easy/seed0"
    wait_for(lambda: process.poll() is not None or any((folder / "checkpoints").glob("0*")), 300)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert "1 interrupted, 1 not started" in said
    assert json.loads((folder / runs.RECORD).read_text())["state"] == "interrupted"
