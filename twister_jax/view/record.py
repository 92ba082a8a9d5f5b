"""What a run directory says about its run, read for a report."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twister_jax import agents, files, foreign_json, presets
from twister_jax.config import Config
from twister_jax.training.evaluation import FILE as EVALUATION
from twister_jax.training.manifest import newest_host
from twister_jax.training.rows import whole_rows

_MOST_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run directory holds, as far as it can be read.

    Attributes:
      directory: of the run.
      config: its settings.
      rows: of metrics.jsonl.
      evaluation: evaluation.json, where there is one.
      host: counters and machine of the newest checkpoint, where there is one.
    """

    directory: Path
    config: Config
    rows: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    host: dict[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        config = self.config
        return f"{agents.package(config.agent).title} on {config.game}, seed {config.seed}"

    @property
    def newest(self) -> dict[str, Any]:
        """Where the run stands: the last row."""
        return self.rows[-1] if self.rows else {}

    @property
    def counters(self) -> dict[str, Any]:
        """Of the newest checkpoint."""
        found = self.host.get("counters")
        return found if isinstance(found, dict) else {}

    @property
    def steps(self) -> int:
        """Steps taken: rows and checkpoints are not written at the same time."""
        saved = self.counters.get("env_steps")
        return max(self.newest.get("env_steps", 0), saved if foreign_json.is_number(saved, int) else 0)

    @property
    def notes(self) -> list[str]:
        """What the run wants its readers to know."""
        noted = self.counters.get("notes")
        return [str(note) for note in noted] if isinstance(noted, list) else []


def read(directory: Path) -> Record:
    """Everything that a report is made of.

    Raises:
      UserError: it is no run directory.
    """
    config = presets.read_config(directory)
    rows = list(_rows(directory / "metrics.jsonl"))
    try:
        found = foreign_json.parse(files.read(directory / EVALUATION, _MOST_BYTES))
        evaluation = found if _is_evaluation(found) else None
    except (OSError, ValueError):
        evaluation = None
    return Record(directory, config, rows, evaluation, newest_host(directory / "checkpoints"))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Whole rows, of which what is no number is left out."""
    try:
        lines = files.read(path, _MOST_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return
    for row in whole_rows(lines):
        yield {name: value for name, value in row.items() if value is None or foreign_json.is_number(value)}


def _is_evaluation(found: Any) -> bool:
    """Whether everything that is shown of it is there, and of its type: it may come from a stranger."""
    return (
        isinstance(found, dict)
        and all(foreign_json.is_number(found.get(name)) for name in ("mean", "median", "std", "episodes"))
        and (found.get("human_normalized") is None or foreign_json.is_number(found["human_normalized"]))
        and isinstance(found.get("protocol", {}), dict)
    )
