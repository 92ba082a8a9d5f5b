"""Clipping and Adam, against Optax's own parts and by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from twister_jax.config import OptimizerConfig
from twister_jax.nn.optimizer import SMALL, apply_gradients, init, largest_step
from twister_jax.runtime import tracing_for

LARGE = (SMALL // 64 + 1, 64)


def step(config, params, gradients, sound=True):
    state = init(config, params)
    return apply_gradients(config, gradients, params, state, jnp.asarray(sound))


def tree(seed, scale=1.0):
    """Small arrays, which are joined, with a large one among them."""
    shapes = {
        "bias": (5,),
        "kernel": (5, 3),
        "large": LARGE,
        "norm": {"scale": (3,)},
        "scalar": (),
        "z": (2, 4, 3),
    }
    draw = np.random.default_rng(seed).normal
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return structure.unflatten([jnp.asarray(scale * draw(size=shape), jnp.float32) for shape in leaves])


def find(chain):
    """Adam's state among those of a chain."""
    return next(each for each in chain if hasattr(each, "mu"))


def numbers(tree):
    """All numbers of a tree, in order of size."""
    return np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]))


@pytest.mark.parametrize("gradients", [tree(0), {"large": jnp.ones(LARGE)}, {"kernel": jnp.ones((2, 3))}])
def test_the_norm_is_that_of_all_leaves(gradients):
    _, _, norm, _ = step(OptimizerConfig(0.1, 0.1, 2.0), gradients, gradients)
    np.testing.assert_allclose(norm, optax.tree.norm(gradients), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clips_and_steps_as_optax_does(scale):
    config = OptimizerConfig(0.1, 0.1, 2.0)
    params, gradients = tree(1), tree(2, scale)
    reference = optax.chain(optax.clip_by_global_norm(2.0), optax.scale_by_adam(eps=0.1), optax.scale(-0.1))
    updates, expected = reference.update(gradients, reference.init(params), params)
    new, state, norm, finite = step(config, params, gradients)
    assert finite
    chex.assert_trees_all_close(new, optax.apply_updates(params, updates), rtol=1e-5, atol=1e-6)
    for moment in ("mu", "nu"):  # the step forgets a gradient's length, these do not
        got, wanted = (numbers(getattr(find(of), moment)) for of in (state.adam, expected))
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    np.testing.assert_allclose(norm, optax.tree.norm(gradients), rtol=1e-6)  # before clipping


def test_on_a_tpu_a_step_is_the_same():
    """There the layout of gradients is said, in which they fill tiles."""
    rng = np.random.default_rng(0)
    params, gradients = ({"k": jnp.asarray(rng.normal(size=(3, 16, 128)), jnp.float32)} for _ in range(2))
    config = OptimizerConfig(0.1, 0.1, 2.0)
    expected = step(config, params, gradients)
    with tracing_for("tpu"):
        program = jax.jit(lambda p, g: step(config, p, g)).lower(params, gradients)
    assert "LayoutConstraint" in program.as_text()
    chex.assert_trees_all_close(program.compile()(params, gradients), expected, rtol=1e-6, atol=1e-7)


def test_weight_decay_is_added_to_the_clipped_gradient():
    """The order of PyTorch's Adam: clip, then L2 into the gradient, then the moments."""
    weight, gradient = jnp.array([2.0, -1.0]), jnp.array([30.0, 40.0])
    new, *_ = step(OptimizerConfig(0.1, 0.5, 1.0, 0.5), weight, gradient)
    total = np.array([0.6, 0.8]) + 0.5 * np.array([2.0, -1.0])
    np.testing.assert_allclose(new, weight - 0.1 * total / (np.abs(total) + 0.5), rtol=1e-5)


def test_a_zero_gradient_changes_nothing():
    params = tree(3)
    new, state, norm, _ = step(OptimizerConfig(0.1, 1e-5, 1.0), params, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(new, params)
    chex.assert_tree_all_finite(state)
    assert norm == 0.0


@pytest.mark.parametrize(("bad", "sound"), [(np.nan, True), (np.inf, True), (1.0, False)])
def test_what_is_not_finite_leaves_no_trace(bad, sound):
    config, params, gradients = OptimizerConfig(0.1, 1e-5, 1.0), tree(4), tree(5)
    gradients["bias"] = gradients["bias"].at[2].set(bad)
    new, state, _, finite = step(config, params, gradients, sound)
    chex.assert_trees_all_equal((new, state), (params, init(config, params)))
    assert finite == np.isfinite(bad)  # a loss was not, where `sound` says so


def test_new_parameters_that_are_not_finite_are_not_taken():
    """Loss and gradient are, and the step leads beyond the largest number."""
    params = {"kernel": jnp.full((3, 2), 3e38), "bias": jnp.zeros(2)}
    gradients = jax.tree.map(lambda x: -jnp.ones_like(x), params)
    config = OptimizerConfig(1e38, 1e-5, 1.0)
    new, state, norm, finite = step(config, params, gradients)
    assert np.isfinite(norm)
    assert not finite
    chex.assert_trees_all_equal((new, state), (params, init(config, params)))


@pytest.mark.parametrize(("epsilon", "least"), [(1e-8, 4.0), (1e-30, 1e9)])
def test_no_step_is_longer_than_what_is_reckoned_with(epsilon, least):
    """Gradients that grow so that each adds equally to both of Adam's means give the longest steps."""
    config, weight = OptimizerConfig(1.0, epsilon, 1e30), jnp.zeros(())
    state = init(config, weight)

    def one(state, exponent):
        gradient = (0.999 / 0.9) ** exponent
        stepped, state, *_ = apply_gradients(config, gradient, weight, state, jnp.asarray(True))
        return state, jnp.abs(stepped)

    _, steps = jax.lax.scan(one, state, jnp.arange(-400.0, 390.0))
    assert least < steps.max() < largest_step(config)


@pytest.mark.parametrize("start", [0.0, 1.0, 1e6])
def test_no_parameter_is_ever_beyond_its_bound(start):
    """Not either where the bound is so large that a step is lost in its rounding."""
    config, params = OptimizerConfig(1e-3, 1e-8, 1e30), jax.tree.map(lambda x: x + start, tree(6))
    state, ones = init(config, params), jax.tree.map(jnp.ones_like, params)
    for _ in range(20):
        before = state.bound
        params, state, *_ = apply_gradients(config, ones, params, state, jnp.asarray(True))
        assert np.abs(numbers(params)).max() <= state.bound
        assert state.bound > before
