"""TWM's dynamics model: a Transformer-XL over latents, actions and rewards (section 2.2).

Every step t is three tokens, z_t, a_t, r_t, and what happens next is read at the action token: the next
latent, the reward and the discount. A sequence ends in an action, so it has 3t − 1 tokens.

The same weights are used in two ways: over whole windows (training), and a step at a time with a memory
(imagination). Transformer-XL keeps the layer inputs of earlier tokens in its memory, without gradient;
as the weights do not change during a rollout, keeping the keys and values computed from them gives the
same numbers and saves computing them again at every step.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from twister_jax.agents.base import Losses
from twister_jax.agents.twm.config import TwmModelConfig
from twister_jax.agents.twm.mlp import Mlp
from twister_jax.nn.attention import NO_DROPOUT, Dropout, relative_shift, sinusoids
from twister_jax.nn.distributions import Bernoulli, OneHot
from twister_jax.nn.kernels import few_products
from twister_jax.nn.layers import Linear, add_bias, layer_norm, logits_init, uniform_fan_in

TOKENS_PER_STEP = 3
_ACTION = 1  # index of the action token in a step
_MULTIPLE = 8  # of tokens: matrices of other sizes are padded on NVIDIA hardware


class Predictions(NamedTuple):
    """What is read at action tokens."""

    latent: OneHot
    """Next latent, [*batch, group, class]."""
    reward: Float[Array, "*batch"]
    """Mean of a unit Gaussian."""
    discount: Bernoulli
    """The mean is the predicted discount."""


@struct.dataclass
class Memory:
    """Keys and values of all tokens of a rollout so far, per layer; rows not yet written are never seen."""

    keys: tuple[Float[Array, "sequence head token size"], ...]
    values: tuple[Float[Array, "sequence head token size"], ...]


def visible(
    query: Int[Array, " query"], key: Int[Array, " key"], episode: Int[Array, "batch step"], memory_steps: int
) -> Bool[Array, "batch query key"]:
    """Which key tokens a query token sees.

    Never later ones, never another episode's, and of the earlier ones those that a Transformer-XL memory of
    `memory_steps` steps still holds: latent and action tokens see 3·(memory_steps + 1) tokens back, reward
    tokens to the latent of the step `memory_steps` before theirs.

    Args:
      query: positions of the query tokens in the sequence.
      key: positions of the key tokens.
      episode: a number per step that differs between episodes.
      memory_steps: steps that the memory holds.
    """
    distance = query[:, None] - key
    reach = TOKENS_PER_STEP * (memory_steps + 1) - (query % TOKENS_PER_STEP == TOKENS_PER_STEP - 1)
    near = (distance >= 0) & (distance <= reach[:, None])
    of_query = episode[:, query // TOKENS_PER_STEP]
    of_key = episode[:, key // TOKENS_PER_STEP]
    return near & (of_query[:, :, None] == of_key[:, None, :])


class Block(nnx.Module):
    """Post-norm block: x = LN(x + drop(attention)); x = LN(x + drop(W2·drop(silu(W1·x))))."""

    def __init__(self, config: TwmModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, heads = config.hidden_size, config.attention_heads * config.head_size
        self.heads = config.attention_heads
        self.scale = hidden**-0.5

        def linear(features_in: int, features_out: int, use_bias: bool) -> Linear:
            init = uniform_fan_in(features_in)
            return Linear(
                features_in,
                features_out,
                use_bias=use_bias,
                kernel_init=init,
                bias_init=init,
                dtype=dtype,
                rngs=rngs,
            )

        self.query_key_value = linear(hidden, 3 * heads, use_bias=False)
        self.position = linear(hidden, heads, use_bias=False)
        self.output = linear(heads, hidden, use_bias=False)
        self.attention_norm = layer_norm(hidden, 1e-5, dtype=dtype, rngs=rngs)
        self.expand = linear(hidden, config.feedforward_size, use_bias=True)
        self.contract = linear(config.feedforward_size, hidden, use_bias=True)
        self.feedforward_norm = layer_norm(hidden, 1e-5, dtype=dtype, rngs=rngs)

    def split(self, x: Float[Array, "*batch time heads"]) -> Float[Array, "*batch head time size"]:
        """Heads apart, before time."""
        return jnp.moveaxis(x.reshape(*x.shape[:-1], self.heads, -1), -2, -3)

    def finish(
        self,
        x: Float[Array, "batch time hidden"],
        attended: Float[Array, "batch head time size"],
        dropout: Dropout,
    ) -> Float[Array, "batch time hidden"]:
        """Everything after the attention."""
        joined = jnp.moveaxis(attended, -3, -2).reshape(*x.shape[:-1], -1)
        x = self.attention_norm(x + dropout(self.output(joined)))
        inner = dropout(jax.nn.silu(self.expand(x)))
        return self.feedforward_norm(x + dropout(self.contract(inner)))

    def attend(
        self,
        content: Float[Array, "batch head query key"],
        position: Float[Array, "batch head query key"],
        value: Float[Array, "batch head key size"],
        seen: Bool[Array, "batch query key"],
        dropout: Dropout,
    ) -> Float[Array, "batch head query size"]:
        """Softmax of content and position scores over the keys that are seen, in float32."""
        chex.assert_equal_shape([content, position])
        scores = (content + position).astype(jnp.float32) * self.scale
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
        weights = dropout(weights).astype(value.dtype)
        # A step of imagination has few queries, a window many.
        product = few_products if weights.shape[-2] <= TOKENS_PER_STEP else jnp.einsum
        return product("bhqk,bhks->bhqs", weights, value).astype(value.dtype)


class Dynamics(nnx.Module):
    """Token embeddings, transformer and heads."""

    def __init__(
        self, config: TwmModelConfig, num_actions: int, discount: float, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        hidden = config.hidden_size
        self.config = config
        self.dtype = dtype
        self.embed_latent = Mlp([config.latent_size, hidden], after=True, dtype=dtype, rngs=rngs)
        self.embed_action = nnx.Param(jax.random.normal(rngs.params(), (num_actions, hidden)))
        self.embed_reward = Mlp([1, hidden], after=True, dtype=dtype, rngs=rngs)
        bias_init = logits_init
        shape = (config.attention_heads, config.head_size)
        self.content_bias = nnx.Param(bias_init(rngs.params(), shape))
        self.position_bias = nnx.Param(bias_init(rngs.params(), shape))
        self.blocks = nnx.List(
            [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.transformer_layers)]
        )

        def head(hidden_widths: tuple[int, ...], outputs: int, bias: float = 0.0) -> Mlp:
            return Mlp(
                [hidden, *hidden_widths, outputs], before=True, output_bias=bias, dtype=dtype, rngs=rngs
            )

        self.latent_head = head(config.latent_head, config.latent_size)
        self.reward_head = head(config.reward_head, 1)
        self.discount_head = head(config.discount_head, 1, discount)

    def hidden_states(
        self,
        latent: Float[Array, "batch step latent"],
        action: Float[Array, "batch step action"],
        reward: Float[Array, "batch step_before_last"],
        last: Bool[Array, "batch step_before_last"],
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "batch step hidden"]:
        """Hidden states h at every action token of whole windows (eq. 2).

        Args:
          latent: z_t.
          action: a_t, one-hot, taken at z_t.
          reward: r_t, which came of it; not of the window's last step.
          last: whether step t was its episode's last.
          dropout_key: None switches dropout off.
        """
        config = self.config
        batch, steps = latent.shape[:2]
        chex.assert_shape([reward, last], (batch, steps - 1))
        chex.assert_shape(action, (batch, steps, self.embed_action.shape[0]))
        tokens = [*self._embed(latent, action), self._embed_reward(jnp.pad(reward, ((0, 0), (0, 1))))]
        x = jnp.stack(tokens, axis=2).reshape(batch, -1, config.hidden_size)[:, :-1]
        length = x.shape[1]

        episode = jnp.pad(jnp.cumsum(last, axis=1), ((0, 0), (1, 0)))
        positions = jnp.arange(length)
        seen = visible(positions, positions, episode, config.memory_steps)
        per_token = config.attention_heads * length + 2 * config.hidden_size + config.feedforward_size
        size = length * (config.hidden_size + len(self.blocks) * per_token)
        dropout = Dropout(config.dropout, dropout_key, batch, size)
        encodings = dropout.of_all(sinusoids(length, config.hidden_size))

        for block in self.blocks[:-1]:
            x = self._block(block, x, slice(None), seen, encodings, dropout)
        # Predictions are read at action tokens only, so the last block computes nothing else.
        return self._block(
            self.blocks[-1], x, slice(_ACTION, None, TOKENS_PER_STEP), seen, encodings, dropout
        )

    def _block(self, block: Block, x, queries: slice, seen, encodings, dropout: Dropout):
        length = x.shape[1]
        first, _, stride = queries.indices(length)
        query, key, value = jnp.split(block.query_key_value(x), 3, axis=-1)
        query, key, value = block.split(query[:, queries]), block.split(key), block.split(value)
        by_distance = jnp.einsum(
            "bhqs,hds->bhqd", self._biased(query, self.position_bias), block.split(block.position(encodings))
        )
        attended = block.attend(
            jnp.einsum("bhqs,bhks->bhqk", self._biased(query, self.content_bias), key),
            relative_shift(by_distance, first, stride, length),
            value,
            seen[:, queries],
            dropout,
        )
        return block.finish(x[:, queries], attended, dropout)

    def _biased(self, query: Float[Array, "batch head query size"], bias: nnx.Param):
        return add_bias(query, bias[...][:, None])

    def _embed(self, latent, action):
        embedding = self.embed_action[...].astype(self.dtype)
        batch = "nt"[: action.ndim - 1]
        embedded = few_products(f"{batch}a,ah->{batch}h", action.astype(self.dtype), embedding)
        return self.embed_latent(latent), embedded.astype(self.dtype)

    def _embed_reward(self, reward):
        return self.embed_reward(reward[..., None])

    def predict(
        self, hidden: Float[Array, "*batch hidden"], dropout_key: PRNGKeyArray | None = None
    ) -> Predictions:
        """Next latent, reward and discount (eq. 3)."""
        config = self.config
        widths = sum(config.latent_head + config.reward_head + config.discount_head)
        dropout = Dropout(config.dropout, dropout_key, len(hidden), math.prod(hidden.shape[1:-1]) * widths)
        shape = (*hidden.shape[:-1], config.stoch_groups, config.stoch_classes)
        return Predictions(
            latent=OneHot.of(self.latent_head(hidden, dropout).reshape(shape)),
            reward=self.reward_head(hidden, dropout)[..., 0],
            discount=Bernoulli(self.discount_head(hidden, dropout)[..., 0]),
        )

    def position_keys(self, tokens: int) -> Float[Array, "block head distance size"]:
        """Every block's W_p·r_d for d = 0…tokens − 1: they depend on distance alone, so once per rollout."""
        encodings = sinusoids(tokens, self.config.hidden_size)
        return jnp.stack([block.split(block.position(encodings)) for block in self.blocks])

    def empty_memory(self, sequences: int, steps: int) -> Memory:
        """Room for `steps` steps, the last without its reward, rounded up to what GPUs multiply by.

        Nothing sees what is there beyond the steps; left out, XLA would add it to every layer in every step.
        """
        tokens = _MULTIPLE * math.ceil((TOKENS_PER_STEP * steps - 1) / _MULTIPLE)
        shape = (sequences, self.config.attention_heads, tokens, self.config.head_size)
        empty = tuple(jnp.zeros(shape, self.dtype) for _ in self.blocks)
        return Memory(empty, empty)

    def step(
        self,
        memory: Memory,
        position_keys: Float[Array, "block head distance size"],
        step: Int[Array, ""] | int,
        reward_before: Float[Array, " sequence"] | None,
        latent: Float[Array, "sequence latent"],
        action: Float[Array, "sequence action"],
        episode: Int[Array, "sequence step"],
    ) -> tuple[Float[Array, "sequence hidden"], Memory]:
        """Hidden state h after (z, a) of one step, and the reward before it, if any (no dropout).

        Args:
          memory: what the steps before left.
          position_keys: from `position_keys`.
          step: index of this step.
          reward_before: r_{step−1}.
          latent: z_step.
          action: a_step.
          episode: number of the episode of each step up to this one.
        """
        tokens = list(self._embed(latent, action))
        if reward_before is not None:
            tokens.insert(0, self._embed_reward(reward_before))
        x = jnp.stack(tokens, axis=1)
        positions = TOKENS_PER_STEP * step + _ACTION - jnp.arange(len(tokens))[::-1]
        rows = jnp.arange(memory.keys[0].shape[2])
        seen = visible(positions, rows, episode, self.config.memory_steps)
        # Of all blocks at once: on a GPU each gather is a kernel.
        by_distance = position_keys[:, :, jnp.maximum(positions[:, None] - rows, 0)]

        keys, values = [], []
        for index, block in enumerate(self.blocks):
            query, key, value = (
                block.split(part) for part in jnp.split(block.query_key_value(x), 3, axis=-1)
            )
            key = _write(memory.keys[index], key, positions[0])
            value = _write(memory.values[index], value, positions[0])
            keys.append(key)
            values.append(value)
            # The last block computes what is read, the action token.
            queries = 1 if index == len(self.blocks) - 1 else len(tokens)
            query, x, seen_here = query[:, :, -queries:], x[:, -queries:], seen[:, -queries:]
            position = few_products(
                "nhqs,hqks->nhqk", self._biased(query, self.position_bias), by_distance[index][:, -queries:]
            )
            content = few_products("nhqs,nhks->nhqk", self._biased(query, self.content_bias), key)
            attended = block.attend(content, position, value, seen_here, NO_DROPOUT)
            x = block.finish(x, attended, NO_DROPOUT)
        return x[:, 0], Memory(tuple(keys), tuple(values))


def _write(rows: Array, new: Array, first: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, new.astype(rows.dtype), first, axis=2)


def dynamics_losses(
    predictions: Predictions,
    next_latent: OneHot,
    reward: Float[Array, "batch step"],
    discount: Float[Array, "batch step"],
    last: Bool[Array, "batch step"],
) -> Losses:
    """All terms of the dynamics model's loss (eq. 5), unscaled.

    Args:
      predictions: at each step's action token.
      next_latent: posterior of the observation after each step; no gradient.
      reward: what came of each step.
      discount: label of the discount, 0 where the step was terminal.
      last: steps that were an episode's last: the observation after them belongs to the next one.
    """
    chex.assert_equal_shape([predictions.reward, reward, discount, last])
    target = jax.lax.stop_gradient(next_latent.probs)
    chex.assert_equal_shape([target, predictions.latent.logits])
    cross_entropy = -jnp.sum(target * predictions.latent.logits, axis=(-2, -1))
    weight = 1.0 - last
    normal = 0.5 * (reward - predictions.reward) ** 2 + 0.5 * jnp.log(2 * jnp.pi)
    return {
        "latent": jnp.sum(weight * cross_entropy) / jnp.maximum(jnp.sum(weight), 1.0),
        "reward": jnp.mean(normal),
        "discount": -jnp.mean(predictions.discount.log_prob(discount)),
    }
