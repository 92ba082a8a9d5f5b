"""10. Reading beside a training that deletes what is read; and errors that may pass are no damage."""

import errno
import os
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from tests.runs import config_of, final_state
from tests.training.test_checkpoint import Run, state_like
from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.training import checkpoint, state_files
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.load import load_run
from twister_jax.training.train import train


def test_a_run_is_read_while_it_replaces_its_checkpoints(tmp_path):
    """One is kept, and every step writes another: what is read is deleted under the reader."""
    config = config_of(tmp_path, 130, **{"train.checkpoint_every": 1, "train.keep_checkpoints": 1})
    codes: list[int] = []
    training = threading.Thread(target=lambda: codes.append(train(config)))
    training.start()
    while training.is_alive() and not list(tmp_path.glob("checkpoints/0*")):
        time.sleep(0.01)
    seen = []
    while training.is_alive():
        seen.append(load_run(tmp_path).counters.env_steps)
    training.join()
    assert codes == [0]
    assert len(set(seen)) > 3
    assert seen == sorted(seen)


@pytest.mark.parametrize("times", [10, 10_000])
def test_a_checkpoint_that_vanishes_is_no_damage_however_often(tmp_path, monkeypatch, caplog, times):
    """Each is replaced while it is read: by and by the newest is got, or asked for once more."""
    run, read, left = Run(tmp_path / "c", keep=1), state_files.read, times
    run.save()

    def overtaken(path, like):
        nonlocal left
        left -= 1
        if left >= 0:
            os.rename(path.parent, path.parent.with_name(f"000000003-{times - left}"))
        return read(path, like)

    monkeypatch.setattr(state_files, "read", overtaken)
    if times == 10:
        assert run.checkpointer.load_state(state_like)[1]["env_steps"] == 3
    else:
        with pytest.raises(UserError, match=r"cannot be read now .* does not say that it is damaged"):
            run.checkpointer.load_state(state_like)
    assert not caplog.records


@pytest.fixture
def failing(monkeypatch):
    """Makes reading a file fail so many times."""
    monkeypatch.setattr(checkpoint, "_PAUSES", (0.0, 0.0, 0.0))
    left, opened = {}, files.open_regular

    def open_regular(path, *args):
        for name, count in left.items():
            if path.name == name and count:
                left[name] -= 1
                raise OSError(code, os.strerror(code), str(path))
        return opened(path, *args)

    code = errno.ESTALE
    monkeypatch.setattr(files, "open_regular", open_regular)
    return left


@pytest.mark.parametrize("name", ["manifest.json", "_METADATA"])
def test_an_error_that_passes_is_waited_for(undisturbed, failing, name, caplog):
    failing[name] = 2
    assert load_run(undisturbed).counters.env_steps == 120
    assert not caplog.records


@pytest.mark.parametrize("name", ["manifest.json", "env.bin"])
def test_an_error_that_stays_is_no_damage(tmp_path, undisturbed, failing, name):
    """Nothing is set aside, no older checkpoint is used, and no advice would cost a run."""
    shutil.copytree(undisturbed, tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    failing[name] = 4
    with pytest.raises(UserError, match=r"cannot be read now .*does not say that it is damaged") as error:
        train(config_of(tmp_path / "run", 150, **{"env.num_envs": 2}))
    assert "LOGDIR" not in str(error.value)
    if name == "manifest.json":
        failing[name] = 10**6
        with pytest.raises(UserError, match="cannot be read now"):
            load_run(tmp_path / "run")
        failing[name] = 0
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert train(config_of(tmp_path / "run", 150, **{"env.num_envs": 2})) == 0


def test_a_checkpoint_is_chosen_by_its_environment_steps(undisturbed):
    """Its name also counts pretraining updates."""
    there = Checkpointer(undisturbed / "checkpoints").steps()
    state, counters = final_state(undisturbed)
    assert there[-1] == counters["env_steps"] + 50
    found = load_run(undisturbed, step=counters["env_steps"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.state), state)
    with pytest.raises(UserError, match=r"no checkpoint of step 170 \(there: \d+, \d+, 120\)"):
        load_run(undisturbed, step=170)
