"""What aggregate reads, what it refuses, and what it writes."""

import csv
import json

import pytest

from experiments import scores
from experiments.__main__ import main
from tests.experiments import simulated

TWM = {game: list(each) for game, each in scores._published()["sets"]["twm"]["scores"].items()}
LITTLE = {"Pong": [20.0, 18.0], "Breakout": [30.0, 40.0]}


def said(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


def refusal(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("experiments: ")
    return line


def test_130_runs_give_the_published_aggregates_in_every_format(tmp_path, capsys):
    directory = simulated.write_suite(tmp_path, TWM, agent="twm")
    file = tmp_path / "all.json"
    assert main(["aggregate", str(directory), "--against", "twister", "simulus", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    expected = scores._published()["sets"]["twm"]["aggregates"]
    assert {name: round(each["value"], 3) for name, each in found["aggregates"].items()} == expected
    assert (found["runs"], len(found["games"]), found["missing"]) == (130, 26, [])
    assert found["games"]["Pong"]["scores"] == TWM["Pong"]
    assert found["protocol"]["noop_max"] == 30
    against = found["comparisons"]["twm"]
    assert len(against["twister (published)"]["games"]) == 22
    assert against["twister (published)"]["theirs"]["iqm"] is None
    assert 0 < against["simulus (published)"]["probability_of_improvement"]["value"] < 0.5
    with (directory / "results" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 130
    assert {float(row["score"]) for row in rows if row["game"] == "Pong"} == set(TWM["Pong"])
    table = (directory / "results" / "table.md").read_text()
    assert table in said(capsys)[0]
    assert "| 0.956 [0.8" in table


def test_several_sets_stand_under_their_names(tmp_path):
    ours = simulated.write_suite(tmp_path, LITTLE, name="a")
    theirs = simulated.write_suite(tmp_path, LITTLE, name="b", noop_max=0)
    arguments = ["aggregate", f"new={ours}", f"old={theirs}", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json", str(tmp_path / "all.json")]) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["new"]["runs"] == found["old"]["runs"] == 4
    compared = found["comparisons"]["new"]["old"]
    assert compared["probability_of_improvement"]["value"] == 0.5
    assert compared["protocol_differs_in"] == ["noop_max"]


def test_a_folder_of_runs_without_a_plan_has_a_set_per_agent(tmp_path):
    for seed, score in enumerate((3.0, 5.0)):
        simulated.write_run(tmp_path / f"x/twister{seed}", "Pong", score, seed)
        simulated.write_run(tmp_path / f"y/twm{seed}", "Pong", score, seed, agent="twm")
    found = scores.read_sets([str(tmp_path)])
    assert [(each.name, each.count) for each in found] == [("twister", 2), ("twm", 2)]


def test_missing_runs_are_refused_or_counted(tmp_path, capsys):
    directory = simulated.write_suite(tmp_path, {"Pong": [1.0, 2.0, 3.0], "Breakout": [1.0, 2.0]})
    simulated.write_run(directory / "twister/Breakout/seed2", "Breakout", 3.0, 2, done=False)
    message = refusal(capsys, "aggregate", directory)
    assert "1 of 6 runs are missing or unfinished (twister: Breakout seed 2)" in message
    assert main(["aggregate", str(directory), "--partial", "--json", str(tmp_path / "x.json")]) == 0
    assert "twister: 1 missing: Breakout seed 2" in said(capsys)[0]
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["runs"], found["missing"]) == (5, ["Breakout seed 2"])


def test_seeds_that_one_game_lacks_are_missing_without_a_plan_too(tmp_path, capsys):
    for game, seed in (("Pong", 0), ("Pong", 1), ("Breakout", 0)):
        simulated.write_run(tmp_path / f"{game}{seed}", game, 1.0, seed)
    assert "1 of 4 runs are missing or unfinished (twister: Breakout seed 1)" in refusal(
        capsys, "aggregate", tmp_path
    )


def test_a_run_that_was_extended_is_unfinished(tmp_path, capsys):
    directory = simulated.write_run(tmp_path / "run", "Pong", 1.0)
    config = json.loads((directory / "config.json").read_text())
    config["train"]["steps"] = 200_000
    (directory / "config.json").write_text(json.dumps(config))
    assert f"no run is finished: twister: {directory}" in refusal(capsys, "aggregate", tmp_path, "--partial")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noop_max": 0}, "protocol.noop_max is 30 in"),
        ({"settings": {"evaluation": {"episodes": 3}}}, "protocol.settings"),
    ],
)
def test_mixed_protocols_are_refused(tmp_path, capsys, change, message):
    simulated.write_run(tmp_path / "a", "Pong", 1.0, 0)
    simulated.write_run(tmp_path / "b", "Pong", 1.0, 1, **change)
    said = refusal(capsys, "aggregate", tmp_path)
    assert message in said
    assert str(tmp_path / "b") in said


def test_mixed_settings_are_refused_across_games_and_logging_is_not_looked_at(tmp_path, capsys):
    for name, game in (("a", "Pong"), ("b", "Breakout")):
        simulated.write_run(tmp_path / name, game, 1.0)
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    config["train"]["log_every"] = 7
    path.write_text(json.dumps(config))
    assert scores.read_sets([str(tmp_path)])[0].count == 2
    config["algorithm"]["contrastive_scale"] = 0.0
    path.write_text(json.dumps(config))
    message = refusal(capsys, "aggregate", tmp_path)
    assert "config.algorithm.contrastive_scale is 1.0 in" in message


def test_a_commit_and_a_device_may_differ(tmp_path):
    simulated.write_run(tmp_path / "a", "Pong", 1.0, 0)
    simulated.write_run(tmp_path / "b", "Pong", 1.0, 1, commit="1" * 40, device="gpu", notes=["resumed"])
    assert scores.read_sets([str(tmp_path)])[0].count == 2


def test_two_runs_of_a_seed_are_refused(tmp_path, capsys):
    simulated.write_run(tmp_path / "a", "Pong", 1.0, 0)
    simulated.write_run(tmp_path / "b", "Pong", 2.0, 0)
    assert "are both Pong seed 0" in refusal(capsys, "aggregate", tmp_path)


def test_a_game_without_references_is_refused_and_a_suite_may_give_a_range(tmp_path, capsys):
    directory = simulated.write_suite(tmp_path, {"Catch": [0.5, 1.0]})
    assert "Catch has no reference scores" in refusal(capsys, "aggregate", directory)
    plan = json.loads((directory / "suite.json").read_text())
    (directory / "suite.json").write_text(json.dumps({**plan, "score_range": [-1, 1]}))
    (found,) = scores.read_sets([str(directory)])
    assert found.normalized()[0].tolist() == [0.75, 1.0]


def test_what_is_no_evaluation_is_refused(tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text('{"game": "Pong"}')
    assert "is not that of a run" in refusal(capsys, "aggregate", tmp_path)
    assert "holds no runs" in refusal(capsys, "aggregate", tmp_path / "nowhere")
    assert "no published scores of 'twistr' (did you mean twister?)" in refusal(
        capsys, "aggregate", tmp_path, "--against", "twistr"
    )


def test_published_references_are_those_of_the_environments():
    for game, pair in scores.published("twm").references.items():
        assert simulated.envs.resolve(game)[0].reference_scores(game) == pair
    assert set(scores.published("twister").missing) == {"CrazyClimber", "Qbert", "RoadRunner", "Seaquest"}
