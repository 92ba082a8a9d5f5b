"""Where an update's time goes: a profile of a few updates, summed by the parts that the agent names.

The parts are the update's own: `jax.named_scope`s that `Agent.parts` lists. With `--profile DIR` the trace
stays in DIR, and the operations that take most time are listed too.
"""

import collections
import contextlib
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import programs
from benchmarks.bench import Bench
from benchmarks.subject import update_keys

SECTION = "breakdown"
UPDATES = 3
_WARM_UP = 3
"""Until then a process touches memory that it had not used before. The profiler makes it do so once more, so
that the first update in the trace does not count either."""
TOP = 25


class Span(NamedTuple):
    """One call of one operation, in nanoseconds."""

    start: float
    length: float
    name: str


class Profile(NamedTuple):
    """Of `UPDATES` updates."""

    calls: dict[str, list[float]]
    """Operation -> seconds of each of its calls, without what ran inside of it."""
    seconds: float
    """Wall-clock seconds of one update."""
    path: Path

    @property
    def total(self) -> float:
        """Seconds of all operations."""
        return sum(map(sum, self.calls.values()))


def run(bench: Bench) -> None:
    """A row for each part and, with `--profile`, for each of the longest operations."""
    with contextlib.ExitStack() as stack:
        directory = bench.options.profile or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmarks-profile-"))
        )
        found = profile(bench, directory)
    text = bench.compile_update().text()
    _parts(bench, found, text)
    if bench.options.profile is not None:
        _operations(bench, found, text)


def _parts(bench: Bench, found: Profile, text: str) -> None:
    report, names = bench.report, bench.subject.agent.parts
    part_of, seconds = programs.parts(text, names), dict.fromkeys((*names, "other"), 0.0)
    for name, calls in found.calls.items():
        seconds[part_of.get(name, "other")] += sum(calls)
    total = found.total / UPDATES
    # Operations that run side by side on a CPU's threads, or on several streams, share the update's time.
    scale = min(1.0, found.seconds / total)
    note = "sum over threads or streams" + (f"; the parts are scaled by {scale:.2f}" if scale < 1 else "")
    report.add(SECTION, "one update, under the profiler", found.seconds, "s")
    report.add(SECTION, "all operations", total, "s", note)
    for name, value in seconds.items():
        share = value / found.total
        report.add(SECTION, name, share * total * scale, "s", f"{share:.1%} of all operations")
    report.add(SECTION, "between operations", found.seconds - scale * total, "s", "nothing runs")


def _operations(bench: Bench, found: Profile, text: str) -> None:
    seconds = {name: sum(calls) for name, calls in found.calls.items()}
    lines = programs.source_lines(text)
    for name in sorted(seconds, key=lambda name: -seconds[name])[:TOP]:
        share, often = seconds[name] / found.total, len(found.calls[name]) / UPDATES
        note = f"{share:5.1%}  {often:g} calls  {lines.get(name, '')}"
        bench.report.add("profile", name[:44], seconds[name] / UPDATES, "s", note)
    bench.report.add("profile", "trace", None, "", str(found.path))


def profile(bench: Bench, directory: Path) -> Profile:
    """Runs updates under JAX's profiler, which writes below `directory`.

    Raises:
      RuntimeError: it wrote no device operations.
    """
    program, keys = bench.compile_update(), update_keys(bench.config, _WARM_UP + 1 + UPDATES)
    subject = bench.subject

    def update(keys: Iterable[jax.Array]) -> None:
        for key in keys:
            subject.state, subject.replay, _ = program.call(subject.state, subject.replay, key)
        jax.block_until_ready((subject.state, subject.replay))

    update(keys[:_WARM_UP])
    before = set(directory.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(directory)):
        update(keys[_WARM_UP : _WARM_UP + 1])
        started = time.perf_counter()
        update(keys[_WARM_UP + 1 :])
        seconds = (time.perf_counter() - started) / UPDATES
    found = sorted(set(directory.rglob("*.xplane.pb")) - before)
    if not found:
        raise RuntimeError(f"the profiler left no xplane.pb under {directory}")
    calls = without_first_update(operation_times(threads(jax.profiler.ProfileData.from_file(str(found[-1])))))
    if not calls:
        raise RuntimeError(f"no device operations in {found[-1]}")
    return Profile(calls, seconds, found[-1])


def threads(data: Any) -> list[list[Span]]:
    """The device operations in a trace, by the thread or stream that they ran on.

    On an accelerator its streams count; on a CPU the threads that operations ran on, where an operation may
    keep other threads busy too: there it counts once.
    """
    lines = [(plane.name, line) for plane in data.planes for line in plane.lines]
    streams = [line for name, line in lines if name.startswith("/device:") and "Stream" in line.name]
    found = []
    for line in streams or [line for _, line in lines]:
        spans = []
        for event in line.events:
            operation = dict(event.stats).get("hlo_op") or (event.name if streams else None)
            if operation is not None:
                spans.append(Span(event.start_ns, event.duration_ns, str(operation)))
        found.append(spans)
    return found


def operation_times(threads: Iterable[Iterable[Span]]) -> dict[str, list[float]]:
    """Seconds of every call of every operation, without what ran inside of it, in order of time."""
    calls: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)  # start, seconds
    for spans in threads:
        open_spans: list[tuple[float, str, int]] = []  # end, name, number of the call
        for start, length, name in sorted(spans, key=lambda span: (span.start, -span.length)):
            while open_spans and open_spans[-1][0] <= start:
                open_spans.pop()
            if open_spans:
                _, outer, number = open_spans[-1]
                begun, seconds = calls[outer][number]
                calls[outer][number] = (begun, seconds - 1e-9 * length)
            open_spans.append((start + length, name, len(calls[name])))
            calls[name].append((start, 1e-9 * length))
    return {name: [seconds for _, seconds in sorted(each)] for name, each in calls.items()}


def without_first_update(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The calls of the last `UPDATES` updates, of one update more; every update makes the same calls."""
    return {name: each[len(each) // (1 + UPDATES) :] for name, each in times.items()}
