"""Several devices: the same update as on one, and what passes between them."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from tests.conftest import filled_replay
from twister_jax.errors import UserError
from twister_jax.parallel import Devices
from twister_jax.replay import store

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def checked(count: int, agent: str, target: str) -> dict:
    """What `parallel_checks` found on virtual devices."""
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.parallel_checks", str(count), agent, target]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = [
    slow(count, agent, target)
    for agent in ("twister", "twm")
    for count, target in itertools.product((2, 4, 8), ("gpu", "cpu"))
]


@pytest.mark.parametrize(("count", "agent", "target"), CASES)
def test_an_update_computes_what_one_device_computes(count, agent, target):
    found = checked(count, agent, target)
    off = {name: gap for name, gap in found["differences"].items() if not gap < 1e-5}
    # InfoNCE's own gradient towards a bias that shifts all keys alike is zero, and Adam divides it by its
    # size: the update of these few parameters is rounding in any order of sums.
    assert {name for name in off if "params" in name and "key_output_bias" not in name} == set()
    assert len(found["differences"]) > 50


@pytest.mark.parametrize(("count", "agent", "target"), CASES)
def test_no_frame_crosses_devices(count, agent, target):
    found = checked(count, agent, target)
    assert all(kind == "all-reduce" and shapes == ["f32[]"] for kind, shapes in found["sample"])
    for kind, shapes in found["learn"]:
        if kind != "all-reduce":  # gradients, and sums for the metrics
            sizes = [np.prod([int(n) for n in re.findall(r"\d+", s.split("[")[1])] or [1]) for s in shapes]
            assert max(sizes) < 64 * 64, (kind, shapes)
    # Whose rollouts are cut is gathered in every imagined step, and then counted by every device.
    assert agent != "twm" or {kind for kind, _ in found["learn, in loops"]} == {"all-gather"}
    assert found["in place"]
    assert found["replay per device"] == [found["replay"] // count] * count
    assert found["from own streams"]
    assert found["one stream as one device"]
    visits = np.split(np.array(found["visits"]), count)
    assert agent != "twm" or [int(part.sum()) for part in visits] == [8 // count] * count


def test_every_device_draws_from_all_of_its_streams_equally():
    """The share of a device is drawn like a whole batch: here by one device, from half of the streams."""
    replay = filled_replay(20, 2)
    draw = jax.jit(jax.vmap(lambda key: store.sample(replay, key, 2, 3).reward))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 2_000)))
    counts = [np.isin(drawn, np.asarray(replay.reward[i])).all(-1).sum() for i in (0, 1)]
    assert abs(counts[0] / sum(counts) - 0.5) < 0.04


def test_more_devices_than_there_are_and_what_they_cannot_share_is_refused(monkeypatch):
    there = len(jax.devices())
    with pytest.raises(UserError, match=rf"parallel.data = {there + 1}: must be at most {there}, .*virtual"):
        Devices.choose(there + 1, 1)
    monkeypatch.setattr("jax.devices", mock.Mock(return_value=jax.devices() * 4))
    with pytest.raises(UserError, match=r"env.num_envs = 6: must be a multiple .* 4; 4 or 8 would do"):
        Devices.choose(4, 6)
    with pytest.raises(UserError, match=r"algorithm.batch_size = 3: must be .* 4; 4 would do"):
        Devices.choose(4, 4, {"algorithm.batch_size": 3})
