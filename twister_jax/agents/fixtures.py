"""Comparing with a fixture of a published formulation: same weights, inputs and samples."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from twister_jax.errors import UserError
from twister_jax.fields import MOST_WIDE, Settings, flatten, out_of_range, replace, show

LOSS_TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 2e-3

Fixture = dict[str, np.ndarray]

BROKEN = (TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError, MemoryError)
"""What numbers and arrays of the wrong kind, shape or size lead to."""


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
    a rounding error in theirs: where ‖theirs‖ is smaller, `rounding` is the divisor.
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


def checked(settings: Settings, num_actions: Any) -> Settings:
    """`settings` as a fixture gives them; raises `UserError` where a type or range is wrong."""
    settings = replace(settings, dict(flatten(settings)))
    problems = list(out_of_range(settings))
    if type(num_actions) is not int or not 0 < num_actions <= MOST_WIDE:
        problems.append(f"num_actions = {show(num_actions)}: must be between 1 and {MOST_WIDE}")
    if problems:
        raise UserError("; ".join(problems))
    return settings


def published_weights(fixture: Fixture) -> dict[str, np.ndarray]:
    """The weights of a fixture under their published names, in float32."""
    return {
        name.removeprefix("param/"): value.astype(np.float32)
        for name, value in fixture.items()
        if name.startswith("param/")
    }
