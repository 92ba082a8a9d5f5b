"""3. Stored steps that all checkpoints share are damaged: the run goes on without them, and says so."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import config_of, damage
from tests.third import MinimalConfig
from tests.training.test_checkpoint import Run, flip
from twister_jax.replay import store
from twister_jax.training import loop
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.load import load_run
from twister_jax.training.run import Run as TrainingRun
from twister_jax.training.train import train

WINDOW = MinimalConfig().batch_length
NO_PHASES = {"algorithm.warm_up": 0, "algorithm.second": 0}


@pytest.mark.parametrize("damaged", ["the oldest", "a middle one", "all"])
def test_a_run_goes_on_without_stored_steps_that_are_damaged(tmp_path, damaged, capsys):
    """All checkpoints share them, but parameters, optimisers and counters are intact."""
    assert train(config_of(tmp_path, 80)) == 0
    segments = sorted((tmp_path / "checkpoints" / "replay").glob("*.npy"))
    assert len(segments) > 2
    for path in {"the oldest": segments[:1], "a middle one": segments[1:2], "all": segments}[damaged]:
        damage(path)
    state = load_run(tmp_path).state  # never needs the replay
    capsys.readouterr()
    assert train(config_of(tmp_path, 120)) == 0
    assert "stored steps were damaged on disk: resumed without them at step 80" in capsys.readouterr().out
    loaded = load_run(tmp_path)
    assert loaded.counters.env_steps == 120
    assert int(loaded.state["updates"]) > int(state["updates"]) + 10
    (note,) = json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["notes"]
    assert note == loaded.counters.notes[0]
    assert train(config_of(tmp_path, 130)) == 0  # what was saved since is sound


def test_a_run_whose_replay_was_lost_learns_again_when_it_can(tmp_path):
    """Nothing is drawn from too few steps, and what could not be learned is not made up for in a burst."""
    config = config_of(tmp_path, 80, **NO_PHASES)
    assert train(config) == 0
    before = load_run(tmp_path).counters
    for path in (tmp_path / "checkpoints" / "replay").glob("*.npy"):
        damage(path)
    assert train(config_of(tmp_path, 100, **NO_PHASES)) == 0
    after = load_run(tmp_path).counters
    lost = after.filled_at - before.filled_at
    assert 0 < lost <= WINDOW
    assert after.updates - before.updates == pytest.approx(0.7 * (20 - lost), abs=1)


@pytest.mark.parametrize("interrupted", ["pretrain", "update"])
def test_nothing_is_learned_or_drawn_from_a_replay_that_was_lost(tmp_path, interrupted, monkeypatch):
    """Lost between two updates of a pretraining phase, or where a picture was due."""
    config, count = config_of(tmp_path), 0
    original = getattr(loop, interrupted)

    def counted(run, kind, *args):
        nonlocal count
        original(run, kind, *args)
        count += interrupted == "pretrain" or kind == "update"
        if count == (10 if interrupted == "pretrain" else 40):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, interrupted, counted)
        assert train(config) == 143
    before = load_run(tmp_path).counters
    assert (before.pretraining_updates, before.updates) == (
        (10, 0) if interrupted == "pretrain" else (50, 40)
    )
    for path in (tmp_path / "checkpoints" / "replay").glob("*.npy"):
        damage(path)

    stored = []

    def noted(function):
        def call(run, *args):
            stored.append(run.stored)
            return function(run, *args)

        return call

    monkeypatch.setattr(loop, "update", noted(loop.update))
    program = TrainingRun.program
    monkeypatch.setattr(
        TrainingRun, "program", lambda run, name: (noted(program) if name == "report" else program)(run, name)
    )
    assert train(config) == 0
    assert min(stored) >= WINDOW
    assert load_run(tmp_path).counters.pretraining_updates == 50
    assert list((tmp_path / "pictures").iterdir())


def test_visit_counts_of_the_steps_that_are_left_are_kept(tmp_path):
    run = Run(tmp_path / "c")
    run.save(5)
    run.save(6)  # 11 steps went into 8 slots
    damage(next((run.directory / "replay").glob("000000000-*")))
    saved = jax.tree.map(jnp.asarray, run.saved[11][1])
    found = Checkpointer(run.directory).restore(run.saved[11][0], run.replay)
    assert (found.lost, found.visits_lost, int(found.replay.inserted)) == (2, False, 6)
    for name in ("frames", "visits"):
        ours, theirs = (store.in_order(each, getattr(each, name)) for each in (found.replay, saved))
        np.testing.assert_array_equal(ours[:, :6], theirs[:, 2:])


def test_visit_counts_that_are_damaged_in_every_checkpoint_are_counted_anew(tmp_path, capsys):
    run = Run(tmp_path / "c")
    run.save(5)
    run.save(2)
    for path in run.directory.glob("0*/visits.npy"):
        flip(path, 1200)
    found = Checkpointer(run.directory).restore(run.saved[7][0], run.replay)
    assert (found.lost, found.visits_lost, int(found.replay.inserted)) == (0, True, 7)
    assert not np.any(found.replay.visits)
    assert train(config_of(tmp_path / "run", 60)) == 0
    for path in (tmp_path / "run" / "checkpoints").glob("0*/visits.npy"):
        damage(path)
    assert train(config_of(tmp_path / "run", 80)) == 0
    assert "visit counts were damaged on disk: counted anew from step 60" in capsys.readouterr().out
