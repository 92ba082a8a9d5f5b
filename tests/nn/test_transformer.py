"""Masks, episode boundaries, and the whole window against one step at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from twister_jax.nn.attention import Dropout
from twister_jax.nn.transformer import Transformer, attention_mask

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
    """Acting's cache against the training pass, across resets and for more steps than the cache has slots."""
    is_first = first_at(0, 5, 6, 9)
    whole, _ = transformer(inputs, is_first)
    cache = transformer.empty_cache(BATCH)
    position_table = transformer.position_table()
    for t in range(LENGTH):
        cache = cache.replace(visible=cache.visible & ~is_first[:, t, None])
        out, cache = transformer.step(inputs[:, t], cache, position_table)
        np.testing.assert_allclose(out, whole[:, t], rtol=1e-4, atol=1e-5)


def test_window_caches_continue_the_window(transformer, inputs):
    """Imagination's first steps equal the training pass on a window that is that much longer."""
    is_first = jnp.zeros((BATCH, LENGTH), bool)
    whole, _ = transformer(inputs, is_first)
    for start in (2, CONTEXT, 7):
        _, keys_values = transformer(inputs[:, : start + 1], is_first[:, : start + 1])
        caches = transformer.window_caches(keys_values, is_first[:, : start + 1])
        x = jnp.repeat(inputs, start + 1, axis=0)  # every start of a row is fed the row's continuation
        for t in range(start + 1, min(start + 4, LENGTH)):
            out, caches = transformer.step(x[:, t], caches, transformer.position_table())
            np.testing.assert_allclose(out[start :: start + 1], whole[:, t], rtol=1e-4, atol=1e-5)


def test_window_caches_hide_what_the_published_formulation_hides(transformer, inputs):
    """Key p is visible from start t only without a first position in p…t, and never before the window."""
    is_first = first_at(0, 5, 9)
    _, keys_values = transformer(inputs, is_first)
    visible = np.asarray(transformer.window_caches(keys_values, is_first).visible)
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


def test_dropout_acts_on_weights_attention_and_feedforward_of_every_block(transformer, inputs, monkeypatch):
    """And on nothing else; the one draw of random numbers is just as large as the masks together."""
    shapes, sizes = [], []

    class Recorder(Dropout):
        def __init__(self, rate, key, batch, size):
            super().__init__(rate, key, batch, size)
            sizes.append(size)

        def __call__(self, x):
            shapes.append(x.shape)
            return super().__call__(x)

    monkeypatch.setattr("twister_jax.nn.transformer.Dropout", Recorder)
    transformer(inputs, first_at(3), jax.random.key(0))
    activations = (BATCH, LENGTH, HIDDEN)
    assert shapes == 2 * [(BATCH, 4, LENGTH, LENGTH), activations, activations]
    assert sizes == [sum(map(math.prod, shapes)) // BATCH]
