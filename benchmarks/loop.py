"""End to end: the real loop on a real game, and the part of it that is not the update."""

import contextlib
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from typing import Any

import jax

from benchmarks.bench import Bench
from benchmarks.subject import update_keys
from benchmarks.timing import Clock, Times
from twister_jax.agents import make_agent
from twister_jax.agents.base import Agent
from twister_jax.config import Config
from twister_jax.envs import make_vector_env
from twister_jax.envs.base import EnvSpec
from twister_jax.fields import replace
from twister_jax.training import loop
from twister_jax.training.progress import Progress
from twister_jax.training.run import Run
from twister_jax.training.signals import Interrupted, Signals

SECTION = "loop"
_ROUNDS = 8
"""The loop and its update alone, interleaved: both see one machine. The first of the loop does not count."""
_NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Mark:
    """Where the run stood when an iteration began."""

    seconds: float
    env_steps: int
    updates: int

    @classmethod
    def now(cls, run: Run) -> "Mark":
        """Here and now."""
        return cls(time.perf_counter(), run.counters.env_steps, run.counters.updates)


class _Quiet(Progress):
    """The table is on the standard output; what a run has to say goes elsewhere."""

    def update(self, line: str) -> None:
        self._next = time.monotonic() + self._every

    def say(self, line: str) -> None:
        print(line, file=sys.stderr)


class _Done(Exception):
    """Enough steps were measured."""


class _Watch:
    """Takes the place of an iteration: notes when each begins, and ends the run after `steps` agent steps."""

    def __init__(self, steps: int, fill: float, repeats: int):
        self.steps, self.fill, self.repeats = steps, fill, repeats
        self.rounds: list[list[Mark]] = [[]]
        self.alone: Clock | None = None
        """Of the update with nothing beside it."""

    def iterate(self, run: Run) -> None:
        """One iteration and, at the end of a round, some updates alone."""
        for name in ("act", "update", "update averages"):
            run.program(name)
        self.rounds[-1].append(Mark.now(run))
        done = run.counters.env_steps - self.rounds[0][0].env_steps
        if done >= len(self.rounds) * self.steps / _ROUNDS:
            self.time_update(run)
            if len(self.rounds) == _ROUNDS:
                raise _Done
            self.rounds.append([Mark.now(run)])
        loop.act_learn_step(run)

    def time_update(self, run: Run) -> None:
        """Times updates of the run as it stands. What they learn stays learned, but does not count."""
        program, keys = run.program("update"), update_keys(run.config)

        def step(carry: Any) -> Any:
            state, replay, _, index = carry
            return *program(state, replay, keys[index % len(keys)]), index + 1

        carry = jax.block_until_ready((run.state.agent, run.replay, None, 0))
        if self.alone is None:
            self.alone = Clock(step, carry, self.fill)
        else:
            self.alone.carry = carry
        for _ in range(self.repeats):
            self.alone.sample()
        agent, run.replay, *_ = self.alone.carry
        run.state = dataclasses.replace(run.state, agent=agent)


def run(bench: Bench) -> None:
    """A short run in a temporary directory, with everything but checkpoints, pictures, rows and evaluation.

    Its update alone is sampled in every round, whatever `--budget` says.
    """
    bench.forget()  # its memory is wanted, and the run has a state and a replay of its own
    started, steps = time.perf_counter(), bench.options.loop_steps
    watch = _Watch(steps, bench.fill, math.ceil(bench.options.repeats / _ROUNDS))
    with tempfile.TemporaryDirectory(prefix="benchmarks-run-") as directory, Signals() as signals:
        run = Run(undisturbed(bench.config, directory), _untrained, make_vector_env, _Quiet(), signals)
        try:
            with contextlib.suppress(_Done):
                loop.learn_everything(run, iterate=watch.iterate)
        except Interrupted:
            raise KeyboardInterrupt from None
        finally:
            run.env.close()
    if watch.alone is None:
        bench.report.fail(SECTION, f"the run is over too soon; --loop-steps {steps} is too large")
        return
    report(bench, watch.rounds, watch.alone.times, started)


def _untrained(config: Config, spec: EnvSpec) -> Agent:
    """The agent without pretraining, so that a short run gets to its updates."""
    return dataclasses.replace(make_agent(config, spec), pretraining=())


def undisturbed(config: Config, directory: str) -> Config:
    """The same run, as long and with as large a replay, without what happens once in thousands of steps."""
    seldom = ("log_every", "checkpoint_every", "checkpoint_minutes")
    changes = {"logdir": directory, "train.report_every": 0}
    return replace(config, changes | {f"train.{name}": _NEVER for name in seldom})


def report(bench: Bench, rounds: list[list[Mark]], update: Times, started: float) -> None:
    """Rows from the times at which iterations began, and from the update timed alone.

    Medians of both: one slow step says little about the loop.
    """
    note = "environments, prefill and compilation, this process being warm"
    bench.report.add(SECTION, "start to first update", rounds[0][0].seconds - started, "s", note)
    settled = [_settled(marks) for marks in rounds[1:]]
    iterations = sum(len(marks[1:]) for marks in settled)
    updates = sum(marks[-1].updates - marks[0].updates for marks in settled if marks)
    period = max(1, round(iterations / max(1, updates)))
    laps = [lap for marks in settled for lap in itertools.pairwise(marks[::period])]
    steps = sum(b.env_steps - a.env_steps for a, b in laps)
    if not updates or not steps:
        few = f"too few steps with updates; --loop-steps {bench.options.loop_steps} is too small"
        bench.report.fail(SECTION, few)
        return
    updates = sum(b.updates - a.updates for a, b in laps)
    rests = [b.seconds - a.seconds - (b.updates - a.updates) * update.median for a, b in laps]
    learning = updates / steps * update.median
    each = Times(tuple(learning + rest * len(laps) / steps for rest in rests))
    rest = each.median - learning
    game = f"{bench.config.game}, {steps} steps, {updates} updates"
    bench.report.time(SECTION, "wall time per environment step", each, game)
    bench.report.time(SECTION, "update alone", update, "same program and replay, interleaved with the loop")
    bench.report.add(SECTION, "not the update, per environment step", rest, "s", "without checkpoints")
    bench.report.add(SECTION, "not the update, share of wall time", rest / each.median)


def _settled(marks: list[Mark]) -> list[Mark]:
    """Iterations of a round with the updates that were over when they began.

    What an iteration enqueues runs during the next one, which waits for it at its action.
    """
    return [dataclasses.replace(b, updates=a.updates) for a, b in itertools.pairwise(marks) if a.updates]
