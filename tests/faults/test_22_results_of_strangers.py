"""Suites and packs from strangers: nothing outside them is written, deleted, or read into a pack."""

import json
import os
import shutil

import pytest

from experiments import __main__ as program
from tests.experiments.simulated import write_suite
from tests.faults.test_01_hostile_directory import KINDS as RUNS
from tests.faults.test_01_hostile_directory import replace, state_of
from twister_jax.errors import UserError
from twister_jax.training.train import train_seeds

RUN = "twister/Breakout/seed0"


def link(name, target):
    return lambda root, home: replace(root / name, lambda path: path.symlink_to(home / target))


def write(name, **fields):
    """Other fields in a JSON file."""

    def act(root, home):
        path = root / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | fields))

    return act


def plan(**fields):
    """The first run of the plan says something else."""

    def act(root, home):
        path = root / "suite.json"
        stored = json.loads(path.read_text())
        stored["runs"][0] |= fields
        path.write_text(json.dumps(stored))

    return act


def linked_weights(root, home):
    state = root / RUN / "checkpoints" / "000000001-0"
    state.mkdir(parents=True)
    (state / "state").symlink_to(home)


def linked_checkpoint(root, home):
    (root / RUN / "checkpoints").mkdir()
    (root / RUN / "checkpoints" / "000000001-0").symlink_to(home)


def without_a_plan(place):
    """A folder of runs, one of which wants to be packed somewhere else."""

    def act(root, home):
        (root / "suite.json").unlink()
        write(f"{RUN}/config.json", agent=place)(root, home)

    return act


def pipes(root, home):
    for name in ("metrics.jsonl", "job.json", "train.log"):
        replace(root / RUN / name, os.mkfifo)


def forged_manifest(root, home):
    listed = {"../home/shell-start-up": {"sha256": "0", "bytes": 6}, "suite.json": 5}
    (root / "manifest.json").write_text(json.dumps({"files": listed}))


KINDS = {
    "a run is a link": link(RUN, "."),
    "a folder of runs is a link": link("twister", "."),
    "the plan is a link": link("suite.json", "manifest.json"),
    "a score is a link": link(f"{RUN}/evaluation.json", "manifest.json"),
    "rows are a link": link(f"{RUN}/metrics.jsonl", "metrics.jsonl"),
    "results are a link": link("results", "."),
    "weights are a link": linked_weights,
    "a checkpoint is a link": linked_checkpoint,
    "pipes in place of files": pipes,
    "the plan leads outside": plan(directory="../../home"),
    "the plan leads to the root": plan(directory="/etc"),
    "the plan's directory is a number": plan(directory=5),
    "the plan's steps are text": plan(steps="many"),
    "the plan's steps are endless": plan(steps=10**400),
    "runs wants to be packed outside": without_a_plan("../../home"),
    "runs want to be packed at the root": without_a_plan("/tmp"),
    "a manifest leads outside": forged_manifest,
    "a score is endless": write(f"{RUN}/evaluation.json", mean=1e999),
    "a score is beyond all bounds": write(f"{RUN}/evaluation.json", mean=10**400),
    "a seed is text": write(f"{RUN}/evaluation.json", seed="0"),
    "a protocol is a list": write(f"{RUN}/evaluation.json", protocol=[1]),
    "a game is a list": write(f"{RUN}/evaluation.json", game=["Pong"]),
    "settings are a list": write(f"{RUN}/config.json", train=[1]),
    "a process moves the cursor": write(f"{RUN}/job.json", state="failed", last_line="\x1b[2J", pid=-1),
}


@pytest.fixture
def root(tmp_path):
    return write_suite(tmp_path / "suites", {"Breakout": [1.0, 2.0], "Pong": [3.0, 4.0]})


def answer(capsys, *arguments):
    code = program.main([str(each) for each in arguments])
    said = capsys.readouterr()
    assert code in (0, 2), said.err
    assert len(said.err.splitlines()) == (code == 2), said.err
    assert "\x1b" not in said.out + said.err
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_no_canary_changes_or_is_packed(kind, tmp_path, root, home, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program.importlib.import_module("experiments.plots"), "draw", lambda *_: [])
    KINDS[kind](root, home)
    before = state_of(home)
    answer(capsys, "status", root)
    answer(capsys, "aggregate", root, "--partial")
    answer(capsys, "plot", root, "--partial")
    shutil.rmtree(root / "results", ignore_errors=True) if not (root / "results").is_symlink() else None
    answer(capsys, "pack", root, "--weights", "--out", tmp_path / "pack")
    assert state_of(home) == before
    assert set(os.listdir(tmp_path)) <= {"home", "suites", "pack", "some-results"}
    for path in (tmp_path / "pack").rglob("*"):
        assert not path.is_symlink()
        assert not path.is_file() or b"canary" not in path.read_bytes()


@pytest.mark.parametrize("kind", RUNS)
def test_no_canary_changes_or_is_packed_where_a_run_is_hostile(
    kind, tmp_path, home, undisturbed, capsys, monkeypatch
):
    """The directories of `test_01_hostile_directory.py`, in a folder of runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program.importlib.import_module("experiments.plots"), "draw", lambda *_: [])
    run = tmp_path / "suites" / "minimal" / "Catch" / "seed0"
    shutil.copytree(undisturbed, run)
    RUNS[kind](run, home)
    before = state_of(home)
    for command in (["status"], ["aggregate", "--partial"], ["plot", "--partial"]):
        answer(capsys, command[0], tmp_path / "suites", *command[1:])
    answer(capsys, "pack", tmp_path / "suites", "--weights", "--out", tmp_path / "pack")
    assert state_of(home) == before
    assert set(os.listdir(tmp_path)) <= {"home", "suites", "pack"}
    for path in (tmp_path / "pack").rglob("*"):
        assert not path.is_symlink()
        # A second name of a file is read: whoever could give it could read the file.
        known = path.is_file() and kind != "rows are a second name of it"
        assert not known or b"canary" not in path.read_bytes()


def test_every_command_that_reads_results_is_tried():
    assert program.COMMANDS.keys() - {"suites", "run", "job"} == {"status", "aggregate", "plot", "pack"}


def test_a_suite_is_not_trained_through_a_link(tmp_path, root, home, capsys):
    replace(root / "twister", lambda path: path.symlink_to(home))
    (tmp_path / "some.toml").write_text(
        'preset = "debug"\ngames = ["Breakout"]\nseeds = [0]\nsets.twister.agent = "twister"\n'
    )
    before = state_of(home)
    assert program.main(["run", str(tmp_path / "some.toml"), "--root", str(root.parent)]) == 2
    assert "is a symbolic link: refused" in capsys.readouterr().err
    assert state_of(home) == before


def test_a_seed_of_a_group_is_not_trained_through_a_link(tmp_path, home):
    from tests.runs import config_of
    from twister_jax.cli import of_seeds

    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "seed0").symlink_to(home)
    before = state_of(home)
    with pytest.raises(UserError, match="is a symbolic link: refused"):
        train_seeds(of_seeds(config_of(tmp_path / "group"), [0, 1]))
    assert state_of(home) == before


SUITE = 'preset = "debug"\ngames = ["Catch"]\nseeds = [0]\nsets.twister.agent = "twister"\n'


@pytest.mark.parametrize(
    "text",
    [
        SUITE.replace("twister.agent", '"../../home".agent'),
        SUITE.replace("twister.agent", '"".agent'),
        SUITE.replace("[0]", "[99999999999999999999]"),
        SUITE.replace("[0]", "[-1]"),
        SUITE.replace('"Catch"', '"../x"'),
        SUITE + "score_range = []\n",
        SUITE + "score_range = [nan, inf, 'x']\n",
        SUITE + "overrides = 3\n",
        SUITE + "register = ['os:abort']\n",
        SUITE + "register = 'no_such_module:f'\n",
        SUITE.replace('agent = "twister"', "agent = {}"),
        "a=" + "[" * 50_000,
        "a" * 100_000,
        "\0",
    ],
)
def test_a_suite_that_cannot_be_is_one_line(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.toml").write_text(text)
    assert answer(capsys, "run", "some.toml", "--root", tmp_path / "root") == 2
    assert os.listdir(tmp_path) == ["some.toml"]
