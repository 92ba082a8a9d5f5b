"""Figures of many runs, each as SVG and PNG.

Sets are told apart by colours that colour-blind people can tell apart (Okabe and Ito), and by dashes, markers
and hatching where there is no colour.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import runs
from experiments.aggregate import AGGREGATES, aggregates
from experiments.scores import ScoreSet, common_games
from experiments.statistics import performance_profile
from twister_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "++", "--")
_MARKERS = "osD^vP*X"
_REFERENCES = "normalised 0 and 1"
_POINTS = 60  # of a learning curve
_MOST_COLUMNS = 4
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "figure.dpi": 120,
}


class Curve(NamedTuple):
    """Mean training score over seeds with its 95% interval; all [point]."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def learning_curve(scores: ScoreSet, game: str, resamples: int = 1_000) -> Curve | None:
    """Training scores of a game's runs over environment steps; None where they are not known.

    Each run's scores are averaged in as many bins as the curve has points, and the interval is that of the
    bootstrap over seeds.
    """
    read = [_scores_by_step(run.directory) for run in scores.runs[game] if run.directory is not None]
    found = [(steps, values) for steps, values in read if len(steps) > 1]
    if not found:
        return None
    grid = np.linspace(max(steps[0] for steps, _ in found), min(steps[-1] for steps, _ in found), _POINTS)
    each = np.array([_binned(grid, steps, values) for steps, values in found])
    drawn = np.random.default_rng(0).integers(len(each), size=(resamples, len(each)))
    low, high = np.percentile(each[drawn].mean(1), [2.5, 97.5], axis=0)
    return Curve(grid, each.mean(0), low, high)


def _scores_by_step(directory: Any) -> tuple[np.ndarray, np.ndarray]:
    pairs = [
        (row["env_steps"], row["episode/score"])
        for row in runs.rows(directory)
        if isinstance(row.get("episode/score"), int | float)
    ]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def _binned(grid: np.ndarray, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means around the points of the grid; where nothing was scored, between the neighbours."""
    edges = (grid[1:] + grid[:-1]) / 2
    at = np.searchsorted(edges, steps)
    counts = np.bincount(at, minlength=len(grid))
    known = counts > 0
    sums = np.bincount(at, values, minlength=len(grid))
    return np.interp(grid, grid[known], sums[known] / counts[known])


# ------------------------------------------------------------------------------------------------ figures


class Drawing(NamedTuple):
    """A figure as files: the same scores give the same bytes."""

    name: str
    caption: str
    svg: bytes
    png: bytes


def draw(sets: Sequence[ScoreSet], against: Sequence[ScoreSet]) -> Iterator[Drawing]:
    """Everything that can be drawn of these.

    Raises:
      UserError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError(
            "figures need matplotlib: install it with `pip install 'twister_jax[experiments]'`"
        ) from None
    columns = [*sets, *against]
    wanted: list[tuple[str, str, Callable[[], Figure | None]]] = [
        (
            "curves",
            "Training score over environment steps: mean over seeds with 95% interval; markers are the "
            "evaluations at the end, grey lines published scores (after 100,000 steps) and what counts as 0 "
            "and 1 when scores are normalised.",
            lambda: curves(sets, against),
        ),
        (
            "aggregates",
            "Human-normalised aggregates over each set's own games, with 95% intervals (↓: low is good).",
            lambda: bars(columns),
        ),
        (
            "profiles",
            "Share of the runs that score above a threshold, with 95% intervals.",
            lambda: profiles([each for each in columns if each.per_seed]),
        ),
    ]
    baseline = next(iter((*against, *sets[1:])), None)
    if baseline is not None:
        caption = f"Human-normalised mean of {sets[0].name} less that of {baseline.name}, game by game."
        wanted.append(("games", caption, lambda: differences(sets[0], baseline)))
    for name, caption, make in wanted:
        with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure = make()
            encoded = figure and [_encode(figure, "svg", Date=None), _encode(figure, "png", Software=None)]
        if encoded:
            yield Drawing(name, caption, *encoded)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curves(sets: Sequence[ScoreSet], against: Sequence[ScoreSet]) -> "Figure | None":
    """Learning curves, a panel per game; None where no run has training scores."""
    games = sorted({game for each in sets for game in each.runs})
    found = {
        (each.name, game): learning_curve(each, game) for each in sets for game in games if game in each.runs
    }
    games = [game for game in games if any(found.get((each.name, game)) for each in sets)]
    if not games:
        return None
    width = min(_MOST_COLUMNS, len(games))
    height = math.ceil(len(games) / width)
    inches = max(5.0, 2.9 * width)
    figure = _figure(inches, 2.3 * height + 0.5)
    panels = figure.subplots(height, width, squeeze=False).flat
    for axes, game in zip(panels, games, strict=False):
        axes.set_title(game)
        for at, each in enumerate(sets):
            if curve := found.get((each.name, game)):
                _draw_curve(axes, curve, at, each, game)
        for each, dash in zip(against, itertools.cycle(_DASHES[2:])):
            if game in each.runs:
                axes.axhline(each.raw(game).mean(), color="#666666", lw=1.1, ls=dash, label=each.name)
        for reference in next(each for each in sets if game in each.runs).references[game]:
            axes.axhline(reference, color="#999999", lw=0.8, ls=(0, (6, 3)), zorder=1, label=_REFERENCES)
        _thousands(axes)
    for axes in list(figure.axes)[len(games) :]:
        axes.remove()
    figure.supxlabel(_step_label(sets))
    figure.supylabel("score of training episodes")
    entries = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = int(inches // 2.2)
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _draw_curve(axes: "Axes", curve: Curve, at: int, scores: ScoreSet, game: str) -> None:
    color, dash = _COLORS[at % len(_COLORS)], _DASHES[at % len(_DASHES)]
    axes.plot(curve.steps, curve.mean, color=color, ls=dash, lw=1.5, label=scores.name)
    axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.18, lw=0)
    marker = _MARKERS[at % len(_MARKERS)]
    end = max(run.env_steps for run in scores.runs[game])
    axes.plot([end], [scores.raw(game).mean()], marker, mfc="none", mec=color, mew=1.6, ms=7, clip_on=False)


def _step_label(sets: Sequence[ScoreSet]) -> str:
    skips = sorted({each.frame_skip for each in sets})
    return "environment steps" + (
        f" (1 step = {skips[0]} frames)" if len(skips) == 1 and skips[0] > 1 else ""
    )


def _thousands(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    short = FuncFormatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set_major_formatter(short)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def bars(columns: Sequence[ScoreSet]) -> "Figure":
    """The four aggregates, a bar with its interval for each set."""
    figure = _figure(9.5, 0.42 * len(columns) + 1.2)
    panels = figure.subplots(1, len(AGGREGATES), sharey=True)
    found = [aggregates(each) for each in columns]
    places = np.arange(len(columns))
    for axes, (name, title) in zip(panels, AGGREGATES.items(), strict=True):
        for at, of in enumerate(found):
            estimate = of[name]
            if estimate is None:
                axes.text(0, at, " per-game means only", va="center", fontsize=7, color="#666666")
                continue
            style = {"color": _COLORS[at % len(_COLORS)], "hatch": _HATCHES[at % len(_HATCHES)]}
            axes.barh(at, estimate.value, 0.7, edgecolor="white", **style)
            if estimate.low is not None and estimate.high is not None:
                error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                axes.errorbar(estimate.value, at, xerr=error, color="black", capsize=2.5, lw=1.1)
        axes.set_title(title + (" ↓" if name == "optimality_gap" else ""))
        axes.set_yticks(places, [each.name for each in columns])
        axes.grid(axis="y", visible=False)
        estimates = [estimate for of in found if (estimate := of[name]) is not None]
        if all(min(each.value, each.value if each.low is None else each.low) >= 0 for each in estimates):
            axes.set_xlim(left=0)
    panels[0].invert_yaxis()
    figure.supxlabel("human-normalised score")
    return figure


def profiles(columns: Sequence[ScoreSet]) -> "Figure | None":
    """Performance profiles of sets whose single scores are known."""
    if not columns:
        return None
    figure = _figure(6.2, 3.6)
    axes = figure.subplots()
    highest = max(float(np.quantile(np.concatenate(each.normalized()), 0.95)) for each in columns)
    thresholds = np.linspace(0, max(1.0, highest), 101)
    for at, each in enumerate(columns):
        found = performance_profile(each.normalized(), thresholds)
        color, dash = _COLORS[at % len(_COLORS)], _DASHES[at % len(_DASHES)]
        axes.plot(thresholds, found.value, color=color, ls=dash, lw=1.5, label=each.name)
        axes.fill_between(thresholds, found.low, found.high, color=color, alpha=0.15, lw=0)
    axes.set_xlabel("human-normalised score τ")
    axes.set_ylabel("share of runs above τ")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    return figure


def differences(ours: ScoreSet, theirs: ScoreSet) -> "Figure | None":
    """Per game, how much higher the normalised mean of one set is; None without a common game."""
    games = common_games(ours, theirs)
    if not games:
        return None
    gaps = {
        game: float(
            ours.normalize(game, ours.raw(game).mean()) - theirs.normalize(game, theirs.raw(game).mean())
        )
        for game in games
    }
    ordered = sorted(games, key=gaps.__getitem__)
    figure = _figure(6.2, 0.23 * len(games) + 1.0)
    axes = figure.subplots()
    for at, game in enumerate(ordered):
        better = gaps[game] >= 0
        color, hatch = (_COLORS[0], "") if better else (_COLORS[1], "///")
        axes.barh(at, gaps[game], 0.75, color=color, hatch=hatch, edgecolor="white")
        axes.annotate(
            f"{gaps[game]:+.2f}",
            (gaps[game], at),
            xytext=(4 if better else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if better else "right",
            fontsize=7,
        )
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(f"human-normalised mean: {ours.name} less {theirs.name}")
    return figure


def _encode(figure: "Figure", kind: str, **metadata: None) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()
