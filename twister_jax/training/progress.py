"""What a run says to people while it goes on."""

import contextlib
import io
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from twister_jax import agents, envs, fields, presets
from twister_jax.config import Config

if TYPE_CHECKING:
    from twister_jax.training.run import Run


class Progress:
    """A status line that rewrites itself on a terminal, and a plain line now and then elsewhere.

    Failing to print never ends a run: what cannot be written is dropped.
    """

    def __init__(self, every_seconds: float = 15.0):
        """`every_seconds`: time between lines where there is no terminal, or one that cannot rewrite."""
        self._console = _rewritable()
        self._every = every_seconds if self._console is None else 0.5
        self._next = 0.0
        self._status: Any = None
        self._last = ""

    def due(self) -> bool:
        """Whether it is time for another line."""
        return time.monotonic() >= self._next

    def update(self, line: str) -> None:
        """Shows where the run stands."""
        self._next = time.monotonic() + self._every
        if self._console is None:
            if line != self._last:
                say(line)
            self._last = line
            return
        from rich.markup import escape

        try:
            if self._status is None:
                self._status = self._console.status("", spinner="dots")
                self._status.start()
            self._status.update(escape(line))
        except OSError:
            self._console = None

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._status is None:
            say(line)
            return
        try:
            self._status.console.print(line, markup=False, highlight=False, soft_wrap=True)
        except OSError:
            self._console = None

    def close(self) -> None:
        """Releases the terminal."""
        status, self._status = self._status, None
        if status is not None:
            try:
                status.stop()
            except OSError:
                self._console = None


def _rewritable() -> Any:
    """Standard output as rich's console; None where rich would animate nothing, as with `TERM=dumb`."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    from rich.console import Console

    console = Console()
    return console if console.is_interactive else None


class Pace:
    """How fast something goes, over the last half minute or so."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def at(self, seconds: float, position: int) -> float:
        """Per second, now that it is there; 0 at first."""
        self._seen = [then for then in self._seen if then[0] > seconds - 30] or self._seen[-1:]
        self._seen.append((seconds, position))
        (t0, s0), (t1, s1) = self._seen[0], self._seen[-1]
        return (s1 - s0) / (t1 - t0) if t1 > t0 else 0.0


def line_of(run: "Run", shown: Mapping[str, Any]) -> str:
    """`steps 1,234/100,000  updates 1,071  12.3 steps/s  return 3 (last 10: 2.4)  …  left 2h13m`."""
    counters, pace = run.counters, run.pace()
    parts = [f"steps {counters.env_steps:,}/{run.config.train.steps:,}"]
    if run.filling:
        parts.append("random actions")
    elif phase := run.phase:
        parts.append(f"pretraining {phase[0].name} {phase[1]:,}/{phase[0].updates:,}  {pace:.1f} updates/s")
    else:
        parts.append(f"updates {counters.updates:,}  {pace:.1f} steps/s")
    if counters.recent_scores:
        recent = counters.recent_scores
        parts.append(f"return {recent[-1]:g} (last {len(recent)}: {np.mean(recent):.1f})")
    for name, value in shown.items():
        if name.endswith(run.agent.headline) and value is not None:
            parts.append(f"{name} {value:.4g}")
    kind = "update" if run.phase is None else run.phase[0].name
    if not run.filling and not run.programs.compiled(kind):
        parts.append("compiling")
    elif pace and not run.filling:
        target = run.config.train.steps + sum(phase.updates for phase in run.agent.pretraining)
        parts.append(f"left {duration((target - counters.position) / pace)}")
    return "  ".join(parts)


def print_anywhere() -> None:
    """Makes an ASCII-only terminal show `?` for characters that it does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(line: str) -> None:
    """Prints a line if that is possible: a full disk or a reader that went away is no reason to stop."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full or gone; closed; None
        print(line, flush=True)


def outlook(config: Config) -> str:
    """One line for people: how long a run takes, and what it learns; nothing where that was not measured."""
    suite, _ = envs.resolve(config.game)
    measured = agents.package(config.agent).presets[config.preset].outlook.get(suite.name)
    usual = presets.make_config(config.agent, config.preset, config.game)
    pace = ("algorithm", "train.updates_per_step", "env.num_envs")
    if measured is None or any(name.startswith(pace) for name in fields.differences(config, usual)):
        return ""
    took = duration(config.train.steps / measured.steps_per_second)
    return (
        f"expect {config.train.steps:,} steps to take {took} "
        f"at {measured.steps_per_second:g} a second, as on {measured.machine}; {measured.learned}"
    )


def duration(seconds: float) -> str:
    """`2h13m`, `4m05s` or `12s`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
