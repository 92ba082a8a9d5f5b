"""Whole runs of the third agent, which trains in a second: made, killed, damaged and compared."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import third
from twister_jax.envs import make_vector_env
from twister_jax.presets import make_config
from twister_jax.training.load import load_run

ROOT = Path(__file__).parents[1]

third.register()


def config_of(logdir, steps=120, **overrides: Any):
    settings = {"logdir": str(logdir), "precision": "float32", "train.steps": steps}
    return make_config(third.AGENT, "debug", "Catch", **settings, **overrides)


def rows_of(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["wall_seconds"]
    return rows


def final_state(directory):
    loaded = load_run(directory)
    counters = dataclasses.asdict(loaded.counters)
    del counters["wall_seconds"]
    return jax.device_get(loaded.state), counters


def assert_same_run(one, other):
    assert rows_of(one) == rows_of(other)
    (a, host_a), (b, host_b) = final_state(one), final_state(other)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert host_a == host_b
    ours, theirs = (json.loads((Path(d) / "evaluation.json").read_text()) for d in (one, other))
    for record in (ours, theirs):
        del record["protocol"]["commit"]  # somebody may be working on the tree
    assert ours == theirs


class Killed(BaseException):
    """Stands for a process that ends: nothing in the program catches it."""


def killed_env(after, *args, **kwargs):
    env = make_vector_env(*args, **kwargs)
    step, count = env.step, 0

    def dying_step(actions):
        nonlocal count
        count += 1
        if count == after:
            raise Killed
        return step(actions)

    env.step = dying_step
    return env


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def start(directory, steps, *flags):
    command = [sys.executable, "-m", "tests.third", "train", "--agent", third.AGENT, "--game", "Catch"]
    command += ["--preset", "debug", "--precision", "float32", "--steps", str(steps), *flags]
    return subprocess.Popen(
        [*command, "--logdir", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def wait_until(condition, process, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)
