"""`python -m experiments aggregate`: many runs as aggregates with intervals, table, CSV and JSON."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import statistics
from experiments.scores import ScoreSet, common_games, differing_protocols
from experiments.statistics import Estimate
from twister_jax import files
from twister_jax.errors import UserError

AGGREGATES = {"mean": "Mean", "median": "Median", "iqm": "IQM", "optimality_gap": "Optimality gap"}
_OF_GAMES = ("mean", "median")
"""Aggregates for which the mean of each game suffices."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sets over the games that both have.

    Attributes:
      games: these.
      left_out: games that only one has.
      ours, theirs: their aggregates over these games.
      improvement: probability that a run of ours beats one of theirs; None where single scores are unknown.
      differing: fields of the protocol in which they were not evaluated alike.
    """

    ours_name: str
    theirs_name: str
    games: tuple[str, ...]
    left_out: tuple[str, ...]
    ours: Mapping[str, Estimate | None]
    theirs: Mapping[str, Estimate | None]
    improvement: Estimate | None
    differing: tuple[str, ...]


def aggregates(scores: ScoreSet, games: Sequence[str] | None = None) -> dict[str, Estimate | None]:
    """The four aggregates over all games or these; None for those that need scores of single runs."""
    found = statistics.estimates(statistics.aggregates, scores.normalized(games))
    return {name: found[name] if scores.per_seed or name in _OF_GAMES else None for name in AGGREGATES}


def compare(ours: ScoreSet, theirs: ScoreSet) -> Comparison:
    """One set against another.

    Raises:
      UserError: they have no game in common, or normalise one differently.
    """
    games = common_games(ours, theirs)
    if not games:
        raise UserError(f"{ours.name} and {theirs.name} have no game in common")
    for game in games:
        if ours.references[game] != theirs.references[game]:
            raise UserError(
                f"{game} is normalised by {ours.references[game]} in {ours.name} and by "
                f"{theirs.references[game]} in {theirs.name}: give both the same references"
            )
    improvement = None
    if ours.per_seed and theirs.per_seed:

        def probability(mine: statistics.Scores, other: statistics.Scores) -> dict[str, np.ndarray]:
            return {"": statistics.probability_of_improvement(mine, other)}

        pair = ours.normalized(games), theirs.normalized(games)
        improvement = statistics.estimates(probability, *pair)[""]
    return Comparison(
        ours_name=ours.name,
        theirs_name=theirs.name,
        games=tuple(games),
        left_out=tuple(sorted(set(ours.runs) ^ set(theirs.runs))),
        ours=aggregates(ours, games),
        theirs=aggregates(theirs, games),
        improvement=improvement,
        differing=tuple(differing_protocols(ours, theirs)),
    )


def compare_all(sets: Sequence[ScoreSet], against: Sequence[ScoreSet]) -> list[Comparison]:
    """Every set against those after it, and against all that were published."""
    return [compare(ours, theirs) for at, ours in enumerate(sets) for theirs in (*sets[at + 1 :], *against)]


# -------------------------------------------------------------------------------------------------- JSON


def to_json(sets: Sequence[ScoreSet], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Everything, as --json writes it: of one set at the top, of several under their names."""
    described = {each.name: _set_to_json(each) for each in sets}
    compared: dict[str, dict[str, Any]] = {}
    for each in comparisons:
        compared.setdefault(each.ours_name, {})[each.theirs_name] = {
            "games": list(each.games),
            "left_out": list(each.left_out),
            "ours": _estimates_to_json(each.ours),
            "theirs": _estimates_to_json(each.theirs),
            "probability_of_improvement": each.improvement and each.improvement._asdict(),
            "protocol_differs_in": list(each.differing),
        }
    top = described if len(sets) > 1 else described[sets[0].name]
    return {**top, "comparisons": compared}


def _set_to_json(scores: ScoreSet) -> dict[str, Any]:
    return {
        "aggregates": _estimates_to_json(aggregates(scores)),
        "games": {
            game: {
                "scores": scores.raw(game).tolist(),
                "seeds": [run.seed for run in runs],
                "mean": float(scores.raw(game).mean()),
                "std": deviation(scores.raw(game)),
                "human_normalized": float(scores.normalize(game, scores.raw(game).mean())),
                "references": list(scores.references[game]),
            }
            for game, runs in scores.runs.items()
        },
        "runs": scores.count,
        "missing": list(scores.missing),
        "protocol": dict(scores.protocol),
    }


def _estimates_to_json(found: Mapping[str, Estimate | None]) -> dict[str, Any]:
    return {name: estimate and estimate._asdict() for name, estimate in found.items()}


def deviation(scores: np.ndarray) -> float | None:
    """Standard deviation of the sample; None of a single score."""
    return float(scores.std(ddof=1)) if len(scores) > 1 else None


# --------------------------------------------------------------------------------------- CSV and Markdown


def to_csv(sets: Sequence[ScoreSet]) -> str:
    """One row per game, seed and set."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(["agent", "game", "seed", "score", "human_normalized", "env_steps", "directory"])
    for each in sets:
        for game, found in each.runs.items():
            for run in found:
                normalized = float(each.normalize(game, run.score))
                write([each.name, game, run.seed, run.score, normalized, run.env_steps, run.directory])
    return text.getvalue()


def to_markdown(
    sets: Sequence[ScoreSet], against: Sequence[ScoreSet], comparisons: Sequence[Comparison]
) -> str:
    """Tables for a paper or a README: scores per game, aggregates, comparisons, and what is missing."""
    columns = [*sets, *against]
    lines = _table(
        ["game", "random", "human", *(each.name for each in columns)],
        [
            [game, *_references(game, columns), *(_score(each, game) for each in columns)]
            for game in sorted({game for each in sets for game in each.runs})
        ],
    )
    lines += ["", "Score: mean ± standard deviation over seeds (number of seeds).", ""]
    found = {each.name: aggregates(each) for each in columns}
    lines += _table(
        ["human-normalised", *found],
        [
            ["runs, games", *(f"{each.count}, {len(each.runs)}" for each in columns)],
            *([title, *(show(of[name]) for of in found.values())] for name, title in AGGREGATES.items()),
        ],
    )
    lines += ["", "Intervals: 95%, stratified bootstrap over seeds."]
    if any(not each.per_seed for each in columns):
        lines += ["Where only a mean per game is known, there are no intervals and no IQM."]
    if comparisons:
        lines += ["", *_compared(comparisons)]
    for each in columns:
        if each.missing:
            lines += ["", f"{each.name}: {len(each.missing)} missing: {', '.join(each.missing)}"]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up as plain text."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(width) for cell, width in zip(cells[:1], widths[:1], strict=True))
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return [line(head), rule, *map(line, rows)]


def _references(game: str, columns: Sequence[ScoreSet]) -> list[str]:
    pair = next(each.references[game] for each in columns if game in each.references)
    return [number(value) for value in pair]


def _score(scores: ScoreSet, game: str) -> str:
    if game not in scores.runs:
        return "–"
    raw = scores.raw(game)
    spread = deviation(raw)
    return number(float(raw.mean())) + ("" if spread is None else f" ± {number(spread)} ({len(raw)})")


def number(value: float) -> str:
    """A score as tables have it: whole from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def show(estimate: Estimate | None) -> str:
    """`0.956 [0.861, 1.062]`."""
    if estimate is None:
        return "–"
    interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{interval}"


def _compared(comparisons: Sequence[Comparison]) -> list[str]:
    head = ["over common games", "games", *AGGREGATES.values(), "probability of improvement"]
    rows = [
        [
            f"{each.ours_name} : {each.theirs_name}",
            str(len(each.games)),
            *(pair(each.ours[name], each.theirs[name]) for name in AGGREGATES),
            show(each.improvement),
        ]
        for each in comparisons
    ]
    return [*_table(head, rows), "", *(note for each in comparisons for note in caveats(each))]


def pair(ours: Estimate | None, theirs: Estimate | None) -> str:
    """`0.956 : 1.645`."""
    return "–" if ours is None or theirs is None else f"{ours.value:.3f} : {theirs.value:.3f}"


def caveats(found: Comparison) -> list[str]:
    """What to know before believing a comparison."""
    names, notes = f"{found.ours_name} : {found.theirs_name}", []
    if found.left_out:
        notes.append(f"{names}: without {', '.join(found.left_out)}, which only one has.")
    if found.differing:
        notes.append(f"{names}: not evaluated alike: {', '.join(found.differing)}.")
    return notes


# ------------------------------------------------------------------------------------------------ writing


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes files into a folder, which is made.

    Raises:
      UserError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            files.write_atomically(folder / name, text)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {files.one_line(error)}") from None
