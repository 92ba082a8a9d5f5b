"""Distributions against closed forms and independent implementations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from twister_jax.nn.distributions import (
    Bernoulli,
    BoundedNormal,
    KeySampler,
    NamedKeys,
    OneHot,
    SymlogTwoHot,
    symexp,
    symlog,
)

finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 20), elements=finite))
def test_symexp_inverts_symlog(x):
    np.testing.assert_allclose(symexp(symlog(jnp.asarray(x))), x, rtol=1e-4, atol=1e-5)


def test_uniform_mix_gives_every_class_its_share():
    logits = jnp.asarray([[100.0, 0.0, -100.0, 3.0]])
    probs = OneHot.of(logits, 0.01).probs
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-6)
    expected = 0.99 * jax.nn.softmax(logits) + 0.01 / 4
    np.testing.assert_allclose(probs, expected, rtol=1e-6)
    assert probs.min() >= 0.0025 * 0.999


def test_one_hot_draws_have_the_right_frequencies():
    distribution = OneHot.of(jnp.asarray([0.0, 1.0, -1.0, 2.0]), 0.01)
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (200_000, 4)), distribution)
    samples = many.draw(jax.random.key(0))
    assert set(np.unique(samples)) == {0.0, 1.0}
    np.testing.assert_array_equal(samples.sum(-1), 1.0)
    frequency = samples.mean(0)
    sigma = np.sqrt(distribution.probs * (1 - distribution.probs) / 200_000)
    assert np.all(np.abs(frequency - distribution.probs) < 5 * sigma)


def test_draws_of_different_variables_are_independent():
    fair = OneHot.of(jnp.zeros((100_000, 2, 2)))
    first = fair.draw(jax.random.key(1))[..., 0]
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.02


def test_a_sampler_gives_every_name_its_own_draw():
    sampler, fair = KeySampler(jax.random.key(0)), OneHot.of(jnp.zeros((1000, 2)))
    assert np.array_equal(sampler("a", fair), sampler("a", fair))
    assert not np.array_equal(sampler("a", fair), sampler("b", fair))


def test_keys_derived_beforehand_draw_the_same():
    keys, policy = jax.random.split(jax.random.key(3), 5), OneHot.of(jnp.zeros((40, 6)))
    of_rounds = NamedKeys.of_rounds(keys, "action", "prior")
    for index, key in enumerate(keys):
        beforehand = NamedKeys(jax.tree.map(lambda x, i=index: x[i], of_rounds))
        for name in ("action", "prior"):
            chex.assert_trees_all_equal(beforehand(name, policy), KeySampler(key)(name, policy))


def test_straight_through_is_the_sample_with_the_gradient_of_the_probabilities():
    logits, weights = jnp.asarray([0.3, -0.2, 1.0]), jnp.asarray([1.0, 2.0, 5.0])
    sample = jnp.asarray([0.0, 1.0, 0.0])

    def through(logits):
        return jnp.sum(OneHot.of(logits, 0.01).straight_through(sample) * weights)

    def probabilities(logits):
        return jnp.sum(OneHot.of(logits, 0.01).probs * weights)

    assert through(logits) == pytest.approx(2.0)
    np.testing.assert_allclose(jax.grad(through)(logits), jax.grad(probabilities)(logits), rtol=1e-6)


def test_kl_and_entropy_against_sums():
    rng = np.random.default_rng(0)
    p = OneHot.of(jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), 0.01)
    q = OneHot.of(jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), 0.01)
    pp, qq = np.asarray(p.probs, np.float64), np.asarray(q.probs, np.float64)
    np.testing.assert_allclose(p.kl(q), np.sum(pp * np.log(pp / qq), -1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(p.entropy(), -np.sum(pp * np.log(pp), -1), rtol=1e-5)
    np.testing.assert_allclose(p.kl(p), 0.0, atol=1e-7)


def test_kl_refuses_to_broadcast():
    p, q = OneHot.of(jnp.zeros((6, 5))), OneHot.of(jnp.zeros((1, 5)))
    with pytest.raises(AssertionError):
        p.kl(q)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e8, 1e8, width=32))
def test_two_hot_splits_between_the_two_nearest_bins(value):
    bins = np.linspace(-20, 20, 255)
    target = float(symlog(jnp.float32(value)))
    upper = int(np.clip(np.searchsorted(bins, target), 1, 254))
    share = np.clip((target - bins[upper - 1]) / (bins[upper] - bins[upper - 1]), 0, 1)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=255), jnp.float32)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = (1 - share) * log_probs[upper - 1] + share * log_probs[upper]
    assert float(SymlogTwoHot(logits).log_prob(jnp.float32(value))) == pytest.approx(expected, abs=2e-3)


def test_two_hot_mean_of_a_certain_bin_and_of_zero_logits():
    assert float(SymlogTwoHot(jnp.zeros(255)).mean()) == pytest.approx(0.0, abs=1e-4)
    certain = jnp.full(255, -1e9).at[200].set(0.0)
    assert float(SymlogTwoHot(certain).mean()) == pytest.approx(
        float(symexp(jnp.linspace(-20, 20, 255)[200])), rel=1e-4
    )


@pytest.mark.parametrize("value", [-7.3, 0.0, 0.4, 123.0])
def test_two_hot_loss_is_least_where_the_mean_is_the_target(value):
    """At the optimum the probabilities are the two-hot weights: no gradient, and the mean is the target."""
    position = (float(symlog(jnp.float32(value))) + 20) / 40 * 254
    weights = np.maximum(0.0, 1.0 - np.abs(position - np.arange(255)))
    logits = jnp.log(jnp.asarray(weights, jnp.float32) + 1e-12)
    gradient = jax.grad(lambda x: SymlogTwoHot(x).log_prob(jnp.float32(value)))(logits)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-4)
    assert float(SymlogTwoHot(logits).mean()) == pytest.approx(value, rel=1e-3, abs=1e-3)


def test_bounded_normal_against_closed_form():
    raw = jnp.asarray([[0.3, -2.0, 0.1, 5.0]])
    policy = BoundedNormal.of(raw)
    mean, std = np.tanh([0.3, -2.0]), 0.9 / (1 + np.exp(-(np.array([0.1, 5.0]) + 2))) + 0.1
    np.testing.assert_allclose(policy.mean[0], mean, rtol=1e-6)
    np.testing.assert_allclose(policy.std[0], std, rtol=1e-6)
    x = np.array([0.5, -1.5])
    density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(policy.log_prob(jnp.asarray(x)[None])[0], np.log(density).sum(), rtol=1e-5)
    np.testing.assert_allclose(policy.entropy()[0], np.log(std * np.sqrt(2 * np.pi * np.e)).sum(), rtol=1e-5)


def test_bernoulli_is_stable_and_right():
    logit = jnp.asarray([-200.0, -1.0, 0.5, 200.0])
    np.testing.assert_allclose(Bernoulli(logit).log_prob(jnp.ones(4)), jax.nn.log_sigmoid(logit), rtol=1e-6)
    np.testing.assert_allclose(Bernoulli(logit).log_prob(jnp.zeros(4)), jax.nn.log_sigmoid(-logit), rtol=1e-6)
    np.testing.assert_array_equal(Bernoulli(logit).mode(), [0, 0, 1, 1])
