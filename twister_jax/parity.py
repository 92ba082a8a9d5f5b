"""`python -m twister_jax parity FILE.npz`: recomputes a fixture and prints one line per quantity."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from twister_jax import agents, files, foreign_json
from twister_jax.agents.fixtures import BROKEN, Fixture, Row
from twister_jax.errors import UserError
from twister_jax.files import UnusableError, one_line
from twister_jax.training.progress import say


def load(path: Path) -> tuple[dict[str, Any], Fixture]:
    """Sizes and arrays of a fixture.

    Raises:
      UserError: the file cannot be read or is no fixture.
    """
    try:
        fixture = files.read_archive(path)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (UnusableError, OSError) as error:
        raise UserError(f"{path} cannot be read as an .npz fixture ({one_line(error)})") from None
    if "config_json" not in fixture:
        raise UserError(f"{path} is no parity fixture: it has no 'config_json'")
    try:
        sizes = foreign_json.parse(str(fixture.pop("config_json")))
    except ValueError as error:
        raise UserError(f"{path} is no parity fixture: its 'config_json' is not JSON ({error})") from None
    if not isinstance(sizes, dict):
        raise UserError(f"{path} is no parity fixture: its 'config_json' is not an object")
    return sizes, fixture


def check(path: Path, dtype: DTypeLike = np.float32) -> list[Row]:
    """Recomputes a fixture with the agent's own functions and compares every quantity.

    The tolerances are for products in float32; another `dtype` shows what its rounding does.

    Raises:
      UserError: the file is no fixture, or its sizes, weights and inputs do not fit together.
    """
    sizes, fixture = load(path)
    names = [name.removeprefix("param/") for name in fixture if name.startswith("param/")]
    package = agents.package_of_fixture(names)
    if package is None:
        raise UserError(f"{path} is no parity fixture: it has no agent's 'param/…' arrays")
    try:
        with jax.default_matmul_precision("highest"):
            return package.function("parity", "compare")(sizes, fixture, dtype)
    except KeyError as error:
        raise UserError(f"{path} is an incomplete fixture: it lacks {error}") from None
    except (UserError, *BROKEN) as error:
        raise UserError(f"{path} is a broken fixture: {one_line(error)}") from error


def main(path: Path) -> int:
    """Prints a line per quantity; returns 0 when all agree, else 1."""
    rows = check(path)
    width = max(len(row.name) for row in rows)
    for row in rows:
        verdict = "ok" if row.ok else f"OFF (tolerance {row.tolerance:.0e})"
        say(f"{row.name:<{width}}  {row.error:9.2e}  {verdict}")
    off = sum(not row.ok for row in rows)
    say(f"{len(rows) - off} of {len(rows)} quantities agree" + (f", {off} are off" if off else ""))
    return 1 if off else 0
