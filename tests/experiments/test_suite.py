"""Suites, plans, and where runs stand."""

import json
import os
import socket
from pathlib import Path

import pytest

from experiments import runs, status, suite
from experiments.__main__ import main
from tests.experiments import simulated
from twister_jax import presets
from twister_jax.errors import UserError

MINE = """
preset = "debug"
games = ["Catch", "Pong"]
seeds = [0, 1]
[sets.plain]
agent = "twister"
[sets.longer]
agent = "twister"
overrides = { "train.steps" = 500 }
"""


@pytest.mark.parametrize("name", suite.names())
def test_every_suite_that_is_ready_can_be_planned(name):
    whole = suite.load(name)
    found = suite.plan(suite.narrow(whole, games=whole.games[:2]))
    assert len({run.directory for run in found.runs}) == len(found.runs) > 0


def test_the_page_of_ablations_names_each_and_each_changes_something():
    page = (Path(__file__).parents[2] / "docs/ablations.md").read_text()
    ablations = suite.load("ablations")
    for name, chosen in ablations.sets.items():
        base, _, last = name.rpartition("-")
        assert f"`{name}`" in page or (f"`{base}-1`" in page and f"`-{last}`" in page), name
        for field, value in chosen.overrides.items():
            assert presets.make_config(chosen.agent) != presets.make_config(chosen.agent, **{field: value})


def test_the_benchmark_suites_are_what_they_are_called():
    for name in ("atari100k", "atari100k-twm"):
        found = suite.plan(suite.load(name))
        assert len(found.runs) == 26 * 5
        assert {run.steps for run in found.runs} == {100_000}
        assert {run.preset for run in found.runs} == {"paper"}


def test_a_file_of_ones_own_becomes_a_plan_that_grows(tmp_path):
    (tmp_path / "mine.toml").write_text(MINE)
    mine = suite.load(str(tmp_path / "mine.toml"))
    suite.write_plan(tmp_path / "mine", suite.plan(suite.narrow(mine, ["pong"], [7], ["longer"])))
    (run,) = suite.read_plan(tmp_path / "mine").runs
    assert (run.directory, run.steps, run.seed) == ("longer/Pong/seed7", 500, 7)
    suite.write_plan(tmp_path / "mine", suite.plan(mine))
    assert len(suite.read_plan(tmp_path / "mine").runs) == 1 + 2 * 2 * 2
    assert len(suite.grouped(suite.plan(mine).runs, 2)) == 4


def test_a_score_of_everything_comes_first():
    """And runs that start together have different programs to compile."""
    jobs = suite.grouped(suite.plan(suite.load("smoke")).runs, 1)
    assert [run.seed for (run,) in jobs] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len({(run.set, run.game) for (run,) in jobs[:4]}) == 4


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"Pong"', '"Pnog"', "mine, set plain, Pnog: unknown game 'Pnog' (did you mean Pong?)"),
        ('preset = "debug"', 'preset = "debgu"', "unknown preset 'debgu' (did you mean debug?)"),
        (
            "train.steps",
            "train.stepz",
            "mine, set longer, Catch: unknown field train.stepz (did you mean train.steps",
        ),
        ("= 500", '= "many"', "train.steps = many: must be a whole number"),
        ("= 500", "= 0", "train.steps = 0: must be between 1"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds are whole numbers"),
        ("seeds", "seed", "unknown field seed (did you mean seeds?)"),
        ("[sets.plain]\nagent", "[sets.plain]\nagnet", "unexpected keyword argument 'agnet'"),
        ("games", "games = [", "is not a suite"),
    ],
)
def test_a_wrong_suite_is_refused_in_one_line(tmp_path, before, after, message, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace(before, after))
    assert main(["run", str(path), "--root", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runn"], "unknown command 'runn' (did you mean run?)"),
        (["run", "smok"], "unknown suite 'smok' (did you mean smoke?)"),
        (["run", "smoke", "--games", "Ctach"], "did you mean Catch?"),
        (["run", "smoke", "--sets", "twn"], "did you mean twm"),
        (["run", "smoke", "--per-device", "0"], "--per-device = 0: must be at least 1"),
        (["run", "smoke", "--seeds", "0,x"], "--seeds x: must be whole numbers from 0 on"),
        (["status", "smoke"], "no suite has been started in"),
        (["pack", "smoke"], "no suite has been started in"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_plan_of_a_stranger_leads_nowhere_else(tmp_path):
    directory = simulated.write_suite(tmp_path, {"Pong": [1.0]})
    plan = json.loads((directory / "suite.json").read_text())
    plan["runs"][0]["directory"] = "../../etc"
    (directory / "suite.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="lies outside"):
        suite.read_plan(directory)


def test_the_table_says_where_every_run_stands(tmp_path, capsys):
    directory = simulated.write_suite(tmp_path, {"Pong": [20.0, 18.0], "Breakout": [30.0]})
    halfway = simulated.write_run(directory / "twister/Breakout/seed1", "Breakout", 40.0, seed=1, done=False)
    record = {"state": "running", "host": socket.gethostname(), "device": "gpu 0", "pid": os.getpid()}
    (halfway / runs.RECORD).write_text(json.dumps(record))
    assert main(["status", "some", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "running" in line and "Breakout" in line]
    assert "50,000/100,000" in line
    assert "10.0" in line  # steps a second
    assert "1h23m" in line  # 50,000 at 10 a second
    assert "gpu 0" in line
    assert "3 finished, 1 running" in said
    assert "9.7 used, 1.4 left" in said  # 3 x 10,000 s and 5,000 s; 5,000 s

    for change, state in (
        ({"pid": 2**22 + 1}, "interrupted"),
        ({"host": "elsewhere", "pid": 2**22 + 1}, "running"),
        ({"state": "failed", "last_line": "training diverged"}, "failed"),
    ):
        (halfway / runs.RECORD).write_text(json.dumps({**record, **change}))
        assert runs.standing(halfway, 100_000).state == state
    assert "failed twister/Breakout/seed1: training diverged; log" in status.show(directory)
    nothing = tmp_path / "nothing"
    assert runs.standing(nothing, 10) == runs.Standing("waiting", log=nothing / runs.LOG)


def test_rows_that_are_torn_are_skipped(tmp_path):
    directory = simulated.write_run(tmp_path / "run", "Pong", 1.0, done=False)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"env_steps": 60000, "wall_sec')
    assert runs.standing(directory, 100_000).env_steps == 50_000
    assert [row["env_steps"] for row in runs.rows(directory)][-1] == 50_000
