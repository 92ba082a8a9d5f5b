"""Parts of attention that the transformers share: encodings, relative shift, dropout and exact sums."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt16


def sinusoids(distances: int, features: int) -> Float[Array, "distance features"]:
    """Encodings r_d of distances d = 0, 1, ... (Vaswani et al. 2017, arXiv:1706.03762).

    sin(d / 10000^(2k/features)) on channel 2k, and the cosine of the same angle on channel 2k + 1.
    """
    rates = 10000.0 ** (-jnp.arange(0, features, 2) / features)
    angles = jnp.arange(distances)[:, None] * rates
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(distances, features)


def relative_shift(
    scores: Float[Array, "*batch query distance"], first: int, stride: int, keys: int
) -> Float[Array, "*batch query key"]:
    """Turns scores per distance 0, 1, ... into scores per key position 0 ... keys - 1.

    The relative shift of Transformer-XL (Dai et al. 2019, arXiv:1901.02860, appendix B): each row is padded
    and the memory is read with rows `stride` shorter, which takes no gather. Entries of keys that come after
    the query, or are further away than there are distances, are arbitrary: mask them.

    Args:
      scores: entry [..., n, d] belongs to the nth query and a key at distance d before it.
      first: position of the first query, less than the number of distances and of keys.
      stride: positions from one query to the next.
      keys: number of key positions.
    """
    *batch, queries, distances = scores.shape
    assert first < min(distances, keys)
    start = distances - 1 - first
    width = start + keys + stride
    padded = jnp.pad(scores[..., ::-1], [(0, 0)] * (scores.ndim - 1) + [(0, width - distances)])
    flat = padded.reshape(*batch, queries * width)[..., : queries * (width - stride)]
    return flat.reshape(*batch, queries, width - stride)[..., start:]


class Dropout:
    """Inverted dropout. All masks are cut from one draw: each random generator costs time to compile.

    Args:
      rate: probability that a number is dropped, resolved to 2^-16.
      key: None switches dropout off.
      batch: sequences. Each has a row of the draw, so that devices that share a batch draw each their own.
      size: how many numbers of each sequence all calls together are given.
    """

    def __init__(self, rate: float, key: PRNGKeyArray | None, batch: int, size: int):
        self._rate = rate
        self._bits = None if key is None or rate == 0.0 else jax.random.bits(key, (batch, size), jnp.uint16)
        self._used = 0

    def __call__(self, x: Float[Array, "batch *shape"]) -> Float[Array, "batch *shape"]:
        """Drops some of the numbers of every sequence."""
        if self._bits is None:
            return x
        chex.assert_axis_dimension(x, 0, self._bits.shape[0])
        return self._drop(x, self._next(x[0].size))

    def of_all(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Drops some of the numbers that all sequences share."""
        return x if self._bits is None else self._drop(x, self._next(x.size)[0])

    def _next(self, size: int) -> UInt16[Array, "batch size"]:
        assert self._bits is not None
        self._used += size
        return self._bits[:, self._used - size : self._used]

    def _drop(self, x: Array, bits: Array) -> Array:
        keep = bits.reshape(x.shape) >= round(self._rate * 2**16)
        return jnp.where(keep, x / (1.0 - self._rate), 0.0).astype(x.dtype)


NO_DROPOUT = Dropout(0.0, None, 0, 0)


def float32_einsum(equation: str, *factors: Array) -> Array:
    """An einsum of factors in any precision, summed and returned in float32."""
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)
