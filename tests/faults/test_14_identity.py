"""14. Checkpoints say what run they are of: those of another seed are not gone on with."""

import json
import shutil

import pytest

from tests.runs import config_of
from twister_jax.errors import UserError
from twister_jax.training.load import load_run
from twister_jax.training.train import train


def test_checkpoints_of_another_seed_are_refused(tmp_path):
    for seed in (0, 1):
        assert train(config_of(tmp_path / str(seed), 60, seed=seed)) == 0
    shutil.rmtree(tmp_path / "0" / "checkpoints")
    shutil.copytree(tmp_path / "1" / "checkpoints", tmp_path / "0" / "checkpoints")
    before = (tmp_path / "0" / "config.json").read_text()
    message = r"checkpoints holds another run: seed is 1 there, 0 here: .* LOGDIR"
    with pytest.raises(UserError, match=message):
        train(config_of(tmp_path / "0", 90))
    with pytest.raises(UserError, match=message):
        load_run(tmp_path / "0")
    assert (tmp_path / "0" / "config.json").read_text() == before
    stored = json.loads(before)
    assert load_run(tmp_path / "1").config.to_dict() | {"logdir": stored["logdir"], "seed": 0} == stored
