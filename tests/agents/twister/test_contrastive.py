"""Contrastive predictive coding against one head after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twister_jax.agents.twister.contrastive import ContrastiveHeads, info_nce, step_weights

BATCH, LENGTH, FEATURES, LATENT, ACTIONS, STEPS, SIZE = 2, 5, 7, 6, 3, 4, 8


@pytest.fixture(scope="module")
def heads():
    return ContrastiveHeads(FEATURES, LATENT, ACTIONS, STEPS, SIZE, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_stacked_heads_against_one_after_another(heads):
    features = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, FEATURES))
    actions = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, ACTIONS))
    latent = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, LATENT))
    queries, keys = heads.queries(features, actions), heads.keys(latent)
    for k in range(STEPS):
        kernel = jnp.concatenate([heads.query_features[k], heads.query_actions[k, :k].reshape(-1, SIZE)])
        for t in range(LENGTH - k):
            ahead = [actions[:, t + j] for j in range(1, k + 1)]
            x = jnp.concatenate([features[:, t], *ahead], axis=-1)
            x = jax.nn.elu(x @ kernel + heads.query_bias[k])
            x = jax.nn.elu(x @ heads.query_output[k] + heads.query_output_bias[k])
            np.testing.assert_allclose(queries[k, :, t], x, rtol=1e-5, atol=1e-6)
        x = jax.nn.elu(latent @ heads.key_latent[k] + heads.key_bias[k])
        x = jax.nn.elu(x @ heads.key_output[k] + heads.key_output_bias[k])
        np.testing.assert_allclose(keys[k], x, rtol=1e-5, atol=1e-6)


def test_weights_of_actions_that_a_head_does_not_read_get_no_gradient(heads):
    structure, params = nnx.split(heads)
    features = jnp.ones((BATCH, LENGTH, FEATURES))
    actions = jnp.ones((BATCH, LENGTH, ACTIONS))

    def loss(params):
        return jnp.sum(nnx.merge(structure, params).queries(features, actions) ** 2)

    gradient = jax.grad(loss)(params)["query_actions"][...]
    for k in range(STEPS):
        np.testing.assert_array_equal(gradient[k, k:], 0.0)
        assert k == 0 or np.all(np.abs(gradient[k, :k]).sum((1, 2)) > 0)


def test_one_step_needs_no_actions():
    heads = ContrastiveHeads(FEATURES, LATENT, ACTIONS, 1, SIZE, dtype=jnp.float32, rngs=nnx.Rngs(0))
    queries = heads.queries(jnp.ones((BATCH, LENGTH, FEATURES)), jnp.ones((BATCH, LENGTH, ACTIONS)))
    assert queries.shape == (1, BATCH, LENGTH, SIZE)
    assert np.all(np.isfinite(queries))


def slow_info_nce(queries, keys):
    losses, accuracies = [], []
    for k in range(queries.shape[0]):
        length = queries.shape[2]
        q = queries[k, :, : length - k].reshape(-1, queries.shape[-1])
        v = keys[k, :, k:].reshape(-1, queries.shape[-1])
        logits = q @ v.T
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-np.mean(np.diag(logp)))
        accuracies.append(np.mean(logits.argmax(-1) == np.arange(len(q))))
    return losses, accuracies


def test_info_nce_against_one_step_after_another():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(STEPS, BATCH, LENGTH, SIZE)).astype(np.float32)
    keys = rng.normal(size=(STEPS, BATCH, LENGTH, SIZE)).astype(np.float32)
    losses, accuracies = info_nce(jnp.asarray(queries), jnp.asarray(keys))
    expected_losses, expected_accuracies = slow_info_nce(queries, keys)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(accuracies, expected_accuracies, rtol=1e-6)


def test_info_nce_gradient_is_finite_and_ignores_what_has_no_target():
    rng = np.random.default_rng(1)
    queries = jnp.asarray(rng.normal(size=(STEPS, BATCH, LENGTH, SIZE)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(STEPS, BATCH, LENGTH, SIZE)), jnp.float32)
    to_queries, to_keys = jax.grad(lambda q, k: jnp.sum(info_nce(q, k)[0]), argnums=(0, 1))(queries, keys)
    assert np.all(np.isfinite(to_queries))
    assert np.all(np.isfinite(to_keys))
    for k in range(1, STEPS):
        np.testing.assert_array_equal(to_queries[k, :, LENGTH - k :], 0.0)
        np.testing.assert_array_equal(to_keys[k, :, :k], 0.0)


def test_perfect_keys_are_found_and_weights_sum_to_one():
    eye = jnp.eye(BATCH * LENGTH).reshape(1, BATCH, LENGTH, -1) * 50
    loss, accuracy = info_nce(eye, eye)
    assert loss[0] < 1e-6
    assert accuracy[0] == 1.0
    weights = step_weights(10, 0.75)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights[1:] / weights[:-1], 0.75, rtol=1e-5)
