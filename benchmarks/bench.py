"""What the sections share: options, report, the subject, the yardstick, and the time that is left."""

import time
from typing import Any

from benchmarks.options import Options
from benchmarks.report import Report
from benchmarks.subject import Subject, make_subject, update_keys
from benchmarks.timing import Clock, Program, Times, Yardstick, compile_program
from twister_jax import agents
from twister_jax.config import Config
from twister_jax.runtime import compute_dtype


class Bench:
    """Built once; whatever is costly is made when first asked for."""

    def __init__(self, options: Options, config: Config, report: Report):
        self.options, self.config, self.report = options, config, report
        self._started = time.monotonic()
        self._subject: Subject | None = None
        self._yardstick: Yardstick | None = None
        self.update_program: Program | None = None
        self.update_times: Times | None = None

    # ----------------------------------------------------------------------------------- what is measured

    @property
    def subject(self) -> Subject:
        """The agent and its replay."""
        if self._subject is None:
            self._subject = make_subject(self.config)
        return self._subject

    def forget(self) -> None:
        """Drops the subject, so that the next use makes a new one: buffers are donated, memory is short."""
        self._subject = None

    @property
    def published_operations(self) -> float | None:
        """The published count of an update, which holds at the paper's setting alone."""
        package = agents.package(self.config.agent)
        at_paper = self.config.algorithm == package.presets["paper"].algorithm
        return package.published_flops if at_paper else None

    def compile_update(self) -> Program:
        """The update of the subject, compiled once."""
        if self.update_program is None:
            subject = self.subject
            key = update_keys(self.config, 1)[0]
            self.update_program = compile_program(
                subject.agent.update, subject.state, subject.replay, key, donate=(0, 1)
            )
        return self.update_program

    def update_clock(self) -> Clock:
        """Times updates; `keep` puts the state and the replay back afterwards."""
        program, keys = self.compile_update(), update_keys(self.config)

        def step(carry: tuple[Any, Any, Any, int]) -> tuple[Any, Any, Any, int]:
            state, replay, _, index = carry
            return *program.call(state, replay, keys[index % len(keys)]), index + 1

        return Clock(step, (self.subject.state, self.subject.replay, None, 0), self.fill)

    def keep(self, clock: Clock) -> None:
        """Stores the state and the replay that the updates returned."""
        self.subject.state, self.subject.replay = clock.carry[:2]

    # -------------------------------------------------------------------------------------- how to measure

    @property
    def yardstick(self) -> Yardstick:
        """Matrix products in the precision of the run."""
        if self._yardstick is None:
            dtype = compute_dtype(self.config.precision).name
            self._yardstick = Yardstick.best(dtype, self.options.quick, self.fill)
        return self._yardstick

    @property
    def fill(self) -> float:
        """Seconds that one sample lasts at least."""
        return 0.0 if self.options.quick else 0.1

    def take(self, clock: Clock) -> Times:
        """As many samples as the options ask for."""
        return clock.take(self.options.repeats, self.options.budget)

    def measure(self, program: Program, *args: Any) -> Times:
        """Times a program that donates nothing."""
        return self.take(Clock(lambda _: program.call(*args), None, self.fill))

    @property
    def out_of_time(self) -> bool:
        """Whether `--minutes` are over."""
        return time.monotonic() - self._started > 60 * self.options.minutes
