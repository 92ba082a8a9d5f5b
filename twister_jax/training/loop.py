"""The host loop: act, learn, step, store.

JAX returns before the device has finished, so an iteration puts the action and then the updates into the
device's queue, waits for the action alone, and steps the environments while the device learns. Metrics are
summed on the device and read once in `train.log_every` updates.

A run is data: what is on the device (`RunState` and the replay), the environments' own state, and a few
counters (`Counters`). All of it goes into every checkpoint, and every random draw depends on the seed and
those counters alone, so a run that was killed and restarted ends where it would have ended.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from twister_jax.agents.base import Pretraining
from twister_jax.randomness import Purpose, generator_for, key_for
from twister_jax.training.run import Run


def learn_everything(run: Run, iterate: Callable[[Run], None] | None = None) -> None:
    """From wherever the run stands to its last step; `iterate` takes the place of the function below."""
    iterate = iterate or act_learn_step
    if run.finished:
        return
    while not run.finished:
        if run.filling:
            fill(run)
        elif phase := run.phase:
            pretrain(run, *phase)
        elif run.steps_left:
            iterate(run)
        else:
            learn(run)  # what the last step earned
        run.housekeep()
    run.progress.update(run.progress_line())


def fill(run: Run) -> None:
    """One step of the prefill, with random actions."""
    spec, envs = run.env.spec, run.config.env.num_envs
    generator = generator_for(run.config.seed, Purpose.PREFILL, run.counters.iterations)
    step_env(run, spec.random_actions(generator, envs))
    if not run.filling:
        run.counters.filled_at = run.counters.env_steps
        # The actor has seen none of this, so it begins as if the present step were the first.
        everywhere = {"is_first": np.ones(run.env.num_envs, bool)}
        lies = run.devices.by_env(everywhere)
        observation = run.state.observation._replace(**run.devices.put(everywhere, lies))
        run.state = dataclasses.replace(run.state, observation=observation)


def pretrain(run: Run, phase: Pretraining, done: int) -> None:
    """One update of a pretraining phase that has had `done`."""
    key = key_for(run.config.seed, Purpose.PRETRAIN, run.counters.pretraining_updates)
    update(run, phase.name, key)
    run.counters.pretraining_updates += 1
    done += 1
    if done % run.config.train.log_every == 0 or done == phase.updates:
        run.write_row(phase.name, {"phase": phase.name, "phase_updates": done})


def act_learn_step(run: Run) -> None:
    """Acts, learns and steps; the environments run while the device learns."""
    if not run.counters.acted:
        act = run.program("act")
        key = key_for(run.config.seed, Purpose.ACT, run.counters.iterations)
        action, carry = act(run.state.agent, run.state.carry, run.state.observation, key)
        run.state = dataclasses.replace(run.state, carry=carry, action=action)
        run.counters.acted = True
    learn(run)
    step_env(run, run.state.action)
    run.counters.acted = False


def learn(run: Run) -> None:
    """All updates that are due by now. A signal is answered between any two of them."""
    while run.counters.updates < run.updates_due:
        key = key_for(run.config.seed, Purpose.UPDATE, run.counters.updates)
        update(run, "update", key)
        run.counters.updates += 1
        if run.counters.updates % run.config.train.log_every == 0:
            run.write_row("update")
        run.signals.check()


def update(run: Run, kind: str, key: Any) -> None:
    """Puts one update into the device's queue."""
    learn, add = run.program(kind), run.program(f"{kind} averages")
    agent, run.replay, metrics = learn(run.state.agent, run.replay, key)
    run.state = dataclasses.replace(run.state, agent=agent)
    run.averages[kind] = add(run.averages[kind], metrics)


def step_env(run: Run, action: Any) -> None:
    """Waits for the action, steps every environment, and stores what comes."""
    step = run.step_env(action)
    run.store(action, step)
    run.count(step)
