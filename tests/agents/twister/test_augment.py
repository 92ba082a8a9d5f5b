"""Random resized crops."""

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax.agents.twister.augment import crop_and_resize, crop_boxes, random_resized_crop

AREA, ASPECT = (0.25, 1.0), (0.75, 4 / 3)


def slow_crop(image, box, size=64):
    """Bilinear, half-pixel centres, written as loops over pixels."""
    top, left, height, width = box
    crop = image[top : top + height, left : left + width]

    def axis(extent):
        for i in range(size):
            centre = min(max((i + 0.5) * extent / size - 0.5, 0.0), extent - 1.0)
            low = min(int(np.floor(centre)), extent - 1)
            yield low, min(low + 1, extent - 1), centre - low

    out = np.empty((size, size, image.shape[-1]))
    for i, (r0, r1, fr) in enumerate(axis(height)):
        for j, (c0, c1, fc) in enumerate(axis(width)):
            upper = (1 - fc) * crop[r0, c0] + fc * crop[r0, c1]
            lower = (1 - fc) * crop[r1, c0] + fc * crop[r1, c1]
            out[i, j] = (1 - fr) * upper + fr * lower
    return out


def test_crop_and_resize_against_loops():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 64, 64, 3)).astype(np.float32)
    boxes = np.array([[0, 0, 64, 64], [3, 20, 33, 41], [31, 0, 33, 64], [10, 10, 48, 32]])
    ours = crop_and_resize(jnp.asarray(images), jnp.asarray(boxes))
    for image, box, cropped in zip(images, boxes, ours, strict=True):
        np.testing.assert_allclose(cropped, slow_crop(image, box), atol=1e-5)


def test_the_whole_frame_is_left_as_it_is():
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    boxes = jnp.asarray([[0, 0, 64, 64]] * 2)
    np.testing.assert_allclose(crop_and_resize(images, boxes), images, atol=1e-6)


def test_boxes_lie_inside_and_cover_the_asked_range():
    boxes = np.asarray(crop_boxes(jax.random.key(0), 20_000, 64, AREA, ASPECT))
    top, left, height, width = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + height).max() == 64
    assert (left + width).max() == 64
    share, ratio = height * width / 64**2, width / height
    assert share.min() >= 0.23  # height and width are rounded
    assert ratio.min() >= 0.72
    assert ratio.max() <= 1.39


def test_wherever_a_box_can_lie_it_lies_with_equal_probability():
    boxes = np.asarray(crop_boxes(jax.random.key(2), 33_000, 64, (0.25, 0.25), (1.0, 1.0)))
    np.testing.assert_array_equal(boxes[:, 2:], 32)
    for place in boxes[:, :2].T:
        counts = np.bincount(place, minlength=33)
        assert len(counts) == 33
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_area_is_uniform_where_every_shape_fits():
    boxes = np.asarray(crop_boxes(jax.random.key(1), 50_000, 64, (0.25, 0.5), ASPECT))
    share = np.sort(boxes[:, 2] * boxes[:, 3] / 64**2)
    expected = np.linspace(0.25, 0.5, share.size)
    assert np.abs(share - expected).max() < 0.012


def test_impossible_shapes_fall_back_to_the_whole_frame():
    boxes = np.asarray(crop_boxes(jax.random.key(0), 50, 64, (1.0, 1.0), (2.0, 2.1)))
    np.testing.assert_array_equal(boxes, [[0, 0, 64, 64]] * 50)


def test_every_frame_is_cropped_by_itself():
    image = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    crops = random_resized_crop(jax.random.key(1), jnp.repeat(image, 6, axis=0), AREA, ASPECT)
    for i in range(6):
        for j in range(i):
            assert not np.allclose(crops[i], crops[j])
