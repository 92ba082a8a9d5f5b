"""Curves of metrics as SVG, for a page."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twister_jax.view.extras import require

POINTS = 400
"""Most points of a curve: a page stays small, whatever the run's length."""
GROUPS = ("episode", "losses", "imagination", "entropy", "replay", "gradient_norm")
"""In the order of the page; other groups follow, by name."""
TITLES = {"episode": "Scores while training", "losses": "Losses", "pace": "Pace"}

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
    return {title: [svg for svg in each if svg] for title, each in found.items()}


def _svg(runs: Mapping[str, Rows], title: str, names: Sequence[str]) -> str:
    lines = {}
    for run, rows in runs.items():
        for index, name in enumerate(names):
            points = [(row["env_steps"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            if points:
                label = run if len(names) == 1 else name.rsplit("/", 1)[-1]
                lines[(label, index, run)] = np.array(points, float).T
    return _draw(title, "steps", list(lines.values()), [key[0] for key in lines], len(runs) > 1)


def _pace(runs: Mapping[str, Rows]) -> str:
    lines = []
    for rows in runs.values():
        steps = np.array([row["env_steps"] for row in rows], float)
        hours = np.array([row.get("wall_seconds") or np.nan for row in rows], float) / 3600
        lines.append(np.stack([hours, steps]))
    return _draw("steps over hours", "hours", lines, list(runs), len(runs) > 1)


def _draw(title: str, xlabel: str, lines: Sequence[np.ndarray], labels: Sequence[str], legend: bool) -> str:
    """One SVG element."""
    if not lines:
        return ""
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": title}):
        figure, axis = plt.subplots(figsize=(4.2, 2.5), layout="constrained")
        for label, line in zip(labels, lines, strict=True):
            every = -(-line.shape[1] // POINTS)
            x, y = line[:, ::every]
            axis.plot(x, y, label=_plain(label), linewidth=1.2, marker="." if x.size < 3 else None)
        axis.set(title=_plain(title), xlabel=xlabel)
        axis.grid(alpha=0.3)
        if legend or 1 < len(lines) <= 4:
            axis.legend(fontsize=7)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        plt.close(figure)
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _plain(text: str) -> str:
    """Names may come from a stranger: none is a formula."""
    return text.replace("$", r"\$")
