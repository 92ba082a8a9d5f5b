"""Grids of images for people to look at."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def tile(
    images: Float[Array, "row column height width channel"],
) -> UInt8[Array, "picture_height picture_width 3"]:
    """One picture of a grid of images in [−0.5, 0.5]; grey ones become RGB."""
    rows, columns, height, width, channels = images.shape
    grid = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    grid = jnp.clip((grid + 0.5) * 255.0, 0, 255).astype(jnp.uint8)
    return jnp.broadcast_to(grid, (*grid.shape[:2], 3))
