"""What a reader of a run's curves should be told before believing them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twister_jax import files
from twister_jax.presets import stored_steps
from twister_jax.view.record import Record

NO_ENTROPY = 0.01
"""Of a policy or of latents, in the unit that the agent logs: below it, nothing is left to chance."""
_MOST_BYTES, _MOST_PIXELS = 1 << 24, 1 << 22  # of a picture: the directory may be a stranger's
CONSTANT = 0.02
"""Share of the truth's variation over time below which a decoder shows a constant."""


def of(record: Record) -> list[str]:
    """One line for each thing that is wrong, or may be."""
    found = [*record.notes, *_of_numbers(record)]
    pictures = sorted((record.directory / "pictures").glob("open_loop-*.png"))
    if pictures and _shows_a_constant(pictures[-1]):
        found.append("the decoder shows nearly the same picture at every step: it has not learned to see")
    return found


def _of_numbers(record: Record) -> list[str]:
    found, steps = [], stored_steps(record.config)
    skipped, longest = _last(record, "health/skipped"), _last(record, "health/longest")
    if skipped:
        found.append(
            f"{skipped:,.0f} updates were skipped because a loss or gradient was not finite, "
            f"up to {longest or 0:,.0f} in a row"
        )
    for name, what in (
        ("entropy/policy", "the policy has no entropy left: it explores nothing any more"),
        ("entropy/posterior", "the latents have collapsed: the encoder's distributions have no entropy left"),
    ):
        value = _last(record, name)
        if value is not None and value < NO_ENTROPY:
            found.append(f"{what} ({name} = {value:.2g})")
    if steps < record.config.train.steps:
        found.append(
            f"the replay holds {steps:,} of the run's {record.config.train.steps:,} steps and "
            "forgets older ones"
        )
    empty = sorted(name for name, value in record.newest.items() if value is None)
    if empty:
        found.append(f"no finite value in the newest row: {', '.join(empty[:5])}")
    return found


def _last(record: Record, name: str) -> float | None:
    values: list[Any] = [row[name] for row in record.rows if isinstance(row.get(name), int | float)]
    return float(values[-1]) if values else None


def _shows_a_constant(path: Path) -> bool:
    """Whether the reconstructions in a picture of `open_loop_picture` hardly vary over time."""
    try:
        with Image.open(io.BytesIO(files.read(path, _MOST_BYTES))) as image:
            if image.width * image.height > _MOST_PIXELS:
                return False  # none of ours
            pixels = np.asarray(image.convert("RGB"), np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # whatever Pillow raises
        return False
    size = 64
    labels = pixels.shape[1] % size
    if not labels:
        return False  # of an earlier version
    strips = pixels[:, labels:]
    rows, columns = strips.shape[0] // size, strips.shape[1] // size
    if rows < 2 or columns < 2:
        return False
    tiles = strips[: rows * size].reshape(rows, size, columns, size, 3)[:, :, 1:]
    variation = tiles.std(axis=2).mean(axis=(1, 2, 3))
    truth, reconstruction = variation[0::4].mean(), variation[1::4].mean()
    return bool(truth > 0.5 and reconstruction < CONSTANT * truth)
