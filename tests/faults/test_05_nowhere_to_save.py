"""5. A run whose checkpoints all fail says so loudly, is saved somewhere else, and does not end with 0."""

import errno
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.runs import config_of, final_state, rows_of
from twister_jax.training import rescue
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.train import train


@pytest.fixture
def refusing(tmp_path, monkeypatch):
    """Directories below which no checkpoint can be written."""
    places, save = [tmp_path / "run"], Checkpointer.save

    def save_elsewhere(self, step, snapshot, wait=True):
        if any(self.directory.is_relative_to(place) for place in places):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, step, snapshot, wait)

    monkeypatch.setattr(Checkpointer, "save", save_elsewhere)
    for name in ("work", "home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(rescue.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return places


@pytest.mark.parametrize("refused", [(), ("work", "home")])
def test_what_was_trained_is_saved_elsewhere(tmp_path, refusing, refused, undisturbed, capsys):
    refusing += [tmp_path / name for name in refused]
    assert train(config_of(tmp_path / "run", **{"env.num_envs": 2})) == 1
    said = capsys.readouterr().out
    place = Path(re.search(r"NOT SAVED in \S+: what was trained up to step 120 lies in (\S+)", said)[1])
    assert place.parent == tmp_path / ("temporary" if refused else "work")
    (ours, _), (theirs, _) = final_state(place), final_state(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert rows_of(place) == rows_of(undisturbed)
    # It is a run like any other, and the games were played.
    assert train(config_of(place, 130, **{"env.num_envs": 2})) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["episodes"] == 5
    assert not [path for name in refused for path in (tmp_path / name).iterdir()]


def test_where_nothing_can_be_written_it_is_said(tmp_path, refusing, capsys):
    refusing.append(tmp_path)
    assert train(config_of(tmp_path / "run", 60)) == 1
    said = capsys.readouterr().out
    assert "NOT SAVED: what was trained up to step 60 could be written neither to" in said
    assert said.count("No space left on device") >= 4  # the run's own directory, and three others


def test_places_that_a_user_does_not_have_are_left_out(monkeypatch, tmp_path):
    """A working directory that was deleted; no HOME and no entry in the password file."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    assert (rescue._working_directory(), len(rescue._home())) == ([tmp_path / "gone"], 1)
    (tmp_path / "gone").rmdir()

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert rescue._working_directory() == rescue._home() == []
