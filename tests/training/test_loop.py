import dataclasses
import json
import math
import os
import random
import signal
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import third
from tests.runs import (
    Killed,
    assert_same_run,
    config_of,
    final_state,
    killed_env,
    rows_of,
    start,
    wait_until,
)
from twister_jax.agents import make_agent
from twister_jax.agents.base import Observation
from twister_jax.envs import make_vector_env
from twister_jax.errors import UserError
from twister_jax.presets import make_config, read_config
from twister_jax.replay import store
from twister_jax.training import loop
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.logs import Averages, Log, MetricsFile
from twister_jax.training.progress import Progress, duration, outlook
from twister_jax.training.run import DivergedError, Run
from twister_jax.training.rundir import RunDirectory
from twister_jax.training.save import Snapshot
from twister_jax.training.signals import Signals
from twister_jax.training.state import updates_due
from twister_jax.training.train import train

WINDOW = third.MinimalConfig().batch_length
NO_PHASES = {"algorithm.warm_up": 0, "algorithm.second": 0}


# ------------------------------------------------------------------------------------------- schedule


@given(
    st.integers(0, 10**6),
    st.integers(0, 10**4),
    st.sampled_from([0.1, 0.25, 0.7, 1.0, 125_000 / 95_000, 4.0]),
)
def test_updates_due_never_drifts(steps, filled_at, rate):
    due = updates_due(filled_at + steps, filled_at, rate)
    assert abs(due - steps * rate) < 1 + 1e-6
    assert due <= updates_due(filled_at + steps + 1, filled_at, rate)


def test_nothing_is_due_before_the_prefill_is_over():
    assert updates_due(100, None, 1.0) == 0


def test_counters_agree_with_what_was_done(undisturbed):
    state, counters = final_state(undisturbed)
    assert counters["env_steps"] >= 120
    assert counters["env_steps"] < 120 + 2
    assert counters["updates"] == math.floor((counters["env_steps"] - counters["filled_at"]) * 0.7)
    assert counters["pretraining_updates"] == 50
    assert state["updates"] == counters["updates"] + 50
    assert counters["filled_at"] in (20, 21)
    # Catch: nine steps and a reset, in two environments that end together.
    assert counters["iterations"] + 1 == math.ceil((counters["env_steps"] / 2) * 10 / 9)


def test_rows_are_in_order_and_complete(undisturbed):
    rows = rows_of(undisturbed)
    assert [row["phase_updates"] for row in rows if row.get("phase") == "warm_up"] == [7, 14, 21, 28, 30]
    assert [row["phase_updates"] for row in rows if row.get("phase") == "second"] == [7, 14, 20]
    main = [row for row in rows if "phase" not in row]
    assert [row["updates"] for row in main] == list(range(7, main[-1]["updates"] + 1, 7))
    assert all(np.isfinite(row["losses/image"]) for row in main)
    assert sum(row.get("episode/count", 0) for row in rows) >= 2 * (120 // 18) - 2
    assert sorted((undisturbed / "pictures").glob("frame-*.png"))
    assert list(undisturbed.glob("events.out.tfevents.*"))


def test_prefill_lasts_until_a_window_fits(tmp_path):
    config = config_of(tmp_path, 60, **{"train.prefill_steps": 2, "env.num_envs": 2} | NO_PHASES)
    with Signals() as signals:
        run = Run(config, make_agent, make_vector_env, Progress(), signals)
        while run.filling:
            loop.fill(run)
    assert run.counters.iterations + 1 == WINDOW == int(run.replay.inserted)


@pytest.mark.parametrize("game", ["Catch", "slider:easy"])
def test_the_actor_goes_on_from_the_random_steps(tmp_path, game):
    settings = {"logdir": str(tmp_path), "env.num_envs": 2, "train.prefill_steps": 40} | NO_PHASES
    with Signals() as signals:
        config = make_config(third.AGENT, "debug", game, **settings)
        run = Run(config, make_agent, make_vector_env, Progress(), signals)
        while run.filling:
            loop.fill(run)
    stored = store.gather(run.replay, jnp.arange(2), jnp.zeros(2, int), run.stored)
    carry = run.agent.init_carry(run.state.agent, 2)
    for step in range(run.stored - 1):  # the last one is still to be answered
        seen = Observation(stored.image[:, step], stored.is_first[:, step])
        _, carry = run.agent.act(run.state.agent, carry, seen, jax.random.key(0))
        action = stored.action[:, step + 1]  # that of a reset step is stored as zeros, and not looked at
        resets = stored.is_first[:, step + 1, None]
        carry = run.agent.took(carry, jnp.where(resets, run.state.carry["action"], action))
    for name, expected in carry.items():
        np.testing.assert_allclose(run.state.carry[name], expected, atol=1e-6)
    assert not run.state.observation.is_first.all()


@pytest.mark.parametrize("before", [True, False])
def test_actions_come_before_or_after_the_updates(tmp_path, monkeypatch, before):
    config = config_of(tmp_path, 40, **{"train.act_before_update": before, "train.updates_per_step": 2.0})
    called = []
    program = Run.program
    monkeypatch.setattr(Run, "program", lambda self, name: called.append(name) or program(self, name))
    assert train(config) == 0
    order = [name for name in called if name in ("act", "update")]
    steps = "".join(name[0] for name in order[order.index("update") - 1 :])  # from the act before
    assert ("auu" * 8 if before else "uua" * 8) in steps
    assert steps.endswith("auuuu" if before else "auu")  # those that the last step earned


def test_a_run_that_acts_after_its_updates_resumes_exactly(tmp_path):
    changed = {"train.act_before_update": False, "env.num_envs": 2}
    whole, parts = (config_of(tmp_path / name, **changed) for name in ("whole", "parts"))
    assert train(whole) == 0
    with pytest.raises(Killed):
        train(parts, make_env=partial(killed_env, 15))
    assert train(parts) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# ----------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("after", [[5], [15, 3], [13, 18, 40]])
def test_a_run_that_was_killed_ends_where_an_undisturbed_one_ends(tmp_path, undisturbed, after):
    config = config_of(tmp_path, **{"env.num_envs": 2})
    for steps in after:
        with pytest.raises(Killed):
            train(config, make_env=partial(killed_env, steps))
    assert train(config) == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_save_at_every_step_changes_nothing(tmp_path, undisturbed):
    config = config_of(
        tmp_path, **{"env.num_envs": 2, "train.checkpoint_every": 1, "train.keep_checkpoints": 1}
    )
    assert train(config) == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("signals_at", [[3, 33, 80]])
def test_a_run_that_was_interrupted_anywhere_ends_where_an_undisturbed_one_ends(
    tmp_path, undisturbed, signals_at, monkeypatch, capsys
):
    """Signals arrive within pretraining too, where no checkpoint would have been due."""
    config = config_of(tmp_path, **{"env.num_envs": 2})
    housekeep = Run.housekeep
    count = 0

    def counted(self):
        nonlocal count
        count += 1
        if count in signals_at:
            os.kill(os.getpid(), signal.SIGTERM)
        housekeep(self)

    monkeypatch.setattr(Run, "housekeep", counted)
    for _ in signals_at:
        assert train(config) == 143
        assert "SIGTERM: saved" in capsys.readouterr().out
    assert train(config) == 0
    assert f"resuming {tmp_path} at step" in capsys.readouterr().out
    assert_same_run(tmp_path, undisturbed)


def test_a_finished_run_says_so_and_evaluates_again_only_if_asked(tmp_path, capsys):
    config = config_of(tmp_path, 60)
    assert train(config) == 0
    before = (tmp_path / "evaluation.json").stat().st_mtime_ns
    capsys.readouterr()
    assert train(config) == 0
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "evaluation.json").stat().st_mtime_ns == before
    more = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, episodes=3))
    assert train(more) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["episodes"] == 3


def test_more_steps_go_on_from_the_end(tmp_path):
    assert train(config_of(tmp_path, 60)) == 0
    assert train(config_of(tmp_path, 90)) == 0
    updates = [row["updates"] for row in rows_of(tmp_path) if "phase" not in row]
    assert updates == list(range(7, 50, 7))
    assert json.loads((tmp_path / "evaluation.json").read_text())["env_steps"] == 90


def test_another_model_in_the_same_directory_is_refused(tmp_path):
    train(config_of(tmp_path, 40))
    with pytest.raises(UserError, match=r"seed is 0 there, 1 here"):
        train(config_of(tmp_path, 40, seed=1))


def test_a_second_process_is_refused(tmp_path):
    config = config_of(tmp_path, 40)
    with RunDirectory(tmp_path) as directory:
        directory.write_config(config.to_dict())
        with pytest.raises(UserError, match="in use by process"):
            train(config)


# ------------------------------------------------------------------------------- failures on the way


def test_training_goes_on_when_a_checkpoint_cannot_be_saved(tmp_path, monkeypatch, capsys, undisturbed):
    save, calls = Checkpointer.save, []

    def sometimes(self, step, snapshot, wait=True):
        calls.append(step)
        if len(calls) in (1, 2):
            raise OSError(28, "No space left on device")
        save(self, step, snapshot, wait)

    monkeypatch.setattr(Checkpointer, "save", sometimes)
    config = config_of(tmp_path, **{"env.num_envs": 2})
    assert train(config) == 0
    said = capsys.readouterr().out
    assert said.count("could not be saved") == 2
    assert "No space left" in said
    assert len(calls) == 120 // 25 + 1
    assert_same_run(tmp_path, undisturbed)


def test_a_run_outlives_its_directory(tmp_path, undisturbed):
    directory = tmp_path / "run"
    config = config_of(directory, **{"env.num_envs": 2})
    steps = 0

    def vanishing(*args, **kwargs):
        env = make_vector_env(*args, **kwargs)
        step = env.step

        def step_and_vanish(actions):
            nonlocal steps
            steps += 1
            if steps == 40:
                directory.rename(tmp_path / "gone")
            return step(actions)

        env.step = step_and_vanish
        return env

    assert train(config, make_env=vanishing) == 0
    assert read_config(directory) == config
    rows = rows_of(directory)
    assert 0 < len(rows) < len(rows_of(undisturbed))
    assert rows == rows_of(undisturbed)[-len(rows) :]  # none since is lost
    (ours, _), (theirs, _) = final_state(directory), final_state(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert train(config) == 0  # it is a run again, and a finished one


@pytest.mark.parametrize(
    "host",
    [
        {"counters": {"iterations": -1}},
        {"counters": {"nothing": 1}},
        {"counters": {"env_steps": "many"}},
        {"counters": []},
        {"counters": {}, "averages": 3},
        {"counters": {}, "averages": {}, "metrics_offset": -5, "metrics_pending": []},
        {"counters": {}, "averages": {}, "metrics_offset": 0, "metrics_pending": 7},
    ],
)
def test_counters_from_a_stranger_are_checked(tmp_path, host):
    assert train(config_of(tmp_path, 40)) == 0
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    with Signals() as signals:
        run = Run(config_of(tmp_path, 60), make_agent, make_vector_env, Progress(), signals)
    sound = {"counters": {}, "averages": {}, "metrics_offset": 0, "metrics_pending": []}
    snapshot = Snapshot(run.state, run.replay, run.env.get_state(), {**sound, "spec": {}, **host})
    checkpointer.save(900, snapshot)
    with pytest.raises(UserError, match="cannot resume") as raised:
        train(config_of(tmp_path, 60))
    assert "\n" not in str(raised.value)


def test_rows_wait_while_the_disk_refuses_them(tmp_path):
    file = MetricsFile(tmp_path / "gone" / "metrics.jsonl")
    assert isinstance(file.write({"a": 1}), OSError)
    assert isinstance(file.write({"a": 2}), OSError)
    again = MetricsFile(file.path, file.offset, file.pending)  # as from a checkpoint
    file.path.parent.mkdir()
    assert again.write({"a": float("nan")}) is None
    assert [json.loads(line)["a"] for line in file.path.read_text().splitlines()] == [1, 2, None]


def test_rows_of_a_lost_future_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"a": 1})
    offset = file.offset
    file.write({"a": 2})
    with path.open("a") as torn:
        torn.write('{"a": ')
    again = MetricsFile(path, offset)
    again.write({"a": 3})
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3]


def test_a_run_that_diverges_stops_and_names_the_loss(tmp_path):
    settings = {"train.max_bad_updates": 5, "algorithm.bad_from": 60}
    config = config_of(tmp_path, 200, **settings | NO_PHASES)
    with pytest.raises(DivergedError, match=r"\d+ updates in a row were not finite, first in weights"):
        train(config)
    state, _ = final_state(tmp_path)
    assert np.isfinite(state["w"]).all()
    assert state["health"].longest < 5
    assert rows_of(tmp_path)[-1]["losses/weights"] is None
    assert rows_of(tmp_path)[-1]["health/longest"] >= 5
    assert not (tmp_path / "evaluation.json").exists()


def test_a_few_bad_updates_do_not_stop_a_run(tmp_path):
    settings = {"train.max_bad_updates": 5, "algorithm.bad_from": 30, "algorithm.bad_until": 34}
    assert train(config_of(tmp_path, 120, **settings | NO_PHASES)) == 0
    rows = rows_of(tmp_path)
    assert rows[-1]["health/skipped"] == 4
    assert all(row["losses/weights"] is not None for row in rows)  # means over the sound ones


@pytest.mark.parametrize(("method", "message"), [("reset", "cannot start"), ("step", "is kept")])
def test_a_failing_environment_is_one_clear_error(tmp_path, method, message):
    def broken(*args, **kwargs):
        env = make_vector_env(*args, **kwargs)

        def fail(*actions):
            raise RuntimeError("environment 0 failed 6 times in a row")

        setattr(env, method, fail)
        return env

    with pytest.raises(UserError, match="failed 6 times") as raised:
        train(config_of(tmp_path), make_env=broken)
    assert message in str(raised.value)


# -------------------------------------------------------------------------------------- real processes


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_exits(tmp_path, number, code):
    process = start(tmp_path, 20_000, "--checkpoint-every", "1000000")
    metrics = tmp_path / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 10_000, process)
    assert not Checkpointer(tmp_path / "checkpoints").steps()
    sent = time.monotonic()
    process.send_signal(number)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == code, said
    assert time.monotonic() - sent < 10
    assert "saved; the same command goes on" in said
    assert "Traceback" not in said
    assert Checkpointer(tmp_path / "checkpoints").steps()


def test_a_second_signal_ends_at_once(tmp_path):
    # One update takes minutes, so the first signal cannot be answered soon.
    process = start(tmp_path, 20_000, "--work", "10000000")
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists(), process)
    time.sleep(6)  # until it computes
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert time.monotonic() - sent < 3


def kill_at_random(directory, undisturbed_directory, config, steps, kills):
    seed = random.randrange(2**32)
    print("seed of the kills:", seed)
    draw = random.Random(seed)
    metrics, landed = directory / "metrics.jsonl", 0
    for _ in range(kills):
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process = start(directory, steps, "--env.num-envs", "2")
        # Only once it trains: a kill during start-up proves little.
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns != before):
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        landed += process.returncode == -signal.SIGKILL
    process = start(directory, steps, "--env.num-envs", "2")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert_same_run(directory, undisturbed_directory)
    print(f"{kills} kills, of which {landed} hit a run that trained")
    return landed


def test_a_process_killed_at_random_moments(tmp_path, undisturbed):
    config = config_of(tmp_path, **{"env.num_envs": 2})
    assert kill_at_random(tmp_path, undisturbed, config, 120, kills=3)


@pytest.mark.faults
@pytest.mark.parametrize("_", range(2))
def test_a_process_killed_at_many_random_moments(tmp_path, _):
    steps = 8_000
    config = config_of(tmp_path / "killed", steps, **{"env.num_envs": 2})
    undisturbed = tmp_path / "undisturbed"
    train(dataclasses.replace(config, logdir=str(undisturbed)))
    assert kill_at_random(tmp_path / "killed", undisturbed, config, steps, kills=25) >= 20


# --------------------------------------------------------------------------------------- small things


def test_the_emulator_runs_while_the_device_learns(tmp_path):
    """When the environments are stepped, the update that was asked for before has not finished."""
    config = config_of(tmp_path, 40, **{"algorithm.work": 300} | NO_PHASES)
    seen = []
    with Signals() as signals:
        run = Run(config, make_agent, make_vector_env, Progress(), signals)
        step = run.env.step

        def watched(actions):
            if run.counters.updates:
                seen.append(run.state.agent["updates"].is_ready())
            return step(actions)

        run.env.step = watched
        loop.learn_everything(run)
    assert seen.count(False) > len(seen) / 3


def test_averages_leave_out_what_is_not_finite():
    averages = Averages.empty({"a": 0, "b": 0})
    for a, b in ((1.0, np.nan), (np.inf, np.nan), (3.0, np.nan)):
        averages = averages.add({"a": jnp.float32(a), "b": jnp.float32(b)})
    assert averages.means() == {"a": 2.0, "b": None}
    assert Averages.from_host(json.loads(json.dumps(averages.to_host()))).means() == {"a": 2.0, "b": None}


def test_tensorboard_that_cannot_be_written_is_given_up(tmp_path, capsys):
    log = Log(tmp_path / "gone", Progress(), tensorboard=True)
    log.plot(1, {"a": 1.0})
    assert "TensorBoard events could not be written" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pretraining", "pictures"])
def test_nothing_is_written_through_a_linked_folder(tmp_path, capsys, name):
    for folder in ("run", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "home")
    log = Log(tmp_path / "run", Progress(), tensorboard=True)
    log.plot_pretraining(1, {"a": 1.0})
    log.pictures(1, {"frame": np.zeros((4, 4, 3), np.uint8)})
    assert f"{tmp_path / 'run' / name} is a symbolic link: refused" in capsys.readouterr().out
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize(("seconds", "text"), [(7980, "2h13m"), (245, "4m05s"), (11.6, "12s"), (-1, "0s")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"game": "Breakout", "train.steps": 25_200}, "expect 25,200 steps to take 1h00m at 7 a second"),
        ({"game": "Krull", "agent": "twm", "train.steps": 15_120}, "expect 15,120 steps to take 1h00m"),
        ({"game": "Breakout", "algorithm.batch_size": 16}, ""),  # how long that takes was not measured
        ({"game": "Catch"}, ""),
        ({"game": "Breakout", "preset": "paper"}, ""),
    ],
)
def test_who_starts_a_long_run_hears_what_to_expect(settings, says):
    config = make_config(**{"preset": "cpu", "agent": "twister"} | settings)
    assert outlook(config).startswith(says)
    assert bool(outlook(config)) == bool(says)
