"""JSON that may come from a stranger."""

import json
from collections.abc import Callable
from typing import Any

_MOST_LEVELS = 100


def parse(text: str | bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What JSON says, which whoever reads on can walk through and print.

    Args:
      text: may come from a stranger.
      hook: as `object_pairs_hook` of `json.loads`.

    Raises:
      ValueError: it is no JSON, or is nested more deeply than anything that this program writes.
    """
    try:
        found = json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [found] if isinstance(found, dict | list) else []
    for _ in range(_MOST_LEVELS):
        lists = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for inner in lists for each in inner if isinstance(each, dict | list)]
        if not level:
            return found
    raise ValueError("it is nested too deeply")


def is_number(value: Any, *kinds: type) -> bool:
    """Whether what a file says is an int or float (or of `kinds`) below 10^15, so that nothing overflows."""
    return type(value) in (kinds or (int, float)) and abs(value) < 1e15
