"""Random resized crops, the second view of contrastive predictive coding.

Crop and bilinear resize are linear, so each image costs two small matrix products with computed weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from twister_jax.randomness import uniform

TRIES = 10


def crop_boxes(
    key: PRNGKeyArray, count: int, size: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Int[Array, "count 4"]:
    """Boxes (top, left, height, width) in frames of `size` × `size` pixels.

    Area share uniform in `area`, aspect ratio log-uniform in `aspect`; the first of ten tries that fits, else
    the whole frame.
    """
    key_area, key_aspect, key_corner = jax.random.split(key, 3)
    share = uniform(key_area, (count, TRIES), minval=area[0], maxval=area[1])
    log_aspect = uniform(key_aspect, (count, TRIES), minval=jnp.log(aspect[0]), maxval=jnp.log(aspect[1]))
    ratio = jnp.exp(log_aspect)
    width = jnp.round(size * jnp.sqrt(share * ratio)).astype(jnp.int32)
    height = jnp.round(size * jnp.sqrt(share / ratio)).astype(jnp.int32)
    fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
    first = jnp.argmax(fits, axis=1)[:, None]
    found = jnp.any(fits, axis=1)
    height = jnp.where(found, jnp.take_along_axis(height, first, 1)[:, 0], size)
    width = jnp.where(found, jnp.take_along_axis(width, first, 1)[:, 0], size)
    corner = uniform(key_corner, (2, count))
    top = jnp.floor(corner[0] * (size - height + 1)).astype(jnp.int32)
    left = jnp.floor(corner[1] * (size - width + 1)).astype(jnp.int32)
    return jnp.stack([top, left, height, width], axis=1)


def resize_weights(
    start: Int[Array, " image"], extent: Int[Array, " image"], size: int
) -> Float[Array, "image out source"]:
    """Bilinear weights, half-pixel centres, from source pixels start … start + extent − 1 to `size` pixels.

    Pixels outside the crop have weight zero; what is left is renormalised.
    """
    centres = (jnp.arange(size) + 0.5) * extent[:, None] / size - 0.5
    pixels = jnp.arange(size) - start[:, None]
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(centres[:, :, None] - pixels[:, None, :]))
    inside = (pixels >= 0) & (pixels < extent[:, None])
    weights = jnp.where(inside[:, None, :], weights, 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def crop_and_resize(
    images: Float[Array, "image size size channel"], boxes: Int[Array, "image 4"]
) -> Float[Array, "image size size channel"]:
    """Each image's box, resized back to the full frame."""
    size = images.shape[1]
    top, left, height, width = boxes.T
    rows = resize_weights(top, height, size).astype(images.dtype)
    columns = resize_weights(left, width, size).astype(images.dtype)
    images = jnp.einsum("nij,njwc->niwc", rows, images)
    return jnp.einsum("nij,nhjc->nhic", columns, images)


def random_resized_crop(
    key: PRNGKeyArray,
    images: Float[Array, "image size size channel"],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Float[Array, "image size size channel"]:
    """An independent random crop of every image, resized to the full frame."""
    boxes = crop_boxes(key, images.shape[0], images.shape[1], area, aspect)
    return crop_and_resize(images, boxes)
