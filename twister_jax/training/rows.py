"""Rows of `metrics.jsonl`, read from lines; `training.logs` says what is in them."""

from collections.abc import Iterable, Iterator
from typing import Any

from twister_jax import foreign_json


def whole_rows(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """Rows that can be read, by name: the last line may be being written, and others damaged."""
    for line in lines:
        try:
            row = foreign_json.parse(line)
        except ValueError:
            continue
        if isinstance(row, dict) and foreign_json.is_number(row.get("env_steps"), int):
            yield row
