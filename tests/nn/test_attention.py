"""Encodings, the relative shift against a gather, and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twister_jax.nn.attention import NO_DROPOUT, Dropout, float32_einsum, relative_shift, sinusoids


def test_sinusoids_interleave_sine_and_cosine():
    table = sinusoids(5, 8)
    for d in range(5):
        for k in range(4):
            angle = d / 10000 ** (2 * k / 8)
            np.testing.assert_allclose(table[d, 2 * k], np.sin(angle), atol=1e-6)
            np.testing.assert_allclose(table[d, 2 * k + 1], np.cos(angle), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 4), st.data())
def test_relative_shift_against_a_gather(keys, distances, stride, data):
    """Queries at any position and stride, more or fewer distances than keys; with the gradient."""
    first = data.draw(st.integers(0, min(keys, distances) - 1))
    position = np.arange(first, keys, stride)
    distance = position[:, None] - np.arange(keys)
    known = (distance >= 0) & (distance < distances)
    scores, weight = (
        np.random.default_rng(seed).normal(size=(2, len(position), columns)).astype(np.float32)
        for seed, columns in enumerate((distances, keys))
    )

    @jax.jit
    def shift(scores, weight):
        y, back = jax.vjp(lambda x: jnp.where(known, relative_shift(x, first, stride, keys), 0.0), scores)
        return y, *back(weight)

    shifted, gradient = shift(scores, weight)
    index = np.where(known, distance, 0)
    rows = np.arange(len(position))[:, None]
    np.testing.assert_array_equal(shifted, np.where(known, scores[:, rows, index], 0.0))
    scattered = np.zeros_like(scores)
    np.add.at(scattered, (slice(None), rows, index), np.where(known, weight, 0.0))
    np.testing.assert_array_equal(gradient, scattered)


def test_dropout_keeps_the_mean_and_the_rate():
    x = jnp.ones((100, 1_000))
    dropped = Dropout(0.1, jax.random.key(0), *x.shape)(x)
    np.testing.assert_allclose(np.unique(dropped), [0.0, 1 / 0.9], rtol=1e-6)
    assert abs(np.mean(dropped == 0.0) - 0.1) < 5 * np.sqrt(0.09 / x.size)


def test_dropout_gives_every_call_a_mask_of_its_own():
    x = jnp.ones((100, 100))
    dropout = Dropout(0.5, jax.random.key(1), 100, 201)
    first, second = (np.asarray(dropout(x)) > 0 for _ in range(2))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
    assert np.all(np.any(first[1:] != first[0], axis=1))  # of every sequence
    dropout.of_all(jnp.ones(1))
    with pytest.raises(TypeError):
        dropout(x)  # the draw is used up


@pytest.mark.parametrize(
    "dropout", [NO_DROPOUT, Dropout(0.5, None, 4, 1), Dropout(0.0, jax.random.key(0), 4, 1)]
)
def test_dropout_is_off_without_a_key_or_a_rate(dropout):
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(dropout(x), x)
    np.testing.assert_array_equal(dropout.of_all(x), x)


def test_dropout_keeps_half_precision():
    x = jnp.ones((8, 8), jnp.bfloat16)
    assert Dropout(0.1, jax.random.key(0), 8, 8)(x).dtype == jnp.bfloat16


def test_float32_einsum_sums_half_precision_in_float32():
    ones = jnp.ones(1000, jnp.bfloat16)  # in bfloat16 the sum would stop at 256
    total = float32_einsum("i,i->", ones, ones)
    assert total.dtype == jnp.float32
    assert total == 1000
