"""`python -m experiments status`: where every run of a suite stands."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import runs
from experiments.runs import Standing
from experiments.suite import Plan, PlannedRun, read_plan
from twister_jax.training.progress import duration

HEAD = ("set", "game", "seed", "state", "steps", "steps/s", "left", "score", "where")
_TO_THE_RIGHT = {"seed", "steps", "steps/s", "left", "score"}


def show(directory: Path) -> str:
    """The table of a suite's runs, with totals below.

    Raises:
      UserError: the directory is no suite's.
    """
    plan = read_plan(directory)
    found = [(run, runs.standing(directory / run.directory, run.steps)) for run in plan.runs]
    paces = _paces(found)
    table = _aligned([HEAD, *(_row(run, each, paces) for run, each in found)])
    failed = [
        f"failed {run.directory}: {each.note}; log {each.log}"
        for run, each in found
        if each.state == "failed"
    ]
    return "\n".join([*table, *failed, "", *_totals(plan, found, paces)])


def _paces(found: Sequence[tuple[PlannedRun, Standing]]) -> Mapping[str, float]:
    """Agent steps per second of each set, over all that its runs have done."""
    steps, seconds = Counter[str](), Counter[str]()
    for run, each in found:
        steps[run.set] += each.env_steps
        seconds[run.set] += each.seconds  # type: ignore[assignment]
    return {name: steps[name] / seconds[name] for name in steps if seconds[name]}


def _seconds_left(run: PlannedRun, each: Standing, paces: Mapping[str, float]) -> float | None:
    """Of training; None where no run of the set has shown a pace yet."""
    if each.state == "finished":
        return 0.0
    pace = each.pace or paces.get(run.set)
    return max(0, run.steps - each.env_steps) / pace if pace else None


def _row(run: PlannedRun, each: Standing, paces: Mapping[str, float]) -> tuple[str, ...]:
    left = _seconds_left(run, each, paces)
    return (
        run.set,
        run.game,
        str(run.seed),
        each.state,
        f"{each.env_steps:,}/{run.steps:,}",
        f"{each.pace:.1f}" if each.pace and each.state == "running" else "",
        "" if each.state == "finished" else "?" if left is None else duration(left),
        "" if each.score is None else f"{each.score:,.4g}",
        each.where,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    adjust = [str.rjust if name in _TO_THE_RIGHT else str.ljust for name in HEAD]
    return [
        "  ".join(move(cell, width) for move, cell, width in zip(adjust, row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _totals(
    plan: Plan, found: Sequence[tuple[PlannedRun, Standing]], paces: Mapping[str, float]
) -> list[str]:
    states = Counter(each.state for _, each in found)
    used = sum(each.seconds for _, each in found) / 3600
    left = [_seconds_left(run, each, paces) for run, each in found]
    known = sum(seconds for seconds in left if seconds is not None) / 3600
    unknown = sum(seconds is None for seconds in left)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    hours = f"machine hours: {used:,.1f} used, {known:,.1f} left"
    return [
        f"{plan.suite}: {len(found)} runs: {counts}",
        hours + (f", and {unknown} runs of unknown pace" if unknown else ""),
    ]
