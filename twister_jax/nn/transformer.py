"""A transformer over steps: post-norm blocks, relative positions, a window of `context` earlier steps.

The same weights are used in two ways: over a whole training window at once, and one step at a time with a
rolling key/value cache (acting and imagination). The tests hold the two against each other.
"""

import chex
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from twister_jax.nn.attention import NO_DROPOUT, Dropout, float32_einsum, relative_shift, sinusoids
from twister_jax.nn.kernels import few_products
from twister_jax.nn.layers import add_bias, layer_norm, pytorch_linear

KeysValues = tuple[
    tuple[Float[Array, "batch time hidden"], ...], tuple[Float[Array, "batch time hidden"], ...]
]
"""Keys and values that every block computed over a training window."""


@struct.dataclass
class KeyValueCache:
    """Rolling cache: keys and values of the last positions of each sequence, per block.

    It has context + 1 slots, so that a new position overwrites the one that has just left the context. All
    sequences advance together: position p is in slot p mod (context + 1). Slots come after the heads, as the
    products of attention want them; in another order XLA copies the cache at every step.
    """

    keys: tuple[Float[Array, "sequence head slot size"], ...]
    values: tuple[Float[Array, "sequence head slot size"], ...]
    visible: Bool[Array, "sequence slot"]
    position: Int[Array, ""]
    """Position of the next step."""


def attention_mask(is_first: Bool[Array, "batch time"], context: int) -> Bool[Array, "batch time time"]:
    """Which keys j a query i sees: i − context ≤ j ≤ i, and none before the last `is_first` up to i."""
    length = is_first.shape[1]
    episode = jnp.cumsum(is_first, axis=1)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    near = (distance >= 0) & (distance <= context)
    return near & (episode[:, :, None] == episode[:, None, :])


class Block(nnx.Module):
    """x = LN(x + drop(attention(x))); x = LN(x + drop(W2·relu(W1·x))).

    Attention scores are those of Transformer-XL (Dai et al. 2019, arXiv:1901.02860, section 3.3): with biases
    u and v, (q + u)·k + (q + v)·W_p·r_d for a key at distance d.
    """

    def __init__(self, hidden: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = heads
        self.query_key_value = pytorch_linear(hidden, 3 * hidden, dtype=dtype, rngs=rngs)
        self.output = pytorch_linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.position = pytorch_linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.u = nnx.Param(jnp.zeros(hidden))
        self.v = nnx.Param(jnp.zeros(hidden))
        self.attention_norm = layer_norm(hidden, 1e-6, dtype=dtype, rngs=rngs)
        self.expand = pytorch_linear(hidden, 2 * hidden, dtype=dtype, rngs=rngs)
        self.contract = pytorch_linear(2 * hidden, hidden, dtype=dtype, rngs=rngs)
        self.feedforward_norm = layer_norm(hidden, 1e-6, dtype=dtype, rngs=rngs)

    def split(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch head size"]:
        """Each head's part of the features."""
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    def position_keys(self, context: int) -> Float[Array, "distance head size"]:
        """W_p·r_d for d = 0…context. They depend on the distance alone: the same for every query."""
        hidden = self.u.shape[0]
        return self.split(self.position(sinusoids(context + 1, hidden)))

    def _finish(self, x: Array, attended: Array, dropout: Dropout) -> Array:
        x = self.attention_norm(x + dropout(self.output(attended)))
        return self.feedforward_norm(x + dropout(self.contract(jax.nn.relu(self.expand(x)))))

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        mask: Bool[Array, "batch time time"],
        context: int,
        dropout: Dropout,
    ) -> tuple[Array, Array, Array]:
        """Whole windows. Returns the output and this block's keys and values, all [batch, time, hidden]."""
        query, key, value = jnp.split(self.query_key_value(x), 3, axis=-1)
        content = self.split(add_bias(query, self.u[...]))
        position = self.split(add_bias(query, self.v[...]))
        scores = float32_einsum("bihd,bjhd->bhij", content, self.split(key))
        by_distance = float32_einsum("bihd,rhd->bhir", position, self.position_keys(context))
        scores = scores + relative_shift(by_distance, first=0, stride=1, keys=x.shape[1])
        scores = scores * (x.shape[-1] // self.heads) ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
        weights = dropout(weights).astype(value.dtype)
        attended = jnp.einsum("bhij,bjhd->bihd", weights, self.split(value))
        return self._finish(x, attended.reshape(x.shape), dropout), key, value

    def step(
        self,
        x: Float[Array, "sequence hidden"],
        keys: Float[Array, "sequence head slot size"],
        values: Float[Array, "sequence head slot size"],
        visible: Bool[Array, "sequence slot"],
        slot: Int[Array, ""],
        by_slot: Float[Array, "head slot size"],
    ) -> tuple[Array, Array, Array]:
        """One position of every sequence. Returns the output and the cache's new keys and values.

        `slot` is overwritten and `visible` already includes it; `by_slot` are the position keys of the
        slots' distances.
        """
        query, key, value = jnp.split(self.query_key_value(x), 3, axis=-1)
        keys = _put(keys, self.split(key), slot)
        values = _put(values, self.split(value), slot)
        content = self.split(add_bias(query, self.u[...]))
        position = self.split(add_bias(query, self.v[...]))
        scores = float32_einsum("nhd,nhsd->nhs", content, keys) + few_products(
            "nhd,hsd->nhs", position, by_slot
        )
        scores = scores * keys.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf)).astype(values.dtype)
        attended = jnp.einsum("nhs,nhsd->nhd", weights, values)
        return self._finish(x, attended.reshape(x.shape), NO_DROPOUT), keys, values


def _put(
    slots: Float[Array, "sequence head slot size"],
    new: Float[Array, "sequence head size"],
    slot: Int[Array, ""],
) -> Float[Array, "sequence head slot size"]:
    return jax.lax.dynamic_update_index_in_dim(slots, new.astype(slots.dtype), slot, axis=2)


class Transformer(nnx.Module):
    """A stack of blocks without a final norm.

    Args:
      hidden: width of inputs and outputs.
      blocks: their number.
      heads: attention heads per block.
      context: earlier positions that a position sees, besides itself.
      dropout: rate on attention weights, attention output and feed-forward output.
      dtype: of matrix products.
      rngs: for the initial weights.
    """

    def __init__(
        self,
        hidden: int,
        blocks: int,
        heads: int,
        context: int,
        dropout: float,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.hidden = hidden
        self.context = context
        self.dropout = dropout
        self.dtype = dtype
        self.blocks = nnx.List([Block(hidden, heads, dtype=dtype, rngs=rngs) for _ in range(blocks)])

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        is_first: Bool[Array, "batch time"],
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch time hidden"], KeysValues]:
        """Whole windows with nothing before them. Dropout is on where a key is given.

        Returns the output, and the keys and the values of every block.
        """
        batch, length = is_first.shape
        mask = attention_mask(is_first, self.context)
        # Of a block: its attention weights, attention output and feed-forward output.
        sizes = [length * (block.heads * length + 2 * self.hidden) for block in self.blocks]
        dropout = Dropout(self.dropout, dropout_key, batch, sum(sizes))
        keys, values = [], []
        for block in self.blocks:
            x, key, value = block(x, mask, self.context, dropout)
            keys.append(key)
            values.append(value)
        return x, (tuple(keys), tuple(values))

    def empty_cache(self, sequences: int) -> KeyValueCache:
        """A cache in which nothing is visible yet."""
        slots = self.context + 1
        shapes = [(sequences, block.heads, slots, self.hidden // block.heads) for block in self.blocks]
        empty = tuple(jnp.zeros(shape, self.dtype) for shape in shapes)
        return KeyValueCache(
            keys=empty,
            values=empty,
            visible=jnp.zeros((sequences, slots), bool),
            position=jnp.zeros((), jnp.int32),
        )

    def window_caches(self, keys_values: KeysValues, is_first: Bool[Array, "batch time"]) -> KeyValueCache:
        """A cache for every position of a training pass, holding it and the context − 1 positions before.

        Resets are treated differently from the training pass, as published (Burchi and Timofte 2025,
        arXiv:2503.04416): a key p is visible from start t only if no position in p…t is first, so a reset
        position's own key is hidden, while the training pass lets later positions see it.

        Args:
          keys_values: from `__call__`.
          is_first: what `__call__` was given.

        Returns:
          The cache of batch · time sequences, batch-major; their next position is `context`.
        """
        context = self.context
        batch, length = is_first.shape

        def windows(
            block: Block, x: Float[Array, "batch time hidden"]
        ) -> Float[Array, "sequence head slot size"]:
            padded = jnp.pad(x, [(0, 0), (context - 1, 0), (0, 0)])
            slots = [padded[:, offset : offset + length] for offset in range(context)] + [jnp.zeros_like(x)]
            caches = jnp.stack([block.split(slot) for slot in slots], axis=3)
            return caches.reshape(batch * length, *caches.shape[2:])

        # Key p = t − n is visible when the newest first step at or before t lies before p.
        steps = jnp.arange(length)
        newest_first = jax.lax.cummax(jnp.where(is_first, steps, -1), axis=1)
        slots = [(steps - n >= 0) & (steps - n > newest_first) for n in range(context - 1, -1, -1)] + [
            jnp.zeros((batch, length), bool)
        ]
        return KeyValueCache(
            keys=tuple(map(windows, self.blocks, keys_values[0])),
            values=tuple(map(windows, self.blocks, keys_values[1])),
            visible=jnp.stack(slots, axis=-1).reshape(batch * length, context + 1),
            position=jnp.asarray(context, jnp.int32),
        )

    def position_table(self) -> Float[Array, "block head two_slots size"]:
        """Every block's position keys for `step`: row j is of distance −j mod (context + 1).

        Twice the slots, so that at every step the keys of the slots' distances are one contiguous slice.
        """
        slots = self.context + 1
        distances = -jnp.arange(2 * slots) % slots
        keys = jnp.stack([block.position_keys(self.context)[distances] for block in self.blocks])
        return jnp.moveaxis(keys, 2, 1)

    def step(
        self,
        x: Float[Array, "sequence hidden"],
        cache: KeyValueCache,
        position_table: Float[Array, "block head two_slots size"],
    ) -> tuple[Float[Array, "sequence hidden"], KeyValueCache]:
        """The next position of every sequence, which sees what is visible in the cache, and itself."""
        slots = self.context + 1
        chex.assert_shape(x, (cache.visible.shape[0], self.hidden))
        chex.assert_shape(position_table, (len(self.blocks), None, 2 * slots, None))
        slot = cache.position % slots
        by_slot = jax.lax.dynamic_slice_in_dim(position_table, slots - slot, slots, axis=2)
        visible = jax.lax.dynamic_update_index_in_dim(
            cache.visible, jnp.ones_like(cache.visible[:, 0]), slot, axis=1
        )
        keys, values = [], []
        for index, block in enumerate(self.blocks):
            x, key, value = block.step(
                x, cache.keys[index], cache.values[index], visible, slot, by_slot[index]
            )
            keys.append(key)
            values.append(value)
        return x, KeyValueCache(tuple(keys), tuple(values), visible, cache.position + 1)
