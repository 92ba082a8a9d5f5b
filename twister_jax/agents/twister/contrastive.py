"""Action-conditioned contrastive predictive coding (Burchi and Timofte 2025, section 3.3).

For every k, a query made of the prior features at t and the actions t+1 … t+k has to find, among all encoded
augmented views of the batch, the one at t + k. The K pairs of heads are computed together.
"""

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from twister_jax.nn.layers import add_bias, uniform_fan_in


class ContrastiveHeads(nnx.Module):
    """For each k two MLPs, linear → ELU → linear → ELU, with their weights stacked along k.

    The first query layer reads features and actions with separate weights: head k reads k actions, and the
    rows of `query_actions` beyond them are masked wherever they are used, so their gradient is zero. With
    `actions` 0, and where there is but one head, no action is read and there are no such weights.
    """

    def __init__(
        self,
        features: int,
        latent: int,
        actions: int,
        steps: int,
        size: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.steps = steps

        def stacked(shape: tuple[int, ...], fan_in: list[int]) -> nnx.Param:
            heads = [uniform_fan_in(n)(rngs.params(), shape) for n in fan_in]
            return nnx.Param(jnp.stack(heads))

        query_fans = [features + k * actions for k in range(steps)]
        same = [size] * steps
        self.query_features = stacked((features, size), query_fans)
        self.reads_actions = actions > 0 and steps > 1
        if self.reads_actions:
            actions_kernel = stacked(((steps - 1), actions, size), query_fans)[...]
            self.query_actions = nnx.Param(actions_kernel * self._action_mask())
        self.query_bias = stacked((size,), query_fans)
        self.query_output = stacked((size, size), same)
        self.query_output_bias = stacked((size,), same)
        self.key_latent = stacked((latent, size), [latent] * steps)
        self.key_bias = stacked((size,), [latent] * steps)
        self.key_output = stacked((size, size), same)
        self.key_output_bias = stacked((size,), same)

    def _action_mask(self) -> Bool[Array, "step ahead 1 1"]:
        """Head k reads the action a_{t+1+j} only for j < k."""
        return jnp.arange(self.steps - 1)[None, :, None, None] < jnp.arange(self.steps)[:, None, None, None]

    def queries(
        self, features: Float[Array, "batch time feature"], actions: Float[Array, "batch time action"]
    ) -> Float[Array, "step batch time size"]:
        """Query of every k at every t; those with t + k beyond the window are meaningless."""
        rest = (self.query_bias, self.query_output, self.query_output_bias)
        if not self.reads_actions:
            return self._of_one_input(features, self.query_features, *rest)
        length, width = features.shape[1:]
        padded = jnp.pad(actions, [(0, 0), (0, self.steps), (0, 0)])
        positions = 1 + jnp.arange(length)[:, None] + jnp.arange(self.steps - 1)
        rows = features.reshape(-1, width).astype(self.dtype)
        ahead = padded[:, positions].reshape(rows.shape[0], -1).astype(self.dtype)

        def query(features_kernel: Array, actions_kernel: Array, *rest: Array) -> Array:
            actions_kernel = actions_kernel.reshape(ahead.shape[1], features_kernel.shape[1])
            hidden = rows @ features_kernel.astype(self.dtype) + ahead @ actions_kernel.astype(self.dtype)
            return self._finish(hidden, *rest).reshape(*features.shape[:2], -1)

        actions_kernels = self.query_actions[...] * self._action_mask()
        return jax.vmap(query)(self.query_features[...], actions_kernels, *(param[...] for param in rest))

    def keys(self, latent: Float[Array, "batch time latent"]) -> Float[Array, "step batch time size"]:
        """Key of every k for the latent of every position."""
        rest = (self.key_bias, self.key_output, self.key_output_bias)
        return self._of_one_input(latent, self.key_latent, *rest)

    def _of_one_input(
        self, inputs: Float[Array, "batch time width"], kernel: nnx.Param, *rest: nnx.Param
    ) -> Float[Array, "step batch time size"]:
        """Every k's head of inputs that all heads share."""
        rows = inputs.reshape(-1, inputs.shape[-1]).astype(self.dtype)

        def head(kernel: Array, *rest: Array) -> Array:
            return self._finish(rows @ kernel.astype(self.dtype), *rest).reshape(*inputs.shape[:2], -1)

        return jax.vmap(head)(kernel[...], *(param[...] for param in rest))

    def _finish(self, hidden: Array, bias: Array, output: Array, output_bias: Array) -> Array:
        """One head from its first product on: bias, ELU, linear, ELU."""
        hidden = jax.nn.elu(add_bias(hidden, bias))
        return jax.nn.elu(add_bias(hidden @ output.astype(self.dtype), output_bias))


def info_nce(
    queries: Float[Array, "step batch time size"], keys: Float[Array, "step batch time size"]
) -> tuple[Float[Array, " step"], Float[Array, " step"]]:
    """InfoNCE loss and top-1 accuracy of every k.

    Mean over the B·(L−k) queries that have a target of −log softmax over as many keys (van den Oord et al.
    2018, eq. 4), plain dot products; the positive of (b, t) is (b, t + k).
    """
    chex.assert_equal_shape([queries, keys])
    steps, batch, length, size = queries.shape
    shifted = jnp.stack([jnp.roll(keys[k], -k, axis=1) for k in range(steps)])
    valid = jnp.arange(length)[None, :] + jnp.arange(steps)[:, None] < length
    valid = jnp.broadcast_to(valid[:, None], (steps, batch, length)).reshape(steps, batch * length)
    flat_queries = queries.reshape(steps, batch * length, size)
    flat_keys = shifted.reshape(steps, batch * length, size)
    logits = jnp.einsum("kns,kms->knm", flat_queries, flat_keys, preferred_element_type=jnp.float32)
    logits = jnp.where(valid[:, None, :], logits, -jnp.inf)
    positive = jnp.sum(flat_queries.astype(jnp.float32) * flat_keys.astype(jnp.float32), axis=-1)
    gap = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - positive, 0.0)
    count = jnp.sum(valid, axis=1)
    # The diagonal and not `positive`: the same product rounded differently would lose to itself.
    logits = jax.lax.stop_gradient(logits)
    diagonal = jnp.max(jnp.where(jnp.eye(batch * length, dtype=bool), logits, -jnp.inf), axis=-1)
    correct = valid & (diagonal >= jnp.max(logits, axis=-1))
    return jnp.sum(gap, axis=1) / count, jnp.sum(correct, axis=1) / count


def step_weights(steps: int, decay: float) -> Float[Array, " step"]:
    """w_k = decay^k / Σ_j decay^j."""
    weights = decay ** jnp.arange(steps)
    return weights / jnp.sum(weights)
