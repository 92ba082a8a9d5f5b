import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twister_jax.envs.resize import AreaResize


def slow_area(image, size):
    """Exact: every pixel is cut into equal pieces so that output pixels are whole numbers of pieces."""
    total = image.astype(np.int64)
    for axis in (0, 1):
        length = total.shape[axis]
        pieces = np.moveaxis(total.repeat(size, axis), axis, 0)
        total = np.moveaxis(pieces.reshape(size, length, *pieces.shape[1:]).sum(1), 0, axis)
    return np.rint(total / (image.shape[0] * image.shape[1])).astype(np.uint8)


@pytest.mark.parametrize("height", [210, 214, 220, 230, 250])  # the screens of all games in the wheel
@pytest.mark.parametrize("channels", [1, 3])
def test_screens_of_all_sizes(height, channels):
    image = np.random.default_rng(height).integers(0, 256, (height, 160, channels), dtype=np.uint8)
    np.testing.assert_array_equal(AreaResize(image.shape, 64)(image), slow_area(image, 64))


@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_shape(height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(AreaResize(image.shape, 8)(image), slow_area(image, 8))


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_a_flat_image_stays_flat(value):
    image = np.full((210, 160, 3), value, np.uint8)
    np.testing.assert_array_equal(AreaResize(image.shape, 64)(image), np.full((64, 64, 3), value))


def test_a_single_channel_may_lack_its_axis():
    image = np.random.default_rng(0).integers(0, 256, (210, 160), dtype=np.uint8)
    np.testing.assert_array_equal(AreaResize((210, 160, 1), 64)(image), slow_area(image[..., None], 64))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="cannot shrink"):
        AreaResize((32, 160, 3), 64)
    with pytest.raises(ValueError, match="overflow"):
        AreaResize((1009, 1013, 3), 64)
