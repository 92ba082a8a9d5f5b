"""8. A signal during the final evaluation costs no game: the same command goes on exactly where it was."""

import contextlib
import json
import os
import signal
from functools import partial

import jax
import numpy as np
import pytest

from tests.faults.test_06_another_directory import env_that
from tests.runs import config_of
from twister_jax import files
from twister_jax.agents import make_agent
from twister_jax.envs import make_vector_env
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.randomness import Purpose, key_for
from twister_jax.training import evaluation
from twister_jax.training.kept_games import KeptGames
from twister_jax.training.progress import Progress
from twister_jax.training.signals import Interrupted, Signals
from twister_jax.training.train import train

RUN = {"env.num_envs": 2}


def evaluated_env(action, at, *args, **kwargs):
    if kwargs.get("evaluation"):
        return env_that(at, action, *args, **kwargs)
    return make_vector_env(*args, **kwargs)


def signalled(at):
    """Signals come before a run's last checkpoint too; this one comes with step `at` of the evaluation."""
    return partial(evaluated_env, lambda: os.kill(os.getpid(), signal.SIGTERM), at)


def result_of(directory):
    record = json.loads((directory / "evaluation.json").read_text())
    del record["protocol"]["commit"]  # somebody may be working on the tree
    return record


@pytest.mark.parametrize("signals_at", [[3], [12, 15], [25]])  # five games of nine steps, two at a time
def test_it_goes_on_where_it_was(tmp_path, undisturbed, signals_at, capsys):
    played = 0
    for at in signals_at:
        assert train(config_of(tmp_path, **RUN), make_env=signalled(at)) == 143
        assert "SIGTERM: saved; the same command goes on" in capsys.readouterr().out
        assert not (tmp_path / "evaluation.json").exists()
        played += at
    assert train(config_of(tmp_path, **RUN)) == 0
    assert f"going on after {2 * (played // 10)} of 5 games" in capsys.readouterr().out
    assert result_of(tmp_path) == result_of(undisturbed)
    assert not (tmp_path / "evaluation.partial").exists()


@pytest.mark.parametrize("game", ["Catch", pytest.param("Breakout", marks=pytest.mark.faults)])
def test_the_games_of_sampled_policies_are_the_same_ones(tmp_path, game):
    settings = {"evaluation.sample_actions": True, "evaluation.num_envs": 3, "evaluation.episodes": 7}
    if game == "Breakout":
        settings["env.evaluation_time_limit_frames"] = 400
    config = make_config("minimal", "debug", game, precision="float32", logdir=str(tmp_path), **settings)
    env = make_vector_env(game, config.env, 1, 0)
    agent = make_agent(config, env.spec)
    state = jax.jit(agent.init)(key_for(0, Purpose.INIT))
    trained = {"env_steps": 1, "updates": 1}

    def run(at=None):
        with Signals() as signals:
            make_env = signalled(at) if at else make_vector_env
            return evaluation.run(config, agent, state, make_env, trained, Progress(), signals)

    expected = run()
    for at in (5, 11, 8):
        with pytest.raises(Interrupted):
            run(at)
    again = run()
    for record in (expected, again):
        del record["protocol"]["commit"]
    assert again == expected


def test_what_acting_remembers_is_kept(tmp_path):
    """Every action is the one of an undisturbed evaluation, not only the scores."""
    config = config_of(tmp_path, **{"evaluation.sample_actions": True})
    env = make_vector_env(config.game, config.env, 2, 0)
    agent = make_agent(config, env.spec)
    state = jax.jit(agent.init)(key_for(0, Purpose.INIT))

    def played(stop=None):
        actions, signals = [], Signals()

        def see(action, step):
            if action is not None:
                actions.append(action)
            if len(actions) == stop:
                signals.received = signal.SIGTERM

        kept = KeptGames(tmp_path, "this one", 1e9, print, lambda: None)
        env = make_vector_env(config.game, config.env, 2, 0)
        with contextlib.suppress(Interrupted):
            evaluation.play(agent, state, env, [3, 2], 0, signals=signals, on_step=see, kept=kept)
        return actions

    whole = played()
    parts = [*played(5), *played(9), *played()]
    np.testing.assert_array_equal(parts, whole)
    assert len(np.unique(np.argmax(whole, -1))) > 1


@pytest.mark.parametrize("change", ["settings", "damage", "header", "empty", "link"])
def test_games_of_another_evaluation_are_not_gone_on_with(tmp_path, change, capsys):
    assert train(config_of(tmp_path, 60), make_env=signalled(25)) == 143
    path, settings = tmp_path / "evaluation.partial", {}
    data = path.read_bytes()
    if change == "settings":
        settings = {"evaluation.episodes": 6}
    elif change == "damage":
        path.write_bytes(data[:-3] + b"abc")
    elif change == "header":
        path.write_bytes(b'{"of": 3, "played": "x"}' + data[data.index(b"\n") :])
    elif change == "empty":
        path.write_bytes(b"")
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    capsys.readouterr()
    assert train(config_of(tmp_path, 60, **settings)) == 0
    assert "going on after" not in capsys.readouterr().out


def test_scores_that_cannot_be_kept_or_written_are_printed(tmp_path, monkeypatch, capsys):
    write = files.write_atomically

    def full(path, data):
        if path.name.startswith("evaluation"):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(files, "write_atomically", full)
    assert train(config_of(tmp_path, 60), make_env=signalled(25)) == 143
    assert "the games so far cannot be kept ([Errno 28] No space left on device); their scores: [" in (
        capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"evaluation\.json cannot be written .*printed above"):
        train(config_of(tmp_path, 60))
    (record,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert json.loads(record)["episodes"] == 5


def test_games_are_kept_now_and_then_without_a_signal(tmp_path, monkeypatch):
    """So that a kill costs no more of them than of training."""
    kept = []
    monkeypatch.setattr(KeptGames, "due", lambda self: True)
    monkeypatch.setattr(KeptGames, "keep", lambda self, standing: kept.append(standing.count))
    assert train(config_of(tmp_path, 60)) == 0
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) > 20
