"""A profiler trace of a few updates, and which operations took the time."""

import collections
import gzip
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from benchmarks.subject import update_keys

if TYPE_CHECKING:
    from benchmarks.bench import Bench

SECTION = "profile"
UPDATES = 3
_WARM_UP = 3
"""Until then a process touches memory that it had not used before. The profiler makes it do so once more, so
that the first update in the trace does not count either."""
TOP = 25
_MOST_EVENTS = 1_000_000
"""A trace.json holds no more; what comes later in the trace is missing there."""


def run(bench: "Bench") -> None:
    """Writes the trace under `--profile`, and a row for each of the dearest operations."""
    directory = bench.options.profile
    assert directory is not None
    program, keys = bench.compile_update(), update_keys(bench.config, _WARM_UP + 1 + UPDATES)
    subject = bench.subject
    state, replay = subject.state, subject.replay
    for key in keys[:_WARM_UP]:
        state, replay, _ = program.call(state, replay, key)
    jax.block_until_ready(state)
    before = set(directory.rglob("*.trace.json.gz"))
    with jax.profiler.trace(str(directory)):
        for key in keys[_WARM_UP:]:
            state, replay, _ = program.call(state, replay, key)
        jax.block_until_ready((state, replay))
    subject.state, subject.replay = state, replay

    found = sorted(set(directory.rglob("*.trace.json.gz")) - before)
    if not found:
        bench.report.fail(SECTION, f"the profiler left no trace.json.gz under {directory}")
        return
    events = load(found[-1])
    calls = without_first_update(operation_times(events))
    if not calls:
        bench.report.fail(SECTION, f"no device operations in {found[-1]}")
        return
    if len(events) >= _MOST_EVENTS:
        bench.report.fail(SECTION, f"{found[-1]} was cut short: the numbers below are too small")
    seconds = {name: sum(times) for name, times in calls.items()}
    names, total = source_names(program.text()), sum(seconds.values())
    bench.report.add(
        SECTION, "all operations, per update", total / UPDATES, "s", "sum over threads or streams"
    )
    for name in sorted(seconds, key=lambda name: -seconds[name])[:TOP]:
        share, often = seconds[name] / total, len(calls[name]) / UPDATES
        note = f"{share:5.1%}  {often:g} calls  {names.get(name, '')}"
        bench.report.add(SECTION, name[:44], seconds[name] / UPDATES, "s", note)
    bench.report.add(SECTION, "trace", None, "", str(found[-1]))


def load(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace."""
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def without_first_update(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The calls of the last `UPDATES` updates, of one update more; every update makes the same calls."""
    return {name: each[len(each) // (1 + UPDATES) :] for name, each in times.items()}


def operation_times(events: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of every call of every device operation, without what ran inside of it, in order of time.

    On an accelerator its streams count; on a CPU the threads that operations ran on, where an operation may
    keep other threads busy too: there it counts once.
    """
    processes, threads = {}, {}
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    devices = {pid for pid, name in processes.items() if name.startswith("/device:")}
    streams = {place for place, name in threads.items() if place[0] in devices and "Stream" in name}

    by_thread: dict[Any, list[tuple[float, float, str]]] = collections.defaultdict(list)
    for event in events:
        if event.get("ph") != "X":
            continue
        place, operation = (event["pid"], event.get("tid")), event.get("args", {}).get("hlo_op")
        if streams:
            wanted, operation = place in streams, operation or event["name"]
        else:
            wanted = operation is not None
        if wanted:
            by_thread[place].append((event["ts"], event.get("dur", 0.0), str(operation)))

    calls: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)  # start, seconds
    for spans in by_thread.values():
        open_spans: list[tuple[float, str, int]] = []  # end, name, number of the call
        for start, length, name in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_spans and open_spans[-1][0] <= start:
                open_spans.pop()
            if open_spans:
                _, outer, number = open_spans[-1]
                begun, seconds = calls[outer][number]
                calls[outer][number] = (begun, seconds - 1e-6 * length)
            open_spans.append((start + length, name, len(calls[name])))
            calls[name].append((start, 1e-6 * length))
    return {name: [seconds for _, seconds in sorted(each)] for name, each in calls.items()}


def source_names(program: str) -> dict[str, str]:
    """Operation -> the line of ours that it comes from, by the metadata of a compiled program's text.

    Of a fusion it is its last operation's. `<-` marks what the backward pass does; where no line of ours is
    known, JAX's name of the operation stands for it.
    """
    frames = _Frames(program)
    names = {}
    for line in program.splitlines():
        if found := _OPERATION.match(line):
            operation, source = found.groups()
            frame = re.search(r"stack_frame_id=(\d+)", line)
            place = frames.place(int(frame[1])) if frame else None
            backward = "<- " if "transpose(" in source else ""
            names[operation] = backward + (place or source.removeprefix("jit(update)/"))
    return names


_OPERATION = re.compile(r'\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"')


class _Frames:
    """The tables at the head of a compiled program's text, from a stack frame to file, line and function."""

    def __init__(self, program: str):
        def table(name: str, row: str) -> dict[int, tuple[str, ...]]:
            part = re.search(rf"^{name}\n((?:\d+ .*\n)*)", program, re.MULTILINE)
            rows = re.findall(rf"^(\d+) {row}", part[1] if part else "", re.MULTILINE)
            return {int(number): tuple(values) for number, *values in rows}

        self.files = table("FileNames", '"(.*)"')
        self.functions = table("FunctionNames", '"(.*)"')
        location = r"{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
        self.locations = table("FileLocations", location)
        self.frames = table("StackFrames", r"{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
        # Some versions print the parent's number plus one: there the first frame has a parent.
        self.shift = 1 if self.frames.get(1, ("", ""))[1] == "1" else 0

    def place(self, frame: int) -> str | None:
        """The innermost line of the package that a frame was called from."""
        while frame in self.frames:
            location, parent = self.frames[frame]
            file, function, line = self.locations[int(location)]
            _, ours, path = self.files[int(file)][0].rpartition("/twister_jax/")
            if ours:
                return f"{path}:{line} {self.functions[int(function)][0].replace('<locals>.', '')}"
            frame = int(parent or 0) - self.shift
        return None
