"""Masks, the relative shift, and the whole window against one step at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from twister_jax.nn.transformer import (
    Transformer,
    attention_mask,
    by_distance_to_by_key,
    place_scores,
    sinusoids,
)

BATCH, LENGTH, HIDDEN, CONTEXT = 3, 12, 16, 4


@pytest.fixture(scope="module")
def transformer():
    model = Transformer(HIDDEN, 2, 4, CONTEXT, 0.1, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for index, block in enumerate(model.blocks):  # they start at zero, where a mistake would not show
        block.u[...] = jax.random.normal(jax.random.key(index), (HIDDEN,))
        block.v[...] = jax.random.normal(jax.random.key(index + 9), (HIDDEN,))
    return model


@pytest.fixture(scope="module")
def inputs():
    return jax.random.normal(jax.random.key(1), (BATCH, LENGTH, HIDDEN))


def first_at(*positions):
    return jnp.zeros((BATCH, LENGTH), bool).at[1, jnp.asarray(positions, int)].set(True)


def test_sinusoids_interleave_sine_and_cosine():
    table = sinusoids(5, 8)
    for d in range(5):
        for k in range(4):
            angle = d / 10000 ** (2 * k / 8)
            np.testing.assert_allclose(table[d, 2 * k], np.sin(angle), atol=1e-6)
            np.testing.assert_allclose(table[d, 2 * k + 1], np.cos(angle), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6))
def test_relative_shift_against_indexing(length, distances):
    scores = np.random.default_rng(0).normal(size=(2, length, distances))
    shifted = np.asarray(by_distance_to_by_key(jnp.asarray(scores)))
    assert shifted.shape == (2, length, length)
    for i in range(length):
        for j in range(length):
            if 0 <= i - j < distances:
                np.testing.assert_allclose(shifted[:, i, j], scores[:, i, i - j], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=14), st.integers(0, 6))
def test_mask_against_its_definition(flags, context):
    mask = np.asarray(attention_mask(jnp.asarray([flags]), context))[0]
    for i in range(len(flags)):
        newest = max((p for p in range(i + 1) if flags[p]), default=0)
        for j in range(len(flags)):
            assert mask[i, j] == (newest <= j <= i and i - j <= context)


def test_nothing_crosses_an_episode_boundary(transformer, inputs):
    """Changing everything before a reset changes nothing after it, and the gradient is exactly zero."""
    is_first = first_at(6)
    after = lambda x: transformer(x, is_first)[0][1, 6:]  # noqa: E731
    changed = inputs.at[1, :6].set(7.0)
    np.testing.assert_array_equal(after(inputs), after(changed))
    gradient = jax.grad(lambda x: jnp.sum(after(x) ** 2))(inputs)
    np.testing.assert_array_equal(gradient[1, :6], 0.0)
    assert np.all(np.abs(gradient[1, 6:]).sum(-1) > 0)


def test_without_a_boundary_the_past_matters_up_to_the_context(transformer, inputs):
    one_block = Transformer(HIDDEN, 1, 4, CONTEXT, 0.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    last = lambda x: jnp.sum(one_block(x, jnp.zeros((BATCH, LENGTH), bool))[0][:, -1] ** 2)  # noqa: E731
    reach = np.abs(jax.grad(last)(inputs)).sum((0, 2))
    assert np.all(reach[-CONTEXT - 1 :] > 0)
    np.testing.assert_array_equal(reach[: -CONTEXT - 1], 0.0)


def test_step_by_step_equals_the_whole_window(transformer, inputs):
    """Acting's ring against the training pass, across resets, longer than the ring."""
    is_first = first_at(0, 5, 6, 9)
    whole, _ = transformer(inputs, is_first)
    ring = transformer.empty_ring(BATCH)
    position_table = transformer.position_table()
    for t in range(LENGTH):
        ring = ring.replace(visible=ring.visible & ~is_first[:, t, None])
        out, ring = transformer.step(inputs[:, t], ring, position_table)
        np.testing.assert_allclose(out, whole[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_of_place_scores_agree(dtype):
    rng = np.random.default_rng(0)
    place, by_slot = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((7, 4, 16), (4, 5, 16)))
    product, total = (place_scores(place, by_slot, form) for form in ("product", "sum"))
    exact = np.einsum("nhd,hsd->nhs", *(np.asarray(x, np.float64) for x in (place, by_slot)))
    for scores in (product, total):
        assert scores.dtype == jnp.float32
        np.testing.assert_allclose(scores, exact, rtol=1e-4, atol=1e-4)


def test_rings_of_windows_continue_the_window(transformer, inputs):
    """Imagination's first steps equal the training pass on a window that is that much longer."""
    is_first = jnp.zeros((BATCH, LENGTH), bool)
    whole, _ = transformer(inputs, is_first)
    for start in (2, CONTEXT, 7):
        _, cache = transformer(inputs[:, : start + 1], is_first[:, : start + 1])
        rings = transformer.rings_of_windows(cache, is_first[:, : start + 1])
        x = jnp.repeat(inputs, start + 1, axis=0)  # every start of a row is fed the row's continuation
        for t in range(start + 1, min(start + 4, LENGTH)):
            out, rings = transformer.step(x[:, t], rings, transformer.position_table())
            np.testing.assert_allclose(out[start :: start + 1], whole[:, t], rtol=1e-4, atol=1e-5)


def test_rings_hide_what_the_published_formulation_hides(transformer, inputs):
    """Key p is visible from start t only without a first position in p…t, and never before the window."""
    is_first = first_at(0, 5, 9)
    _, cache = transformer(inputs, is_first)
    visible = np.asarray(transformer.rings_of_windows(cache, is_first).visible)
    assert visible.shape == (BATCH * LENGTH, CONTEXT + 1)
    for b in range(BATCH):
        for t in range(LENGTH):
            for slot in range(CONTEXT):
                p = t - (CONTEXT - 1 - slot)
                expected = p >= 0 and not np.any(np.asarray(is_first)[b, p : t + 1])
                assert visible[b * LENGTH + t, slot] == expected
    assert not visible[:, CONTEXT].any()


def test_dropout_is_on_only_with_a_key(transformer, inputs):
    is_first = first_at(3)
    plain = transformer(inputs, is_first)[0]
    np.testing.assert_array_equal(plain, transformer(inputs, is_first)[0])
    one, two = (transformer(inputs, is_first, jax.random.key(k))[0] for k in (0, 1))
    assert not np.allclose(plain, one)
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(one, transformer(inputs, is_first, jax.random.key(0))[0])
