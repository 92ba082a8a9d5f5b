"""Flax modules used functionally: the structure is split off once, parameters are merged in on use."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

Params = Any
"""A nested dictionary of arrays."""

MOST_KEYS = 256
"""Keys that one network can draw."""


class Keys(nnx.Rngs):
    """Gives modules the keys that `nnx.Rngs(key)` would, fold_in(key, 0) and so on, computed all at once.

    `nnx.Rngs` computes one at a time and counts on the device, which takes longer to trace than all the rest.
    """

    def __init__(self, key: PRNGKeyArray):
        self._keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(MOST_KEYS, dtype=jnp.uint32))
        self._given = 0

    def params(self) -> PRNGKeyArray:
        """The next key."""
        assert self._given < MOST_KEYS, "a network draws more parameters than there are keys"
        self._given += 1
        return self._keys[self._given - 1]


class Networks:
    """The structure of an agent's networks, by name; `merge` gives one of them its parameters.

    Args:
      makers: for every network a function that builds it, given `rngs`.
    """

    def __init__(self, makers: Mapping[str, Callable[..., nnx.Module]]):
        self._makers = dict(makers)
        self._structures = {
            name: nnx.split(nnx.eval_shape(lambda make=make: make(rngs=Keys(jax.random.key(0)))))[0]
            for name, make in self._makers.items()
        }

    def init(self, key: PRNGKeyArray) -> dict[str, Params]:
        """Fresh parameters of every network."""
        keys = jax.random.split(key, len(self._makers))
        return {
            name: nnx.to_pure_dict(nnx.split(make(rngs=Keys(k)))[1])
            for (name, make), k in zip(self._makers.items(), keys, strict=True)
        }

    def merge(self, name: str, params: Params) -> Any:
        """The network with these parameters."""
        return nnx.merge(self._structures[name], params)
