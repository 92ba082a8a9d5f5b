"""The real program for long: nothing grows, and no row is lost or doubled.

A tenth of the full campaign, which `SOAK=1 make test-faults ARGS='-k soak'` runs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCALE = 1.0 if os.environ.get("SOAK") else 0.1
UPDATES, CHECKPOINTS, KILLS = (int(SCALE * most) for most in (200_000, 2_000, 100))
PREFILL = 64


def sample(process, directory):
    """Memory (MB), threads and descriptors of the process, and what the checkpoints take on disk (MB)."""
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if line.startswith(("VmRSS", "Threads"))
    )
    disk = 0
    for path in (directory / "checkpoints").rglob("*"):
        try:
            disk += path.stat().st_size
        except FileNotFoundError:
            continue  # deleted meanwhile
    return (
        int(status["VmRSS"].split()[0]) / 1e3,
        int(status["Threads"]),
        len(os.listdir(f"/proc/{process.pid}/fd")),
        disk / 1e6,
    )


@pytest.mark.faults
def test_soak(tmp_path):
    steps = PREFILL + UPDATES // 10
    every = max(1, UPDATES // 10 // CHECKPOINTS)
    flags = {
        "game": "Catch",
        "preset": "debug",
        "steps": steps,
        "prefill-steps": PREFILL,
        "updates-per-step": 10,
        "checkpoint-every": every,
        "log-every": 100,
        "report-every": 0,
        "episodes": 2,
        "logdir": tmp_path / "run",
    }
    command = [sys.executable, "-m", "twister_jax", "train"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    seed = random.randrange(2**32)
    print("seed of the kills:", seed)
    draw = random.Random(seed)
    kills_at = sorted(draw.uniform(0, UPDATES) for _ in range(KILLS))
    rows, killed, samples = tmp_path / "run" / "metrics.jsonl", 0, []

    def updates():
        """Of the newest row; a row may be half written."""
        if not rows.exists():
            return 0
        lines = [line for line in rows.read_bytes().splitlines() if line.endswith(b"}")]
        return json.loads(lines[-1])["updates"] if lines else 0

    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        mine, begun = [], None
        while process.poll() is None:
            time.sleep(0.5)
            now = updates()
            begun = now if begun is None else begun
            if now > begun + 300:  # past the start
                try:
                    mine.append(sample(process, tmp_path / "run"))
                except (FileNotFoundError, KeyError):
                    break
            if killed < KILLS and now > max(kills_at[killed], begun):
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
        said, _ = process.communicate(timeout=300)
        samples += [mine] if len(mine) > 20 else []
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
    assert killed == KILLS
    written = [json.loads(line)["updates"] for line in rows.read_text().splitlines()]
    assert written == list(range(100, UPDATES + 1, 100))
    assert len(list((tmp_path / "run" / "checkpoints").glob("0*"))) == 3
    assert samples
    for mine in samples:
        quarter = len(mine) // 4
        for index, (what, room) in enumerate((("memory", 100), ("threads", 2), ("descriptors", 5))):
            before = max(each[index] for each in mine[quarter : quarter + 5])
            after = max(each[index] for each in mine[-5:])
            assert after <= before + room, (what, before, after)
    disk = [each[3] for mine in samples for each in mine]
    half = len(disk) // 2
    assert max(disk[half:]) <= 1.5 * max(disk[:half]) + 20
    print(f"{UPDATES} updates, {killed} kills; {len(disk)} samples from {samples[0][0]} to {samples[-1][-1]}")
    shutil.rmtree(tmp_path / "run")
