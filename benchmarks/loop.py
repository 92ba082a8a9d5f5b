"""End to end: the real loop on a real game, and the part of it that is not the update."""

import contextlib
import dataclasses
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
_WARM_UP = 4
"""Iterations with updates that are not counted."""
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

    marks: list[Mark]
    steps: int

    def iterate(self) -> None:
        self.wait_for("act", "update", "update averages")
        self.marks.append(Mark(time.perf_counter(), self.counters.env_steps, self.counters.updates))
        if self.counters.env_steps - self.marks[0].env_steps >= self.steps:
            raise _Done
        super().iterate()


def run(bench: "Bench") -> None:
    """A short run in a temporary directory, with everything but checkpoints, pictures and evaluation."""
    bench.forget()  # its memory is wanted, and the run has a state and a replay of its own
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="benchmarks-run-") as directory:
        config = undisturbed(bench.config, directory, bench.pieces.LOOP_OVERRIDES)
        with RunDirectory(Path(directory)) as run_directory, Signals() as signals:
            run_directory.check_or_write_config(configs.to_dict(config), ())
            run = _MarkedRun(config, make_agent, make_vector_env, _Quiet(), signals)
            run.marks, run.steps = [], bench.options.loop_steps
            try:
                with contextlib.suppress(_Done):
                    run.learn_everything()
                jax.block_until_ready(run.state)
                update = _update_times(bench, run)
            except Interrupted:
                raise KeyboardInterrupt from None
            finally:
                run.tell.close()
                run.env.close()
    tell(bench, run.marks, update, started)


def undisturbed(config: Config, directory: str, overrides: dict[str, Any]) -> Config:
    """The same run, as long and with as large a replay, without what happens once in thousands of steps."""
    return configs.replace(
        config,
        {
            "logdir": directory,
            "train.report_every": 0,
            "train.checkpoint_every": _NEVER,
            "train.checkpoint_minutes": float(_NEVER),
            **overrides,
        },
    )


def _update_times(bench: "Bench", run: Run) -> Times:
    """The update of this very run, after it, with nothing in between."""
    program, keys = run.ready("update"), update_keys(run.config)

    def step(carry: Any) -> Any:
        state, replay, _, index = carry
        return *program(state, replay, keys[index % len(keys)]), index + 1

    clock = Clock(step, (run.state.agent, run.replay, None, 0), bench.fill)
    return clock.take(bench.options.repeats, bench.options.budget)


def tell(bench: "Bench", marks: list[Mark], update: Times, started: float) -> None:
    """Rows from the times at which iterations began, and from the update timed alone."""
    report = bench.report
    counted = [mark for mark in marks if mark.updates > 0][_WARM_UP:]
    report.add(
        SECTION,
        "start to first update",
        marks[0].seconds - started,
        "s",
        "emulator, prefill and compilation, this process being warm",
    )
    if len(counted) < 2 or counted[-1].env_steps == counted[0].env_steps:
        report.fail(
            SECTION, f"too few steps with updates; --loop-steps {bench.options.loop_steps} is too small"
        )
        return
    seconds = counted[-1].seconds - counted[0].seconds
    steps = counted[-1].env_steps - counted[0].env_steps
    updates = counted[-1].updates - counted[0].updates
    rest = seconds - updates * update.median
    game = f"{bench.config.game}, {steps} steps, {updates} updates"
    report.add(SECTION, "wall time per environment step", seconds / steps, "s", game)
    report.time(SECTION, "update alone", update, "the same program and replay, right after the run")
    report.add(SECTION, "not the update, per environment step", rest / steps, "s", "without checkpoints")
    report.add(SECTION, "not the update, share of wall time", rest / seconds)
