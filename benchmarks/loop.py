"""End to end: the real loop on a real game, and the part of it that is not the update."""

import contextlib
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from benchmarks.subject import update_keys
from benchmarks.timing import Clock, Times
from twister_jax import config as configs
from twister_jax.agents import make_agent
from twister_jax.config import Config
from twister_jax.envs import make_vector_env
from twister_jax.training.background import Interrupted, Signals
from twister_jax.training.loop import Run
from twister_jax.training.metrics import Progress
from twister_jax.training.rundir import RunDirectory

if TYPE_CHECKING:
    from benchmarks.bench import Bench

SECTION = "loop"
_ROUNDS = 8
"""Turns of the loop and of its update alone: both see one machine. The first of the loop does not count."""
_NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Mark:
    """Where the run stood when an iteration began."""

    seconds: float
    env_steps: int
    updates: int


class _Quiet(Progress):
    """The table is on the standard output; what a run has to say goes elsewhere."""

    def update(self, line: str) -> None:
        self._next = time.monotonic() + self._every

    def say(self, line: str) -> None:
        print(line, file=sys.stderr)


class _Done(Exception):
    """Enough steps were measured."""


class _MarkedRun(Run):
    """Notes the time at the beginning of every iteration that acts, and ends after `steps` agent steps."""

    rounds: list[list[Mark]]
    steps: int
    alone: "_Alone"

    def iterate(self) -> None:
        self.wait_for("act", "update", "update averages")
        self.rounds[-1].append(self.mark())
        done = self.counters.env_steps - self.rounds[0][0].env_steps
        if done >= len(self.rounds) * self.steps / _ROUNDS:
            self.alone.take(self)
            if len(self.rounds) == _ROUNDS:
                raise _Done
            self.rounds.append([self.mark()])
        super().iterate()

    def mark(self) -> Mark:
        """Here and now."""
        return Mark(time.perf_counter(), self.counters.env_steps, self.counters.updates)


class _Alone:
    """The update of a run with nothing beside it. What it learns stays learnt, but does not count."""

    def __init__(self, fill: float, repeats: int):
        self.fill, self.repeats = fill, repeats
        self.clock: Clock | None = None

    def take(self, run: Run) -> None:
        """Times some updates of the run as it stands."""
        program, keys = run.ready("update"), update_keys(run.config)

        def step(carry: Any) -> Any:
            state, replay, _, index = carry
            return *program(state, replay, keys[index % len(keys)]), index + 1

        carry = jax.block_until_ready((run.state.agent, run.replay, None, 0))
        if self.clock is None:
            self.clock = Clock(step, carry, self.fill)
        else:
            self.clock.carry = carry
        for _ in range(self.repeats):
            self.clock.sample()
        agent, run.replay, *_ = self.clock.carry
        run.state = dataclasses.replace(run.state, agent=agent)


def run(bench: "Bench") -> None:
    """A short run in a temporary directory, with everything but checkpoints, pictures, rows and evaluation.

    Its update alone is sampled in every turn, whatever `--budget` says.
    """
    bench.forget()  # its memory is wanted, and the run has a state and a replay of its own
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="benchmarks-run-") as directory:
        config = undisturbed(bench.config, directory, bench.pieces.LOOP_OVERRIDES)
        with RunDirectory(Path(directory)) as run_directory, Signals() as signals:
            run_directory.check_or_write_config(configs.to_dict(config), ())
            run = _MarkedRun(config, make_agent, make_vector_env, _Quiet(), signals)
            run.rounds, run.steps = [[]], bench.options.loop_steps
            run.alone = _Alone(bench.fill, math.ceil(bench.options.repeats / _ROUNDS))
            try:
                with contextlib.suppress(_Done):
                    run.learn_everything()
            except Interrupted:
                raise KeyboardInterrupt from None
            finally:
                run.tell.close()
                run.env.close()
    if run.alone.clock is None:
        bench.report.fail(SECTION, f"the run is over too soon; --loop-steps {run.steps} is too large")
        return
    tell(bench, run.rounds, run.alone.clock.times, started)


def undisturbed(config: Config, directory: str, overrides: dict[str, Any]) -> Config:
    """The same run, as long and with as large a replay, without what happens once in thousands of steps."""
    return configs.replace(
        config,
        {
            "logdir": directory,
            "train.report_every": 0,
            "train.log_every": _NEVER,
            "train.checkpoint_every": _NEVER,
            "train.checkpoint_minutes": float(_NEVER),
            **overrides,
        },
    )


def tell(bench: "Bench", rounds: list[list[Mark]], update: Times, started: float) -> None:
    """Rows from the times at which iterations began, and from the update timed alone.

    Medians of both: one slow step says little about the loop.
    """
    report = bench.report
    report.add(
        SECTION,
        "start to first update",
        rounds[0][0].seconds - started,
        "s",
        "emulator, prefill and compilation, this process being warm",
    )
    settled = [_settled(marks) for marks in rounds[1:]]
    iterations = sum(len(marks[1:]) for marks in settled)
    updates = sum(marks[-1].updates - marks[0].updates for marks in settled if marks)
    period = max(1, round(iterations / max(1, updates)))
    laps = [lap for marks in settled for lap in itertools.pairwise(marks[::period])]
    steps = sum(b.env_steps - a.env_steps for a, b in laps)
    if not updates or not steps:
        report.fail(
            SECTION, f"too few steps with updates; --loop-steps {bench.options.loop_steps} is too small"
        )
        return
    updates = sum(b.updates - a.updates for a, b in laps)
    rests = [b.seconds - a.seconds - (b.updates - a.updates) * update.median for a, b in laps]
    learning = updates / steps * update.median
    each = Times(tuple(learning + rest * len(laps) / steps for rest in rests))
    rest = each.median - learning
    game = f"{bench.config.game}, {steps} steps, {updates} updates"
    report.time(SECTION, "wall time per environment step", each, game)
    report.time(SECTION, "update alone", update, "the same program and replay, in turn with the loop")
    report.add(SECTION, "not the update, per environment step", rest, "s", "without checkpoints")
    report.add(SECTION, "not the update, share of wall time", rest / each.median)


def _settled(marks: list[Mark]) -> list[Mark]:
    """Iterations of a round with the updates that were over when they began.

    What an iteration enqueues runs during the next one, which waits for it at its action.
    """
    return [dataclasses.replace(b, updates=a.updates) for a, b in itertools.pairwise(marks) if a.updates]
