"""The real program on a real game: killed and run again, it ends where an undisturbed run ends."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from twister_jax.training.load import load_run

SETTINGS = {
    "game": "Breakout",
    "preset": "debug",
    "train.steps": 100,
    "train.checkpoint-every": 8,
    "train.log-every": 2,
    "train.report-every": 0,
    "train.tensorboard": False,
    "evaluation.episodes": 1,
    "evaluation.num-envs": 1,
    "env.evaluation-time-limit-frames": 80,
}
# Rows of metrics.jsonl after which the process is killed; the first 20 of TWM's are its pre-training's.
KILLS = {"twister": (4,), "twm": (3, 32)}
OF_AGENT = {"twister": {}, "twm": {"train.prefill-steps": 40}}


def start(agent, directory):
    settings = {"agent": agent, **SETTINGS, **OF_AGENT[agent]}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "twister_jax", "train", *flags, "--logdir", str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "wall_seconds"} for line in lines]


def final_visits(directory):
    newest = max((directory / "checkpoints").glob("[0-9]*"))
    return np.load(newest / "visits.npy")


def final_state(directory):
    return load_run(directory).state


@pytest.mark.parametrize(
    "agent",
    ["twister", *(pytest.param(agent, marks=pytest.mark.slow, id=f"{agent}-slow") for agent in KILLS)],
)
def test_a_killed_run_of_the_real_agent_ends_where_an_undisturbed_one_ends(agent, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    said, _ = (process := start(agent, undisturbed)).communicate()
    assert process.returncode == 0, said

    for wanted in KILLS[agent]:
        process = start(agent, killed)
        metrics = killed / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(rows(killed)) >= wanted):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    said, _ = (process := start(agent, killed)).communicate()
    assert process.returncode == 0, said
    assert "resuming" in said

    assert rows(killed) == rows(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, final_state(killed), final_state(undisturbed))
    visits = final_visits(undisturbed)
    np.testing.assert_array_equal(final_visits(killed), visits)
    assert np.any(visits) == (agent == "twm")  # only balanced sampling counts
    scores = [json.loads((d / "evaluation.json").read_text())["scores"] for d in (killed, undisturbed)]
    assert scores[0] == scores[1]
