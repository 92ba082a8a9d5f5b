"""The suite `smoke` as people run it: Ray with a worker killed in the middle, then every command."""

import json
import os
import signal
from pathlib import Path

import pytest

from experiments import runs
from experiments.__main__ import main

pytest.importorskip("ray")
from tests.experiments.test_local import wait_for
from tests.experiments.test_ray import parent_of, start


@pytest.mark.slow
def test_the_smoke_suite_through_a_cluster_that_loses_a_worker(tmp_path):
    root = ["--root", str(tmp_path)]
    process = start("run", "smoke", *root, "--launcher", "ray", "--cpus", "1")
    running = wait_for(
        lambda: (
            process.poll() is not None
            or [path for path in tmp_path.rglob("metrics.jsonl") if path.stat().st_size]
        ),
        600,
    )
    assert running is not True, process.communicate()[0]
    killed: Path = running[0].parent
    os.kill(parent_of(runs.read_json(killed / runs.RECORD)["pid"]), signal.SIGKILL)
    said, _ = process.communicate(timeout=3600)
    assert process.returncode == 0, said
    assert "8 finished" in said
    assert "resuming" in (killed / runs.LOG).read_text()

    directory = tmp_path / "smoke"
    starts = {path: path.stat().st_mtime_ns for path in directory.rglob("evaluation.json")}
    assert main(["run", "smoke", *root]) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("evaluation.json")} == starts
    assert main(["pack", "smoke", *root, "--out", str(tmp_path / "packed"), "--weights"]) == 0
    for each in (directory, tmp_path / "packed"):
        out = ["--out", str(tmp_path / f"out-{each.name}")]
        assert main(["aggregate", str(each), "--json", str(tmp_path / f"{each.name}.json"), *out]) == 0
        assert main(["plot", str(each), *out]) == 0
    packed, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("packed", "smoke"))
    assert packed == whole
    assert (whole["twister"]["runs"], whole["twm"]["runs"]) == (4, 4)
