"""A third agent and a third suite go through the ordinary command line, from training to benchmarks."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import third

ROOT = Path(__file__).parents[1]


def start(logdir, *flags, agent=third.AGENT, game="slider:easy"):
    command = [sys.executable, "-m", "tests.third", "train", "--agent", agent, "--game", game]
    command += ["--preset", "debug", "--logdir", str(logdir), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "wall_seconds"} for line in lines]


def test_a_third_agent_on_a_third_suite_is_killed_and_ends_as_if_undisturbed(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = start(undisturbed, "--steps", "600")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said

    process = start(killed, "--steps", "600")
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(rows(killed)) > 20):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = start(killed, "--steps", "600")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "resuming" in said

    assert rows(killed) == rows(undisturbed)
    ours, theirs = (json.loads((d / "evaluation.json").read_text()) for d in (killed, undisturbed))
    assert ours["scores"] == theirs["scores"]
    assert ours["protocol"]["suite"] == "slider"
    assert ours["protocol"]["episode"] == "6 steps"  # of the suite's preset
    assert ours["human_normalized"] == pytest.approx((np.mean(ours["scores"]) + 8) / 8)
    config = json.loads((killed / "config.json").read_text())
    assert config["env"] == {"num_envs": 1, "episode_length": 6, "color": [60, 140, 250]}


def test_it_is_evaluated_and_refused_like_any_other(tmp_path):
    process = start(tmp_path / "run", "--steps", "60")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said

    def command(*arguments):
        words = [sys.executable, "-m", "tests.third", *map(str, arguments)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    done = command("evaluate", "--logdir", tmp_path / "run", "--episodes", 3)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["episodes"] == 3
    for arguments, message in [
        (["--game", "slider:esay"], "did you mean easy"),
        (["--game", "slyder:easy"], "unknown suite 'slyder' (did you mean slider?)"),
        (["--agent", "minimel"], "unknown agent 'minimel' (did you mean minimal?)"),
        (["--agent", "minimal", "--algorithm.warm-up", "-1"], "algorithm.warm_up = -1: must be between 0"),
        (["--agent", "minimal", "--game", "slider:easy", "--episode-length", "0"], "env.episode_length = 0"),
        (
            ["--agent", "minimal", "--game", "slider:easy", "--color", "9", "9", "300"],
            "three numbers between",
        ),
        (["--agent", "minimal", "--bad-from", "9", "--bad-until", "3"], "must not be below"),
        (["--agent", "twm", "--game", "slider:easy"], "discrete actions"),
        (["--agent", "minimal", "--game", "slider:hard"], "too hard for this machine"),
    ]:
        done = command("train", "--preset", "debug", *arguments, "--logdir", tmp_path / "refused")
        assert done.returncode == 2, done.stdout
        (line,) = done.stderr.strip().splitlines()
        assert message in line


def test_it_is_benchmarked_like_any_other(tmp_path):
    code = (
        "import sys; from tests import third; third.register()\n"
        "from benchmarks.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--agent", third.AGENT, "--game", "slider:easy", "--preset", "debug", "--quick"]
    flags += ["--only", "update", "breakdown"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--json", str(tmp_path / "out.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["seconds_per_update"] > 0
    assert "work" in done.stdout
