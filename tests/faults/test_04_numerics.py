"""4. What decides the numbers is recorded, and a resumption that cannot be exact says so."""

import os

from tests.runs import config_of
from twister_jax.training.load import load_run
from twister_jax.training.train import train


def test_a_resumption_that_cannot_be_exact_says_so(tmp_path, monkeypatch, capsys):
    assert train(config_of(tmp_path, 60)) == 0
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores | {1000})
    capsys.readouterr()
    assert train(config_of(tmp_path, 80)) == 0
    (note,) = load_run(tmp_path).counters.notes
    assert note in capsys.readouterr().out
    assert f"threads {len(cores) + 1} (was {len(cores)}): not bit for bit" in note
