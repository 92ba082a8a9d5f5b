"""What a run directory says about its run, read in milliseconds and without JAX."""

import dataclasses
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from twister_jax import files, foreign_json
from twister_jax.training.rows import whole_rows

RECORD = "job.json"
"""What the process that trains says about itself, in the run directory."""
LOG = "train.log"
"""What `train` printed, in the run directory."""
_MOST_BYTES = 1 << 24
_TAIL = 1 << 15  # of what is read from its end

State = Literal["waiting", "running", "interrupted", "failed", "finished"]


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or only half of one."""
    try:
        found = foreign_json.parse(files.read(path, _MOST_BYTES))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def evaluation(directory: Path) -> dict[str, Any] | None:
    """evaluation.json of a run."""
    return read_json(directory / "evaluation.json")


def _last_lines(directory: Path) -> list[bytes]:
    """The last whole lines of metrics.jsonl, some 32 KB of them."""
    try:
        with files.open_regular(directory / "metrics.jsonl") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return lines[1:-1] if size > _TAIL else lines[:-1]


def rows(directory: Path) -> Iterator[dict[str, Any]]:
    """All rows of metrics.jsonl."""
    try:
        with files.open_regular(directory / "metrics.jsonl") as file:
            yield from whole_rows(file)
    except OSError:
        return


def last_line(directory: Path, since: int = 0, preferred: str = "") -> str:
    """What `train` said last.

    Args:
      directory: of the run.
      since: where in the log to begin, in bytes.
      preferred: how a line begins that is better than later ones.
    """
    try:
        with files.open_regular(directory / LOG) as file:
            file.seek(max(since, os.fstat(file.fileno()).st_size - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    said = [line for line in lines if line]
    return next((line for line in reversed(said) if preferred and line.startswith(preferred)), "") or (
        said[-1] if said else ""
    )


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
      state: `interrupted` goes on by itself when the suite is run again, `failed` is tried again.
      env_steps: agent steps taken.
      seconds: that training took so far, over all processes.
      pace: agent steps per second lately; 0 where unknown.
      score: mean of the evaluation, or else the last training score; None before the first.
      where: host and device.
      note: why it failed.
      log: what `train` printed.
    """

    state: State
    env_steps: int = 0
    seconds: float = 0.0
    pace: float = 0.0
    score: float | None = None
    where: str = ""
    note: str = ""
    log: Path = Path()


def standing(directory: Path, steps: int) -> Standing:
    """Where the run in this directory stands, which is to take `steps`."""
    record = read_json(directory / RECORD) or {}
    lines = _last_lines(directory)
    newest = next(whole_rows(reversed(lines)), {})  # few rows are parsed: there may be ten thousand runs
    seconds = _number(newest, "wall_seconds", 0.0)
    where = " ".join(_printable(record.get(name, "")) for name in ("host", "device")).strip()
    result = evaluation(directory)
    if result is not None and (taken := int(_number(result, "env_steps", -1))) >= steps:
        return Standing("finished", taken, seconds, 0.0, _number(result, "mean", None), where)
    scored = next(whole_rows(line for line in reversed(lines) if b'"episode/score"' in line), {})
    return Standing(
        state=_state(record, bool(newest)),
        env_steps=newest.get("env_steps", 0),
        seconds=seconds,
        pace=_pace(next(whole_rows(lines), {}), newest),
        score=_number(scored, "episode/score", None),
        where=where,
        note=_printable(record.get("last_line", "")),
        log=Path(os.path.normpath(directory / _printable(record.get("log", LOG)))),
    )


def _number(values: dict[str, Any], name: str, default: Any) -> Any:
    return values[name] if foreign_json.is_number(values.get(name)) else default


def _printable(value: Any) -> str:
    """As a terminal can show it: without what would move its cursor."""
    return "".join(each if each.isprintable() else "?" for each in str(value)[:200])


def _state(record: dict[str, Any], begun: bool) -> State:
    state = record.get("state")
    if state == "running":
        here = record.get("host") == socket.gethostname()
        return "running" if not here or _alive(record.get("pid")) else "interrupted"
    if state == "failed":
        return "failed"
    return "interrupted" if begun else "waiting"


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return True


def _pace(oldest: dict[str, Any], newest: dict[str, Any]) -> float:
    """Agent steps per second between two rows; 0 where that cannot be told."""
    steps = newest.get("env_steps", 0) - oldest.get("env_steps", 0)
    seconds = _number(newest, "wall_seconds", 0.0) - _number(oldest, "wall_seconds", 0.0)
    return steps / seconds if seconds > 0 and steps > 0 else 0.0
