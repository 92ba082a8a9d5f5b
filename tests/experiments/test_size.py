"""10,000 runs: status in under 5 s, aggregate in under 30 s, memory under 2 GB.

Seconds are the processor's: other tests run at the same time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import suite
from tests.experiments import simulated

ROOT = Path(__file__).parents[2]
GAMES = suite.load("atari100k").games[:20]
SEEDS = 500
_MEASURED = """
import resource, sys, time
from experiments.__main__ import main
assert main(sys.argv[1:]) == 0
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, file=sys.stderr)
"""


def write_many(root):
    """A suite of 10,000 finished runs with the evaluations of 100 games and 100 rows of metrics each."""
    chosen = suite.Suite("many", "paper", GAMES, tuple(range(SEEDS)), {"twister": suite.Set("twister")})
    plan = suite.plan(chosen)
    suite.write_plan(root / "many", plan)
    for game in GAMES:
        config = json.dumps(simulated.config(game=game))
        metrics = "\n".join(json.dumps(row) for row in simulated.rows(100_000, 100, 50.0)) + "\n"
        for run in (run for run in plan.runs if run.game == game):
            directory = root / "many" / run.directory
            directory.mkdir(parents=True)
            result = simulated.evaluation(game, 50.0 + run.seed, run.seed)
            result["scores"] *= 100
            result["protocol"]["game_lengths"] *= 100
            (directory / "evaluation.json").write_text(json.dumps(result))
            (directory / "config.json").write_text(config)
            (directory / "metrics.jsonl").write_text(metrics)


def measure(*arguments):
    """Seconds and GB of a command, in a process of its own."""
    words = [sys.executable, "-c", _MEASURED, *map(str, arguments)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    seconds, gigabytes = map(float, done.stderr.split()[-2:])
    print(f"{arguments[0]}: {seconds:.1f} s, {gigabytes:.2f} GB")
    return seconds, gigabytes


@pytest.mark.slow
def test_ten_thousand_runs(tmp_path):
    write_many(tmp_path)
    seconds, gigabytes = measure("status", tmp_path / "many")
    assert seconds < 5
    assert gigabytes < 2
    seconds, gigabytes = measure("aggregate", tmp_path / "many", "--json", tmp_path / "x.json")
    assert seconds < 30
    assert gigabytes < 2
    assert json.loads((tmp_path / "x.json").read_text())["runs"] == 10_000
