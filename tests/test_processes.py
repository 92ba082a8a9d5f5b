"""Two processes with two virtual devices each train one run; one of them is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from tests.runs import ROOT, rows_of
from twister_jax.cli import main
from twister_jax.config import ParallelConfig
from twister_jax.errors import UserError
from twister_jax.processes import Processes, ending_with_others, wanted
from twister_jax.training.load import load_run
from twister_jax.training.parts import Part
from twister_jax.training.run import Run

COMMON = ["--agent", "minimal", "--game", "Catch", "--preset", "debug", "--precision", "float32"]
COMMON += ["--env.num-envs", "4", "--algorithm.batch-size", "4", "--algorithm.warm-up", "4"]
COMMON += ["--train.log-every", "10", "--train.checkpoint-every", "40"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(directory, steps, index, port, *flags, devices=2):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "tests.third", "train", *COMMON, "--steps", str(steps)]
    command += ["--logdir", str(directory), *flags]
    if port:
        command += ["--parallel.coordinator", f"127.0.0.1:{port}", "--parallel.processes", "2"]
        command += ["--parallel.process", str(index)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def start_two(directory, steps, *flags):
    port = free_port()
    return [start(directory, steps, index, port, *flags) for index in (0, 1)]


def ended(process, seconds=150):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_is_killed_and_both_go_on(tmp_path, victim):
    """Killed beside a save: the other ends within a minute, and both started again finish."""
    busy = ["--algorithm.work", "30"]
    both = start_two(tmp_path, 1_000, *busy)
    wait = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/0*")):
        assert time.monotonic() < wait
        time.sleep(0.05)
    both[victim].kill()
    killed = time.monotonic()
    code, _, err = ended(both[1 - victim])
    assert time.monotonic() - killed < 60
    assert code == 76
    assert err.count("\n") == 1
    assert "another process of this run is gone; the same command" in err
    ended(both[victim])

    for process in start_two(tmp_path, 200, *busy):
        code, out, err = ended(process)
        assert code == 0, err
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["devices"] == 4
    rows = [(row.get("phase"), row.get("phase_updates"), row["updates"]) for row in rows_of(tmp_path)]
    assert len(set(rows)) == len(rows) > 10
    there = load_run(tmp_path)

    code, out, err = ended(start(tmp_path, 240, 0, None, *busy, devices=1))  # and on one device of one
    assert code == 0, err
    assert f"resumed at step {there.counters.env_steps} with devices 1 (was 4)" in out
    assert load_run(tmp_path).counters.env_steps == 240


GLOO = "INTERNAL: Gloo all-reduce failed: [pair.cc:538] Read error [127.0.0.1]:1: Connection reset by peer"
NCCL = "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error."


@pytest.mark.parametrize("message", [GLOO, NCCL, "UNAVAILABLE: failed to send heartbeat"])
def test_an_error_of_a_collective_ends_the_process_as_jax_would(message, monkeypatch):
    aborted = []
    monkeypatch.setattr(os, "abort", lambda: aborted.append(True))
    with pytest.raises(jax.errors.JaxRuntimeError), ending_with_others(Processes(1, 2)):
        raise jax.errors.JaxRuntimeError(message)
    assert aborted == [True]


@pytest.mark.parametrize(("message", "count"), [(GLOO, 1), ("RESOURCE_EXHAUSTED: Out of memory", 2)])
def test_other_errors_are_not_taken_for_a_lost_process(message, count, monkeypatch):
    monkeypatch.setattr(os, "abort", lambda: pytest.fail("aborted"))
    with pytest.raises(jax.errors.JaxRuntimeError), ending_with_others(Processes(0, count)):
        raise jax.errors.JaxRuntimeError(message)


@pytest.mark.slow
def test_a_signal_to_one_ends_all_of_them_saved(tmp_path):
    both = start_two(tmp_path, 100_000)
    wait = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/0*")):
        assert time.monotonic() < wait
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    (code, out, err), (other, _, _) = ended(both[0]), ended(both[1])
    assert (code, other) == (143, 143), err
    assert "SIGTERM: saved; the same command goes on from there" in out


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer(tmp_path):
    began = time.monotonic()
    code, _, err = ended(start(tmp_path, 100, 1, free_port()))
    assert time.monotonic() - began < 60
    assert code == 76
    assert err.count("\n") == 1
    assert "does not answer, or not all processes came within 45 s" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel.processes", "2"], "belong together"),
        (["--parallel.process", "1"], "belong together"),
        (["--parallel.coordinator", "h:1"], "belong together"),
        (["--parallel.coordinator", "h", "--parallel.processes", "2"], "must be HOST:PORT"),
        (
            ["--parallel.coordinator", "h:1", "--parallel.processes", "2", "--parallel.process", "2"],
            "parallel.process = 2: must be below parallel.processes = 2",
        ),
    ],
)
def test_flags_that_cannot_be(flags, message, capsys):
    assert main(["train", "--game", "Catch", "--preset", "debug", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_processes_are_found_by_their_surroundings(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert wanted(ParallelConfig()) == 1
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    assert wanted(ParallelConfig()) == 4
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert wanted(ParallelConfig()) == 8
    assert wanted(ParallelConfig(coordinator="h:1", processes=2)) == 2
    with pytest.raises(UserError, match="belong together"):
        wanted(ParallelConfig(processes=2))


def test_environments_are_shared_in_order():
    parts = [Processes(index, 4).share(8) for index in range(4)]
    assert [number for part in parts for number in range(8)[part]] == list(range(8))
    assert Processes().exchange({"a": 1}) == [{"a": 1}]


def test_no_process_runs_a_program_that_another_still_compiles(monkeypatch):
    """One has it in its cache, the other takes a while: a device would not wait that long for the other's."""
    asked = []
    monkeypatch.setattr(Run, "program", lambda run, name: asked.append(name) or f"{name}, compiled")
    part = Part.__new__(Part)
    part._compiled_by_all = set()
    part.processes = Processes(0, 2)
    monkeypatch.setattr(part.processes, "exchange", lambda name: asked.append(f"all have {name}"))
    assert [part.program(name) for name in ("act", "update", "act")][1] == "update, compiled"
    assert asked == ["act", "all have act", "update", "all have update", "act"]
