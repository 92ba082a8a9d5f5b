"""Curves of metrics as SVG, for a page."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twister_jax.view.extras import require

POINTS = 400
"""Most points of a curve: a page stays small, whatever the run's length."""
MANY = 6
"""From this many lines in a plot, not every line has a colour and a name of its own."""
SILENT = ("skipped", "longest")
"""Metrics that are shown only where they are not 0 throughout."""
GROUPS = ("episode", "losses", "imagination", "entropy", "replay", "gradient_norm")
"""In the order of the page; other groups follow, by name."""
TITLES = {"episode": "Scores while training", "health": "Skipped updates", "pace": "Pace"}

Rows = Sequence[Mapping[str, Any]]


def curves(runs: Mapping[str, Rows]) -> dict[str, list[str]]:
    """SVGs of every metric of several runs, by the title of their group.

    Numbered siblings, as in `losses/contrastive_3`, share one plot.

    Raises:
      UserError: matplotlib is not installed.
    """
    require("matplotlib", "view", "a report").use("Agg")
    names = {name for rows in runs.values() for row in rows for name in row if "/" in name}
    plots: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=lambda name: (name != "episode/score", name)):
        group, _, rest = name.partition("/")
        plots.setdefault(group, {}).setdefault(re.sub(r"[_/]?\d+$", " by step", rest), []).append(name)
    order = [*(group for group in GROUPS if group in plots), *sorted(plots.keys() - set(GROUPS))]
    found = {}
    for group in order:
        title = TITLES.get(group, group.replace("_", " ").capitalize())
        found[title] = [_svg(runs, shown, members) for shown, members in plots[group].items()]
    if any(len(rows) > 1 for rows in runs.values()):
        found[TITLES["pace"]] = [_pace(runs)]
    drawn = {title: [svg for svg in each if svg] for title, each in found.items()}
    return {title: each for title, each in drawn.items() if each}


def _svg(runs: Mapping[str, Rows], title: str, names: Sequence[str]) -> str:
    lines = []
    for run, rows in runs.items():
        for name in names:
            points = [(row["env_steps"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            if points:
                label = run if len(runs) > 1 else name.rsplit("/", 1)[-1]
                lines.append((label, np.array(points, float).T))
    if title in SILENT and not any(line[1].any() for _, line in lines):
        return ""
    return _draw(title, "steps", lines)


def _pace(runs: Mapping[str, Rows]) -> str:
    lines = []
    for run, rows in runs.items():
        steps = np.array([row["env_steps"] for row in rows], float)
        hours = np.array([row.get("wall_seconds") or np.nan for row in rows], float) / 3600
        lines.append((run, np.stack([hours, steps])))
    return _draw("steps over hours", "hours", lines)


def _draw(title: str, xlabel: str, lines: Sequence[tuple[str, np.ndarray]]) -> str:
    """One SVG element; lines of one label have one colour."""
    if not lines:
        return ""
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(label for label, _ in lines))
    many = len(labels) > MANY
    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": title}):
        figure, axis = plt.subplots(figsize=(4.2, 2.5), layout="constrained")
        named = set()
        for label, line in lines:
            every = -(-line.shape[1] // POINTS)
            x, y = line[:, ::every]
            index = labels.index(label)
            color = plt.get_cmap("viridis")(index / len(labels)) if many else f"C{index}"
            # Of many siblings the first and the last have a name; the colours lead from one to the other.
            shown = label not in named and (not many or index in (0, len(labels) - 1))
            named.add(label)
            name = _plain(label) if shown else "_"
            axis.plot(x, y, label=name, color=color, linewidth=1.2, marker="." if x.size < 3 else None)
        axis.set(title=_plain(title), xlabel=xlabel)
        axis.grid(alpha=0.3)
        if len(labels) > 1:
            axis.legend(fontsize=7)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        plt.close(figure)
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _plain(text: str) -> str:
    """Names may come from a stranger: none is a formula."""
    return text.replace("$", r"\$")
