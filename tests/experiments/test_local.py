"""The local launcher: what runs, what is tried again, and what is left alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import job, runs, status
from experiments.__main__ import main
from experiments.launchers import local

FAKE = Path(__file__).parent / "fake_training.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(monkeypatch):
    """Replaces what trains; returns what tells it to fail or to wait."""
    real = job.command

    def command(*arguments):
        words = real(*arguments)
        return [sys.executable, str(FAKE), *words[words.index("train") + 1 :]]

    monkeypatch.setattr(job, "command", command)
    return lambda **told: monkeypatch.setenv("FAKE_TRAINING", json.dumps(told))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


def run(root, *flags):
    return main(["run", "smoke", "--root", str(root), "--games", "Catch", *map(str, flags)])


def starts(root):
    return {str(path.parent.relative_to(root)): path.read_text() for path in root.rglob("starts")}


def test_a_suite_is_trained_once(tmp_path, fake, capsys):
    assert run(tmp_path, "--sets", "twister") == 0
    assert "2 finished" in capsys.readouterr().out
    before = starts(tmp_path)
    assert set(before) == {"smoke/twister/Catch/seed0", "smoke/twister/Catch/seed1"}
    assert run(tmp_path) == 0
    said = capsys.readouterr().out
    assert "4 runs, 2 finished" in said
    assert {name: starts(tmp_path)[name] for name in before} == before
    assert run(tmp_path) == 0
    assert "4 runs, 4 finished" in capsys.readouterr().out


def test_a_failure_is_told_with_its_last_line_and_tried_again_while_others_go_on(tmp_path, fake, capsys):
    fake(fail="twm/Catch/seed0", times=2)
    assert run(tmp_path, "--attempts", 2) == 1
    said = capsys.readouterr().out
    folder = tmp_path / "smoke/twm/Catch/seed0"
    reason = f"exit code 2: twister_jax: cannot start: out of luck; log {folder}/train.log"
    assert f"failed twm Catch seed 0: {reason}; trying again" in said
    assert f"failed twm Catch seed 0: {reason} (" in said
    assert "3 finished, 1 failed" in said
    assert len((folder / "starts").read_text().splitlines()) == 2
    assert runs.standing(folder, 300).state == "failed"
    assert run(tmp_path) == 0  # its luck has turned
    assert runs.standing(folder, 300).state == "finished"


def test_seeds_that_are_packed_leave_runs_of_their_own(tmp_path, fake, capsys):
    """One program for what is left of a game; of its seeds, those that fail are tried again alone."""
    fake(fail="Catch/seed1", times=2)
    assert run(tmp_path, "--sets", "twister", "--seeds", 0) == 0
    assert run(tmp_path, "--sets", "twister", "--seeds", 0, 1, 2, 3, "--pack-seeds", 8, "--attempts", 2) == 1
    said = capsys.readouterr().out
    game = tmp_path / "smoke/twister/Catch"
    assert "started twister Catch seeds 1 2 3" in said
    assert f"exit code 1: seed 1 stops: out of luck; log {game}/seed1/train.log; trying again" in said
    assert "started twister Catch seed 1 on cpu, attempt 2" in said
    assert "2 finished, 1 failed" in said
    assert [len(each.splitlines()) for _, each in sorted(starts(game).items())] == [1, 2, 1, 1]
    assert "failed twister/Catch/seed1: twister_jax: cannot start: out of luck; log" in status.show(
        tmp_path / "smoke"
    )
    assert run(tmp_path, "--sets", "twister", "--seeds", 0, 1, 2, 3, "--pack-seeds", 8) == 0
    assert [runs.standing(game / f"seed{seed}", 300).score for seed in range(4)] == [0, 1, 2, 3]


def test_every_packed_seed_knows_why_it_failed_and_where_the_log_is(tmp_path, fake):
    fake(fail="Catch/seed1", times=1)
    assert run(tmp_path, "--sets", "twister", "--pack-seeds", 2, "--attempts", 1) == 1
    game = tmp_path / "smoke/twister/Catch"
    failed, finished = runs.standing(game / "seed1", 300), runs.standing(game / "seed0", 300)
    assert (failed.state, failed.note) == ("failed", "seed 1 stops: out of luck")
    assert failed.log == game / "seed0/train.log"
    assert failed.log.is_file()
    assert finished.state == "finished"


def test_several_to_a_device_share_the_cores(tmp_path, fake, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    assert run(tmp_path, "--per-device", 2) == 0
    used = {line for text in starts(tmp_path).values() for line in text.splitlines()}
    assert used <= {f" {cores[0::2]}", f" {cores[1::2] or cores}"}


def test_slots_take_every_gpu_in_turn_and_share_its_memory(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [slot.environment for slot in local.slots(1)] == [
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    several = local.slots(2)
    assert [slot.device for slot in several] == ["gpu 2", "gpu 5", "gpu 2", "gpu 5"]
    assert several[0].environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"


def test_a_signal_lets_runs_save(tmp_path, fake, capsys):
    fake(wait=str(tmp_path / "never"))
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run(tmp_path) == 143
    said = capsys.readouterr().out
    assert "SIGTERM: runs save and stop" in said
    assert "1 interrupted, 3 not started" in said
    (saved,) = tmp_path.rglob("saved")
    assert runs.standing(saved.parent, 300).state == "waiting"  # it has no rows yet
    fake()
    assert run(tmp_path) == 0


def test_nothing_goes_on_when_the_launcher_is_killed(tmp_path):
    """The run that it tethered hears of it, and stops."""
    child = "import time, signal, sys; signal.signal(15, lambda *_: sys.exit(143)); time.sleep(60)"
    parent = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE); "
        "print(p.pid, flush=True); p.wait()"
    )
    tethered = (
        "import threading; from experiments import tethered; "
        f"threading.Thread(target=tethered._stop_when_alone, daemon=True).start(); {child}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, tethered], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pid = int(process.stdout.readline())
    time.sleep(1)
    assert runs._alive(pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while runs._alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs._alive(pid) or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_a_run_that_another_process_holds_is_waited_for(tmp_path, fake, capsys):
    import fcntl

    folder = tmp_path / "smoke/twister/Catch/seed0"
    folder.mkdir(parents=True)
    held = (folder / "run.lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    released = []
    timer = threading.Timer(1.0, lambda: (released.append(time.monotonic()), held.close()))
    timer.start()
    assert run(tmp_path, "--sets", "twister", "--seeds", 0) == 0
    assert released


SUITE = """
preset = "debug"
games = ["slider:easy"]
seeds = [0, 1]
register = "tests.third:register"
[sets.minimal]
agent = "minimal"
overrides = { "train.tensorboard" = false }
"""


def test_from_a_suite_to_a_checked_pack(tmp_path, capsys, monkeypatch):
    """Real runs of a third agent on a third environment, in one program, through every command."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "third.toml").write_text(SUITE)
    root = ["--root", str(tmp_path)]
    assert main(["run", str(tmp_path / "third.toml"), *root, "--pack-seeds", "2"]) == 0
    assert main(["status", "third", *root]) == 0
    assert "third: 2 runs: 2 finished" in capsys.readouterr().out
    directory = tmp_path / "third"
    assert main(["pack", "third", *root, "--out", str(tmp_path / "packed")]) == 0
    files = {}
    for each in (directory, tmp_path / "packed"):
        assert (
            main(["aggregate", str(each), "--json", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")])
            == 0
        )
        files[each] = (tmp_path / "x.json").read_text()
    assert files[directory] == files[tmp_path / "packed"]
    found = json.loads(files[directory])
    assert list(found["games"]) == ["slider:easy"]
    assert found["runs"] == 2
    assert found["protocol"]["suite"] == "slider"
