"""TWISTER's transformer: post-norm blocks, relative positions, a window of `context` earlier positions.

The same weights are used in two ways: over a whole training window at once, and one step at a time with a
ring of cached keys and values (acting and imagination). The tests hold the two against each other.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from twister_jax.nn.layers import add_bias, layer_norm, pytorch_linear

KeysValues = tuple[
    tuple[Float[Array, "batch time hidden"], ...], tuple[Float[Array, "batch time hidden"], ...]
]
"""Keys and values that every block computed over a training window."""


@struct.dataclass
class Ring:
    """Cached keys and values of the last positions of each sequence, per block.

    The ring has context + 1 slots, so that a new position overwrites the one that has just left the
    context. All sequences advance together: position p lives in slot p mod (context + 1). Slots come after
    the heads, as the products of attention want them; in another order XLA copies the ring at every step.
    """

    keys: tuple[Float[Array, "sequence head slot size"], ...]
    values: tuple[Float[Array, "sequence head slot size"], ...]
    visible: Bool[Array, "sequence slot"]
    position: Int[Array, ""]
    """Position that the next step takes."""


def sinusoids(distances: int, features: int) -> Float[Array, "distances features"]:
    """r_d: sin on even and cos on odd channels of d / 10000^(2k/features) (Vaswani et al. 2017)."""
    rates = 10000.0 ** (-jnp.arange(0, features, 2) / features)
    angles = jnp.arange(distances)[:, None] * rates
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(distances, features)


def by_distance_to_by_key(
    scores: Float[Array, "*batch query distance"],
) -> Float[Array, "*batch query key"]:
    """Turns scores per distance d = 0…C into scores per key j = i − d; elsewhere what it holds is arbitrary.

    The relative shift of Transformer-XL (Dai et al. 2019, appendix B): pad each row and read the memory
    with rows one shorter, which needs no gather.
    """
    *batch, length, distances = scores.shape
    width = length + distances
    padded = jnp.pad(scores[..., ::-1], [(0, 0)] * (scores.ndim - 1) + [(0, length)])
    flat = padded.reshape(*batch, length * width)[..., : length * (width - 1)]
    return flat.reshape(*batch, length, width - 1)[..., distances - 1 :]


def attention_mask(is_first: Bool[Array, "batch time"], context: int) -> Bool[Array, "batch time time"]:
    """Which keys j a query i sees: i − context ≤ j ≤ i, and not before the newest `is_first` up to i."""
    length = is_first.shape[1]
    episode = jnp.cumsum(is_first, axis=1)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    near = (distance >= 0) & (distance <= context)
    return near & (episode[:, :, None] == episode[:, None, :])


def _float32_einsum(equation: str, *factors: Array) -> Array:
    """An einsum of factors in any precision, summed in float32."""
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)


def place_scores(
    place: Float[Array, "sequence head size"],
    by_slot: Float[Array, "head slot size"],
    form: Literal["product", "sum"] | None = None,
) -> Float[Array, "sequence head slot"]:
    """The part of a step's scores that depends on distances: the same keys for all sequences.

    A product of matrices, on a GPU written as a sum: a kernel of its own would cost more there than its
    arithmetic, and the sum is made by the kernel that adds it to the other part. `form` is for tests.
    """
    if form is None:
        form = "sum" if jax.default_backend() == "gpu" else "product"
    if form == "product":
        return _float32_einsum("nhd,hsd->nhs", place, by_slot)
    return jnp.sum(place.astype(jnp.float32)[:, :, None] * by_slot.astype(jnp.float32), axis=-1)


class Dropout:
    """Inverted dropout with a key of its own at every call; the identity without a key or at rate 0."""

    def __init__(self, rate: float, key: PRNGKeyArray | None):
        self._rate = rate
        self._key = key
        self._calls = 0

    def __call__(self, x: Array) -> Array:
        if self._key is None or self._rate == 0.0:
            return x
        key = jax.random.fold_in(self._key, self._calls)
        self._calls += 1
        keep = jax.random.bernoulli(key, 1.0 - self._rate, x.shape)
        return jnp.where(keep, x / (1.0 - self._rate), 0.0).astype(x.dtype)


class Block(nnx.Module):
    """x = LN(x + drop(attention(x))); x = LN(x + drop(W2·relu(W1·x)))."""

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
        """The heads' shares of features."""
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    def position_keys(self, context: int) -> Float[Array, "distance head size"]:
        """W_p·r_d for d = 0…context. They depend on the distance alone: computed once, used everywhere."""
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
        """Whole windows. Returns the output, and this block's keys and values, all [batch, time, hidden]."""
        query, key, value = jnp.split(self.query_key_value(x), 3, axis=-1)
        content = self.split(add_bias(query, self.u[...]))
        place = self.split(add_bias(query, self.v[...]))
        scores = _float32_einsum("bihd,bjhd->bhij", content, self.split(key))
        by_distance = _float32_einsum("bihd,rhd->bhir", place, self.position_keys(context))
        scores = scores + by_distance_to_by_key(by_distance)
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
        """One position of every sequence; `visible` already holds the new slot. Returns x, keys, values.

        `by_slot` are the position keys of the distances that the slots have.
        """
        query, key, value = jnp.split(self.query_key_value(x), 3, axis=-1)
        keys = _put(keys, self.split(key), slot)
        values = _put(values, self.split(value), slot)
        content = self.split(add_bias(query, self.u[...]))
        place = self.split(add_bias(query, self.v[...]))
        scores = _float32_einsum("nhd,nhsd->nhs", content, keys) + place_scores(place, by_slot)
        scores = scores * keys.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf)).astype(values.dtype)
        attended = jnp.einsum("nhs,nhsd->nhd", weights, values)
        return self._finish(x, attended.reshape(x.shape), Dropout(0.0, None)), keys, values


def _put(
    ring: Float[Array, "sequence head slot size"],
    new: Float[Array, "sequence head size"],
    slot: Int[Array, ""],
) -> Float[Array, "sequence head slot size"]:
    """The ring with one slot overwritten."""
    return jax.lax.dynamic_update_index_in_dim(ring, new.astype(ring.dtype), slot, axis=2)


class Transformer(nnx.Module):
    """A stack of blocks without a final norm."""

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
        """Whole windows, nothing before them. Dropout is on where a key is given.

        Returns the output, and the keys and the values of every block.
        """
        mask = attention_mask(is_first, self.context)
        dropout = Dropout(self.dropout, dropout_key)
        keys, values = [], []
        for block in self.blocks:
            x, key, value = block(x, mask, self.context, dropout)
            keys.append(key)
            values.append(value)
        return x, (tuple(keys), tuple(values))

    def empty_ring(self, sequences: int) -> Ring:
        """A ring in which nothing is visible yet."""
        slots = self.context + 1
        shapes = [(sequences, block.heads, slots, self.hidden // block.heads) for block in self.blocks]
        empty = tuple(jnp.zeros(shape, self.dtype) for shape in shapes)
        return Ring(
            keys=empty,
            values=empty,
            visible=jnp.zeros((sequences, slots), bool),
            position=jnp.zeros((), jnp.int32),
        )

    def rings_of_windows(
        self,
        cache: KeysValues,
        is_first: Bool[Array, "batch time"],
    ) -> Ring:
        """A ring for every position of a training pass, holding it and the context − 1 positions before.

        The published asymmetry of imagination is kept: a key p is visible from start t only if no position in
        p…t is first, so a reset position's own key is hidden, while the training pass lets later positions
        see it. Sequences are the batch · time positions, batch-major; their next position is `context`.
        """
        context = self.context
        batch, length = is_first.shape

        def windows(
            block: Block, x: Float[Array, "batch time hidden"]
        ) -> Float[Array, "sequence head slot size"]:
            padded = jnp.pad(x, [(0, 0), (context - 1, 0), (0, 0)])
            slots = [padded[:, offset : offset + length] for offset in range(context)] + [jnp.zeros_like(x)]
            rings = jnp.stack([block.split(slot) for slot in slots], axis=3)
            return rings.reshape(batch * length, *rings.shape[2:])

        # Key p = t − n is visible when the newest first step at or before t lies before p.
        steps = jnp.arange(length)
        newest_first = jax.lax.cummax(jnp.where(is_first, steps, -1), axis=1)
        slots = [(steps - n >= 0) & (steps - n > newest_first) for n in range(context - 1, -1, -1)] + [
            jnp.zeros((batch, length), bool)
        ]
        return Ring(
            keys=tuple(map(windows, self.blocks, cache[0])),
            values=tuple(map(windows, self.blocks, cache[1])),
            visible=jnp.stack(slots, axis=-1).reshape(batch * length, context + 1),
            position=jnp.asarray(context, jnp.int32),
        )

    def position_table(self) -> Float[Array, "block head two_slots size"]:
        """Every block's position keys as `step` wants them: row j is of distance −j mod (context + 1).

        However far the ring has turned, the keys of its slots' distances lie one after another.
        """
        slots = self.context + 1
        distances = -jnp.arange(2 * slots) % slots
        keys = jnp.stack([block.position_keys(self.context)[distances] for block in self.blocks])
        return jnp.moveaxis(keys, 2, 1)

    def step(
        self,
        x: Float[Array, "sequence hidden"],
        ring: Ring,
        position_table: Float[Array, "block head two_slots size"],
    ) -> tuple[Float[Array, "sequence hidden"], Ring]:
        """The next position of every sequence: sees what is visible in the ring, and itself."""
        slots = self.context + 1
        chex.assert_shape(x, (ring.visible.shape[0], self.hidden))
        chex.assert_shape(position_table, (len(self.blocks), None, 2 * slots, None))
        slot = ring.position % slots
        by_slot = jax.lax.dynamic_slice_in_dim(position_table, slots - slot, slots, axis=2)
        visible = jax.lax.dynamic_update_index_in_dim(
            ring.visible, jnp.ones_like(ring.visible[:, 0]), slot, axis=1
        )
        keys, values = [], []
        for index, block in enumerate(self.blocks):
            x, key, value = block.step(x, ring.keys[index], ring.values[index], visible, slot, by_slot[index])
            keys.append(key)
            values.append(value)
        return x, Ring(tuple(keys), tuple(values), visible, ring.position + 1)
