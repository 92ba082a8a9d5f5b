"""Packs: complete, checked when read, and refused when changed."""

import json
from pathlib import Path

import pytest

import experiments
from experiments import pack, scores
from experiments.__main__ import main
from tests.experiments import simulated


@pytest.fixture
def packed(tmp_path):
    directory = simulated.write_suite(tmp_path, {"Pong": [20.0, 18.0], "Breakout": [30.0]})
    state = directory / "twister/Pong/seed0/checkpoints/000100000-0/state"
    state.mkdir(parents=True)
    (state / "weights").write_bytes(b"w" * 100)
    (state.parent / "visits.npy").write_bytes(b"not for others")
    arguments = ["pack", str(directory), "--out", str(tmp_path / "packed"), "--weights"]
    assert main(arguments) == 0
    return tmp_path / "packed"


def test_a_pack_says_what_is_in_it(packed, capsys):
    manifest = json.loads((packed / "manifest.json").read_text())
    assert (manifest["suite"], manifest["runs"]) == ("some", 3)
    assert manifest["missing"] == ["twister/Breakout/seed1"]
    assert manifest["commits"] == ["0" * 40]
    assert manifest["files"]["twister/Pong/seed0/checkpoints/000100000-0/state/weights"]["bytes"] == 100
    assert not list(packed.rglob("visits.npy"))
    for _ in range(2):  # what is written does not lie in it
        assert main(["aggregate", str(packed), "--partial"]) == 0
    assert (packed.parent / "packed-results/scores.csv").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text(path.read_text().replace("20.0", "21.0")), "was changed since it was"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.with_name("extra").touch(), "which its manifest does not know"),
    ],
)
def test_a_changed_pack_is_refused(packed, change, message, capsys):
    change(packed / "twister/Pong/seed0/evaluation.json")
    assert main(["aggregate", str(packed), "--partial"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_finished_runs_of_anywhere_become_a_small_pack_that_reads_like_them(tmp_path, capsys):
    """As experiments/results/ keeps them: whole scores, a thinned rest, and no path of the machine."""
    for seed in (0, 1):
        folder = simulated.write_run(
            tmp_path / f"runs/anything-{seed}", "Pong", 10.0 + seed, seed, count=2000
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        noisy = [{**row, **{f"losses/{name}": row["env_steps"] / 7 for name in range(20)}} for row in rows]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in noisy))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "logdir": str(folder)}))
    simulated.write_run(tmp_path / "runs/unfinished", "Boxing", 1.0, done=False)
    packed, again = tmp_path / "packed", tmp_path / "again"
    assert main(["pack", str(tmp_path / "runs"), "--thin", "--out", str(packed)]) == 0
    assert "2 runs, 1 missing" in capsys.readouterr().out
    assert main(["pack", str(packed), "--thin", "--out", str(again)]) == 0
    for place in ("twister/Pong/seed0", "twister/Pong/seed1"):
        kept = (packed / place / "metrics.jsonl").read_text()
        assert len(kept) < 300_000
        assert kept == (again / place / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in kept.splitlines()]
        assert len(rows) == 2000
        assert sum("losses/3" in row for row in rows) == 100
        assert "losses/3" in rows[-1]
        assert str(tmp_path) not in (packed / place / "config.json").read_text()
    found = {}
    for name, source in {"runs": tmp_path / "runs", "packed": packed}.items():
        (tmp_path / "runs/unfinished/config.json").unlink(missing_ok=True)
        arguments = ["--json", str(tmp_path / f"{name}.json"), "--out", str(tmp_path / "out")]
        assert main(["aggregate", str(source), *arguments]) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["packed"] == found["runs"]
    assert found["packed"]["games"]["Pong"]["scores"] == [10.0, 11.0]


RESULTS = Path(experiments.__file__).parent / "results"


@pytest.mark.parametrize("kept", [path.name for path in RESULTS.iterdir() if path.is_dir()])
def test_what_is_kept_in_the_repository_is_whole_and_small(kept):
    pack.verify(RESULTS / kept)
    sets = scores.read_sets([str(RESULTS / kept)], partial=True)
    size = sum(path.stat().st_size for path in (RESULTS / kept).rglob("*") if path.is_file())
    assert size < 500_000 * sum(each.count for each in sets)
    for config in (RESULTS / kept).rglob("config.json"):  # says nothing of the machine's directories
        assert not Path(json.loads(config.read_text())["logdir"]).is_absolute()


def test_two_runs_of_one_place_are_refused(tmp_path, capsys):
    for name in ("one", "other"):
        simulated.write_run(tmp_path / "runs" / name, "Pong", 1.0)
    assert main(["pack", str(tmp_path / "runs"), "--out", str(tmp_path / "packed")]) == 2
    assert "are both twister/Pong/seed0: pack them apart" in capsys.readouterr().err


def test_nothing_is_overwritten_and_nothing_empty_is_packed(packed, tmp_path, capsys):
    assert main(["pack", str(tmp_path / "some"), "--out", str(packed)]) == 2
    assert "is there already" in capsys.readouterr().err
    directory = simulated.write_suite(tmp_path, {"Pong": [1.0]}, name="half", done=False)
    assert main(["pack", str(directory), "--out", str(tmp_path / "x")]) == 2
    assert "no finished run, so nothing to pack" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
