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

from twister_jax.agents.base import Pretraining
from twister_jax.randomness import Purpose, key_for
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
    """One step of the prefill: random actions, at which the actor looks on."""
    act(run)
    action = run.put_action(run.random_actions())
    run.state = dataclasses.replace(run.state, carry=run.agent.took(run.state.carry, action), action=action)
    step_env(run)
    if not run.filling:
        run.counters.filled_at = run.counters.env_steps


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
    if not run.config.train.act_before_update:
        learn(run)
    act(run)
    learn(run)
    step_env(run)


def act(run: Run) -> None:
    """Chooses the next action, unless that was done already."""
    if run.counters.acted:
        return
    key = key_for(run.config.seed, Purpose.ACT, run.counters.iterations)
    choose = run.program("act")
    action, carry = choose(run.state.agent, run.state.carry, run.state.observation, key)
    run.state = dataclasses.replace(run.state, carry=carry, action=action)
    run.counters.acted = True


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


def step_env(run: Run) -> None:
    """Waits for the action, steps every environment, and stores what comes."""
    step = run.step_env(run.state.action)
    run.store(run.state.action, step)
    run.count(step)
    run.counters.acted = False
