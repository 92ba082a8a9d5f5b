"""13. A signal is answered between updates, however many are owed; no picture is lost to it."""

import os
import signal

import pytest

from tests.runs import assert_same_run, config_of
from twister_jax.training import loop
from twister_jax.training.load import load_run
from twister_jax.training.run import Run
from twister_jax.training.signals import Interrupted
from twister_jax.training.train import train


@pytest.mark.parametrize("after", [1, 33, 40])  # the last where a picture is due
def test_a_signal_is_answered_between_two_updates(tmp_path, undisturbed, after, monkeypatch):
    """However many are due: the action that was chosen before them is kept, and taken after resumption."""
    config = config_of(tmp_path, **{"env.num_envs": 2})
    update, count = loop.update, 0

    def counted(run, kind, key):
        nonlocal count
        update(run, kind, key)
        count += kind == "update"
        if count == after and kind == "update":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "update", counted)
    assert train(config) == 143
    loaded = load_run(tmp_path)
    assert loaded.counters.updates == after
    assert loaded.counters.acted
    assert train(config) == 0
    assert_same_run(tmp_path, undisturbed)
    pictures = [sorted(path.name for path in (d / "pictures").iterdir()) for d in (tmp_path, undisturbed)]
    assert pictures[0] == pictures[1]
    assert pictures[0]


def test_a_picture_whose_program_was_not_compiled_yet_is_drawn_after_resumption(
    tmp_path, undisturbed, monkeypatch
):
    config = config_of(tmp_path, **{"env.num_envs": 2})
    program = Run.program

    def interrupted(run, name):
        if name == "report":
            run.signals.received = signal.SIGTERM
            raise Interrupted
        return program(run, name)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "program", interrupted)
        assert train(config) == 143
    assert load_run(tmp_path).counters.updates == 40
    assert train(config) == 0
    assert_same_run(tmp_path, undisturbed)
    assert len(list((tmp_path / "pictures").iterdir())) == len(list((undisturbed / "pictures").iterdir())) > 0
