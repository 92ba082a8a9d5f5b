"""`python -m experiments plot`: all figures as files, and one self-contained HTML page with everything."""

import html
import os
from collections.abc import Sequence
from pathlib import Path

from experiments import aggregate, plots
from experiments.aggregate import AGGREGATES
from experiments.scores import ScoreSet
from twister_jax import files
from twister_jax.errors import UserError

PAGE = "index.html"
REPORT = "report.html"
"""A run's own report, in its directory."""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 2rem 0; overflow-x: auto } figure svg { max-width: 100%; height: auto }
figcaption, .note { color: #555 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
"""


def write(sets: Sequence[ScoreSet], against: Sequence[ScoreSet], folder: Path) -> Path:
    """Writes figures (SVG, PNG) and the page into a folder, which is made; returns the page.

    Raises:
      UserError: matplotlib is missing, or the folder cannot be written to.
    """
    comparisons = aggregate.compare_all(sets, against)
    drawn = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for each in plots.draw(sets, against):
            files.write_atomically(folder / f"{each.name}.svg", each.svg)
            files.write_atomically(folder / f"{each.name}.png", each.png)
            drawn.append((each.caption, each.svg.decode()))
        page = _page(sets, against, comparisons, drawn, folder)
        files.write_atomically(folder / PAGE, page)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {files.one_line(error)}") from None
    return folder / PAGE


def _page(
    sets: Sequence[ScoreSet],
    against: Sequence[ScoreSet],
    comparisons: Sequence[aggregate.Comparison],
    drawn: Sequence[tuple[str, str]],
    folder: Path,
) -> str:
    title = html.escape(", ".join(each.name for each in sets))
    figures = "\n".join(
        f"<figure>{svg[svg.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, svg in drawn
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            _aggregates([*sets, *against]),
            *(f'<p class="note">{html.escape(note)}</p>' for note in _notes(sets, against, comparisons)),
            figures,
            "<h2>Protocols</h2>",
            *(_protocol(each) for each in sets),
            "<h2>Runs</h2>",
            *(_runs(each, folder) for each in sets),
            "</body></html>",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _aggregates(columns: Sequence[ScoreSet]) -> str:
    rows = []
    for each in columns:
        found = aggregate.aggregates(each)
        cells = [aggregate.show(found[name]) for name in AGGREGATES]
        rows.append([html.escape(each.name), str(len(each.runs)), str(each.count), *cells])
    return _table(["human-normalised", "games", "runs", *AGGREGATES.values()], rows)


def _notes(
    sets: Sequence[ScoreSet], against: Sequence[ScoreSet], comparisons: Sequence[aggregate.Comparison]
) -> list[str]:
    notes = ["Intervals: 95%, stratified bootstrap over seeds (Agarwal et al. 2021)."]
    for found in comparisons:
        over = f"{found.ours_name} : {found.theirs_name}, over {len(found.games)} common games: "
        pairs = [
            f"{title} {aggregate.pair(found.ours[name], found.theirs[name])}"
            for name, title in AGGREGATES.items()
        ]
        improvement = f"probability of improvement {aggregate.show(found.improvement)}"
        notes += [over + ", ".join([*pairs, improvement]) + ".", *aggregate.caveats(found)]
    for each in [*sets, *against]:
        if each.missing:
            notes.append(f"{each.name}: {len(each.missing)} missing: {', '.join(each.missing)}.")
    return notes


def _protocol(scores: ScoreSet) -> str:
    rows = [
        [html.escape(name), html.escape(str(value))]
        for name, value in scores.protocol.items()
        if name != "settings"
    ]
    return (
        f"<details><summary>{html.escape(scores.name)}</summary>{_table(['field', 'value'], rows)}</details>"
    )


def _runs(scores: ScoreSet, folder: Path) -> str:
    rows = []
    for game, found in scores.runs.items():
        for run in found:
            where = "" if run.directory is None else _link(run.directory, folder)
            normalized = scores.normalize(game, run.score)
            cells = [str(run.seed), aggregate.number(run.score), f"{normalized:.3f}", f"{run.env_steps:,}"]
            rows.append([html.escape(game), *cells, where])
    head = ["game", "seed", "score", "human-normalised", "environment steps", "run"]
    return f"<details><summary>{html.escape(scores.name)}</summary>{_table(head, rows)}</details>"


def _link(directory: Path, folder: Path) -> str:
    """To the run's own report, or where there is none to its directory."""
    target = directory / REPORT if (directory / REPORT).is_file() else directory
    path = os.path.relpath(target, folder)
    return f'<a href="{html.escape(path, quote=True)}">{html.escape(target.name)}</a>'
