"""9. `train.steps` may be raised at any time: the replay grows, and draws what a longer one draws."""

import json

import pytest

from tests.runs import assert_same_run, config_of, rows_of
from twister_jax.errors import UserError
from twister_jax.training.load import load_run
from twister_jax.training.train import train


def test_a_raised_run_ends_as_one_that_was_meant_to_be_so_long(tmp_path):
    assert train(config_of(tmp_path / "raised", 60)) == 0
    assert train(config_of(tmp_path / "raised", 120)) == 0
    assert train(config_of(tmp_path / "at once", 120)) == 0
    assert_same_run(tmp_path / "raised", tmp_path / "at once")


def test_a_replay_that_went_round_grows(tmp_path, monkeypatch):
    """With room for 50 steps while 80 are taken, and then for as many as wanted."""
    small = {"replay.capacity": 50, "train.keep_checkpoints": 1}
    assert train(config_of(tmp_path, 80, **small)) == 0
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["replay"]["capacity"] = 1_000_000  # as if train.steps had decided it
    (tmp_path / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr("twister_jax.training.start.check_same_run", lambda *_: None)
    assert train(config_of(tmp_path, 120, **{"train.keep_checkpoints": 1})) == 0
    assert load_run(tmp_path).counters.env_steps == 120
    assert not load_run(tmp_path).counters.notes
    (newest,) = (tmp_path / "checkpoints").glob("0*")
    replay = json.loads((newest / "manifest.json").read_text())["content"]["replay"]
    assert replay["capacity"] > 1000
    assert 50 + 40 < replay["inserted"] < 50 + 50  # the 50 that were held, then 40 steps and their resets


def test_lowering_is_refused_before_anything_is_written(tmp_path):
    """Here is room for 1,065 steps, and more were stored."""
    assert train(config_of(tmp_path, 1100, **{"train.updates_per_step": 0.01})) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rows = rows_of(tmp_path)
    with pytest.raises(UserError, match=r"is room for 1,065: set train\.steps no lower than it was"):
        train(config_of(tmp_path, 60, **{"train.updates_per_step": 0.01}))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == []
    assert rows_of(tmp_path) == rows
