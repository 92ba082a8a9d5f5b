"""The real program for long: killed at random, nothing grows, and no row is lost or doubled.

200,000 updates of the preset `debug` with 2,000 checkpoints and 100 kills, all in the first half, so that one
process makes the second half. A tenth of it by default; `SOAK=1 make test-faults ARGS='-k soak -s'` is the
whole. Batches are of one window of 8 steps, which makes an update five times as cheap and changes nothing
else that the host does; the replay is small, so that it goes round 20 times.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

SCALE = float(os.environ.get("SOAK", "0.1"))
UPDATES, CHECKPOINTS, KILLS = (int(SCALE * most) for most in (200_000, 2_000, 100))
PREFILL, PER_STEP, LOG_EVERY = 64, 10, 100
FLAGS = {
    "game": "Catch",
    "preset": "debug",
    "batch-size": 1,
    "batch-length": 8,
    "imagination-horizon": 2,
    "capacity": 1_000,
    "steps": PREFILL + UPDATES // PER_STEP,
    "prefill-steps": PREFILL,
    "updates-per-step": PER_STEP,
    "checkpoint-every": UPDATES // PER_STEP // CHECKPOINTS,
    "log-every": LOG_EVERY,
    "report-every": 0,
}
GROWING = ("metrics.jsonl", "events.out")  # what is meant to grow
SECONDS_WITHOUT_A_ROW = 900


class Sample(NamedTuple):
    """Of the process, and of what it keeps on disk."""

    memory: float  # MB
    threads: int
    descriptors: int
    disk: float  # MB
    files: int


ROOM = Sample(memory=30, threads=1, descriptors=3, disk=5, files=30)
"""By how much the most of a later stretch may exceed the most of an earlier one: a save comes and goes."""


def sample(process, directory):
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    disk = files = 0
    for path in directory.rglob("*"):
        if path.name.startswith(GROWING):
            continue
        try:
            disk += path.stat().st_size
            files += 1
        except FileNotFoundError:
            continue  # deleted meanwhile
    descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
    memory = int(status["VmRSS"].split()[0]) / 1e3
    return Sample(memory, int(status["Threads"]), descriptors, disk / 1e6, files)


def newest(rows):
    """Updates of the newest whole row."""
    if not rows.exists():
        return 0
    with open(rows, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 50_000))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return json.loads(lines[-1])["updates"] if lines else 0


class Soak:
    """A run that is started again and again."""

    def __init__(self, directory, draw):
        self.directory, self.draw = directory, draw
        self.rows = directory / "metrics.jsonl"
        # Every fifth kill comes while the program starts or restores, the others a moment after some update.
        self.kills = sorted(draw.uniform(0, UPDATES / 2) for _ in range(KILLS))
        self.killed = 0
        self.tenth = 0
        self.began = time.monotonic()

    def life(self):
        """One process, from start to kill or end: its samples by updates, None where it was killed."""
        command = [sys.executable, "-m", "twister_jax", "train", "--logdir", str(self.directory)]
        command += [text for name, value in FLAGS.items() for text in (f"--{name}", str(value))]
        with open(self.directory.with_name("said.txt"), "w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
            try:
                samples = self.watch(process)
                code = process.wait(timeout=600)
            finally:
                process.kill()
            said.seek(0)
            assert code == (-signal.SIGKILL if samples is None else 0), said.read()
        return samples

    def watch(self, process):
        due = self.kills[self.killed] if self.killed < KILLS else None
        if due is not None and self.killed % 5 == 4:
            time.sleep(self.draw.uniform(0, 10))
            return self.kill(process)
        before = at = newest(self.rows)
        since, samples = time.monotonic(), {}
        while process.poll() is None:
            time.sleep(0.5)
            now = newest(self.rows)
            assert now > at or time.monotonic() < since + SECONDS_WITHOUT_A_ROW, "it hangs"
            if now > at:
                at, since = now, time.monotonic()
                try:
                    samples[now] = sample(process, self.directory)
                except (FileNotFoundError, KeyError):
                    continue  # it has ended, or a folder went while it was looked into
                self.tell(now, samples[now])
            if due is not None and now > max(due, before):
                time.sleep(self.draw.uniform(0, 2))
                return self.kill(process)
        return samples

    def kill(self, process):
        process.send_signal(signal.SIGKILL)
        self.killed += 1

    def tell(self, updates, latest):
        if 10 * updates // UPDATES > self.tenth:
            self.tenth = 10 * updates // UPDATES
            minutes = (time.monotonic() - self.began) / 60
            print(f"{updates:,} updates, {self.killed} kills, {minutes:.0f} min: {latest}", flush=True)


@pytest.mark.faults
def test_soak(tmp_path):
    seed = random.randrange(2**32)
    print("seed of the kills:", seed, flush=True)
    soak = Soak(tmp_path / "run", random.Random(seed))
    while (samples := soak.life()) is None:
        pass
    assert soak.killed == KILLS

    written = [json.loads(line)["updates"] for line in soak.rows.read_text().splitlines()]
    assert written == list(range(LOG_EVERY, UPDATES + 1, LOG_EVERY))
    steps = int(FLAGS["steps"])
    evaluation = json.loads((soak.directory / "evaluation.json").read_text())
    assert (evaluation["env_steps"], evaluation["updates"]) == (steps, UPDATES)
    checkpoints = sorted((soak.directory / "checkpoints").glob("[0-9]*"))
    assert (len(checkpoints), checkpoints[-1].name[:9]) == (3, f"{steps:09d}")

    # Of the last process, which made half of it; after the last update it evaluates, with threads of its own.
    alone = [samples[updates] for updates in sorted(samples) if updates < UPDATES]
    assert len(alone) > 50
    tenth = len(alone) // 10
    early, late = alone[tenth : 3 * tenth], alone[-2 * tenth :]
    for index, name in enumerate(Sample._fields):
        first, last = ([each[index] for each in stretch] for stretch in (early, late))
        print(
            f"{name}: median {statistics.median(first):.1f}, then {statistics.median(last):.1f}; "
            f"most {max(first):.1f}, then {max(last):.1f}"
        )
        assert max(last) <= max(first) + ROOM[index], name
