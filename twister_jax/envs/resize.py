"""Exact area resizing, as small weighted sums with weights computed once."""

import math

import numpy as np
from jaxtyping import Float, UInt8


def area_weights(size: int, resized: int) -> Float[np.ndarray, "out in"]:
    """How much of each input pixel lies under each output pixel, for one repeating block of pixels.

    Pixel edges of both grids coincide every `size / g` inputs and `resized / g` outputs, with g their
    greatest common divisor; the pattern repeats from there. Measured in units of 1 / (resized / g) of
    an input pixel, every overlap is an integer and every row sums to `size / g`.
    """
    divisor = math.gcd(size, resized)
    inputs, outputs = size // divisor, resized // divisor
    i, o = np.arange(inputs), np.arange(outputs)[:, None]
    overlap = np.minimum((i + 1) * outputs, (o + 1) * inputs) - np.maximum(i * outputs, o * inputs)
    return np.maximum(overlap, 0).astype(np.float64)


class AreaResize:
    """Averages an image over the area of each output pixel, rounded to the nearest integer.

    This is what OpenCV's INTER_AREA computes when shrinking by a fractional factor. Both sums run over
    integers that their types hold exactly, so the result is the same bits on every machine.

    Args:
      shape: (height, width, channels) of the images to come.
      size: height and width of the result, at most those of the images.

    Raises:
      ValueError: the image is smaller than the result, or so large that the sums could overflow.
    """

    def __init__(self, shape: tuple[int, int, int], size: int):
        height, width, channels = shape
        if min(height, width) < size:
            raise ValueError(f"cannot shrink {height}x{width} to {size}x{size}")
        block = area_weights(height, size)
        down = np.kron(np.eye(height // block.shape[1]), block)
        across = area_weights(width, size)
        self._total = block.shape[1] * across.shape[1]
        if 255 * block.shape[1] >= 2**16 or 255 * self._total >= 2**24:
            raise ValueError(f"the sums for {height}x{width} to {size}x{size} could overflow")

        # Rows first, as a banded product: each output row touches only a few input rows. numpy's own
        # loops do this, because BLAS would start threads for it and those fight with the update's.
        first = np.argmax(down > 0, axis=1)
        reach = int(np.count_nonzero(down, axis=1).max())
        rows = np.minimum(first[:, None] + np.arange(reach), height - 1)
        inside = first[:, None] + np.arange(reach) < height
        weights = np.where(inside, np.take_along_axis(down, rows, axis=1), 0)
        self._rows = list(rows.T)
        self._weights = list(weights.T[:, :, None].astype(np.uint16))
        # Then columns, all channels of one repeating block at once.
        self._across = np.kron(across.T, np.eye(channels)).astype(np.float32)
        self._shape = (size, size, channels)

    def __call__(
        self, image: UInt8[np.ndarray, "height width *channel"]
    ) -> UInt8[np.ndarray, "size size channel"]:
        """Returns a new array; the image may lack the axis of a single channel."""
        lines = image.reshape(image.shape[0], -1).astype(np.uint16)
        total = np.zeros((self._shape[0], lines.shape[1]), np.uint16)
        for rows, weights in zip(self._rows, self._weights, strict=True):
            total += lines[rows] * weights
        result = total.astype(np.float32).reshape(-1, self._across.shape[0]) @ self._across
        result /= self._total
        return np.rint(result, out=result).astype(np.uint8).reshape(self._shape)
