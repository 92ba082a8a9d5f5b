"""The table on the standard output, row by row as the numbers come, and the same as JSON."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import Times
from twister_jax import files

_SCALED = {"s": "time", "B": "size", "FLOP": "size", "FLOP/s": "size"}
_PREFIXES = {
    "time": ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")),
    "size": ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
}
_COLUMNS = "{:<12}  {:<44}  {:>9}  {:>9}  {:>9}  {:<9}  {}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured or counted quantity, in base units; `low` and `high` where there were several samples."""

    section: str
    name: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    samples: int = 0
    note: str = ""

    def text(self) -> str:
        """The row as a line of the table; columns are two blanks or more apart."""
        scale, prefix = _scale(self.value, self.unit)
        numbers = [_show(x, scale) for x in (self.value, self.low, self.high)]
        return _COLUMNS.format(self.section, self.name, *numbers, prefix + self.unit or "-", self.note)


class Report:
    """Collects rows, prints them at once, and keeps the JSON file up to date."""

    def __init__(self, machine: dict[str, Any], settings: dict[str, Any], path: Path | None):
        self.machine, self.settings, self.path = machine, settings, path
        self.rows: list[Row] = []
        self.failed: dict[str, str] = {}
        self.summary: dict[str, float | None] = dict.fromkeys(
            (
                "seconds_per_update",
                "tokens_per_second",
                "flops_per_update",
                "published_flops_per_update",
                "matmul_peak_flops",
                "utilization",
                "utilization_published",
            )
        )

    def head(self) -> None:
        """The first line of the table."""
        print(_COLUMNS.format("section", "quantity", "median", "min", "max", "unit", "note"), flush=True)

    def add(self, section: str, name: str, value: float | None, unit: str = "", note: str = "") -> None:
        """A quantity that is one number; None where it does not apply, with a note that says why."""
        self._add(Row(section, name, value, unit, note=note))

    def time(self, section: str, name: str, times: Times, note: str = "") -> None:
        """Seconds per call."""
        self._add(Row(section, name, times.median, "s", times.low, times.high, len(times.samples), note=note))

    def rate(self, section: str, name: str, amount: float, times: Times, unit: str, note: str = "") -> None:
        """`amount` per call and second."""
        rates = [amount / seconds for seconds in (times.median, times.high, times.low)]
        self._add(Row(section, name, rates[0], unit, rates[1], rates[2], len(times.samples), note=note))

    def fail(self, section: str, message: str) -> None:
        """A section that could not be measured; the others still can."""
        self.failed[section] = message
        self._add(Row(section, "not measured", None, "", note=message))

    def write(self) -> None:
        """Rewrites the JSON file, if one was asked for; that it cannot be written counts as a failure."""
        if self.path is None:
            return
        self.failed.pop("json", None)
        content = {
            **self.summary,
            "machine": self.machine,
            "settings": self.settings,
            "failed": self.failed,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        try:
            files.write_atomically(self.path, json.dumps(_finite(content), indent=1) + "\n")
        except OSError as error:
            self.failed["json"] = f"{self.path} cannot be written: {error.strerror}"
            print(f"benchmarks: --json {self.failed['json']}", file=sys.stderr)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(row.text(), flush=True)


def _scale(value: float | None, unit: str) -> tuple[float, str]:
    if value is None or not math.isfinite(value) or unit not in _SCALED:
        return 1.0, ""
    prefixes = _PREFIXES[_SCALED[unit]]
    return next((pair for pair in prefixes if abs(value) >= pair[0]), prefixes[-1])


def _show(value: float | None, scale: float) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    scaled = value / scale
    if scaled == 0:
        return "0"
    digits = max(0, 3 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:.{min(digits, 6)}f}"


def _finite(tree: Any) -> Any:
    """JSON knows neither nan nor infinity."""
    if isinstance(tree, dict):
        return {str(name): _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    if isinstance(tree, Path):
        return str(tree)
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
