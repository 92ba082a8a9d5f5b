"""`python -m twister_jax parity FILE.npz`: recomputes a fixture and prints one line per quantity."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from twister_jax.errors import UserError

LOSS_TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 2e-3

Fixture = dict[str, np.ndarray]


class Row(NamedTuple):
    """One compared quantity."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Within tolerance; a NaN never is."""
        return self.error <= self.tolerance


def relative_error(ours: ArrayLike, theirs: ArrayLike, rounding: float = 0.0) -> float:
    """‖ours − theirs‖ / ‖theirs‖; the plain norm of the difference where theirs is zero.

    Infinite when the shapes differ, so that broadcasting can never hide an error. `rounding` is the size of
    a rounding error in theirs: a quantity no larger than that is compared with it in place of itself.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return float("inf")
    difference = float(np.linalg.norm(ours - theirs))
    norm = max(float(np.linalg.norm(theirs)), rounding)
    return difference / norm if norm else difference


def gradient_rows(
    fixture: Fixture, group: str, ours: dict[str, np.ndarray], dtype: DTypeLike = np.float32
) -> list[Row]:
    """Compares gradients, given under their published names and layouts, with a fixture's `grad/GROUP/…`.

    Some gradients vanish: a bias on all keys of an attention moves every score alike. What a fixture holds
    for those is rounding of the whole gradient, which is what they are measured against.
    """
    rows = []
    prefix = f"grad/{group}/"
    norms = [value for key, value in fixture.items() if key.startswith(prefix) and key.endswith("#l2norm")]
    rounding = float(jnp.finfo(dtype).eps * np.linalg.norm(norms))
    for key in fixture:
        if not key.startswith(prefix):
            continue
        name, _, kind = key.removeprefix(prefix).partition("#")
        gradient = ours.get(name)
        if gradient is None:
            rows.append(Row(key, float("inf"), GRADIENT_TOLERANCE))
            continue
        flat = np.asarray(gradient, np.float64).reshape(-1)
        value = np.linalg.norm(flat) if kind == "l2norm" else flat[:256]
        rows.append(Row(key, relative_error(value, fixture[key], rounding), GRADIENT_TOLERANCE))
    return rows


def load(path: Path) -> tuple[dict, Fixture]:
    """Sizes and arrays of a fixture.

    Raises:
      UserError: the file cannot be read or is no fixture.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            fixture = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read as an .npz fixture ({error})") from None
    if "config_json" not in fixture:
        raise UserError(f"{path} is no parity fixture: it has no 'config_json'")
    return json.loads(str(fixture.pop("config_json"))), fixture


def check(path: Path, dtype: DTypeLike = np.float32) -> list[Row]:
    """Recomputes a fixture with this project's functions and compares every quantity.

    The tolerances are for products in float32; another `dtype` shows what its rounding does.
    """
    sizes, fixture = load(path)
    if any(name.startswith("param/rssm.") for name in fixture):
        from twister_jax.twister.parity import compare
    elif any(name.startswith("param/") for name in fixture):
        from twister_jax.twm.parity import compare
    else:
        raise UserError(f"{path} is no parity fixture: it has no 'param/…' arrays")
    try:
        with jax.default_matmul_precision("highest"):
            return compare(sizes, fixture, dtype)
    except KeyError as error:
        raise UserError(f"{path} is an incomplete fixture: it lacks {error}") from None


def main(path: Path) -> int:
    """Prints a line per quantity; returns 0 when all agree, else 1."""
    rows = check(path)
    width = max(len(row.name) for row in rows)
    for row in rows:
        verdict = "ok" if row.ok else f"OFF (tolerance {row.tolerance:.0e})"
        print(f"{row.name:<{width}}  {row.error:9.2e}  {verdict}")
    off = sum(not row.ok for row in rows)
    print(f"{len(rows) - off} of {len(rows)} quantities agree" + (f", {off} are off" if off else ""))
    return 1 if off else 0
