"""Draws README's learning curve: `python docs/curve.py docs/curve.png RUN [RUN …]` (needs matplotlib).

Mean score of the training episodes between two rows of `metrics.jsonl`, against agent steps.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

out, *directories = sys.argv[1:]
figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
for directory in map(Path, directories):
    config = json.loads((directory / "config.json").read_text())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    points = [(row["env_steps"], row["episode/score"]) for row in rows if "episode/score" in row]
    axes.plot(*zip(*points, strict=True), label=f"seed {config['seed']}")
axes.set(
    xlabel="agent steps", ylabel="mean score", title=f"{config['agent'].upper()} learns {config['game']}"
)
axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--", label="best possible")
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
figure.savefig(out, dpi=120)
