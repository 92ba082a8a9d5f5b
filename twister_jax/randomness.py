"""Random keys folded from (seed, purpose, step): a restart draws what an undisturbed run would have.

And draws of many numbers. They are those of `jax.random`, number for number, but drawn flat: over several
axes XLA's CPU backend takes up to a hundred times as long to compile the generator.
"""

import enum
import math
from functools import partial

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray


class Purpose(enum.IntEnum):
    """What a key is for. The numbers are part of a run's identity: never reuse or reorder them."""

    INIT = 0
    ACT = 1
    UPDATE = 2
    PREFILL = 3
    PRETRAIN = 4
    REPORT = 5
    EVALUATE = 6
    ENVIRONMENT = 7
    EVALUATION_ENVIRONMENT = 8


@partial(jax.jit, static_argnums=1)
def _fold(seed, purpose, step):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def key_for(seed: int, purpose: Purpose, step: int = 0) -> PRNGKeyArray:
    """The key of one draw: the same three numbers always give the same key."""
    return _fold(np.uint32(seed), int(purpose), np.uint32(step))


def generator_for(seed: int, purpose: Purpose, step: int = 0) -> np.random.Generator:
    """The same on the host."""
    return np.random.default_rng([seed, int(purpose), step])


def uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], minval: ArrayLike = 0.0, maxval: ArrayLike = 1.0
) -> Float[Array, "..."]:
    """`jax.random.uniform` with scalar bounds."""
    return jax.random.uniform(key, (math.prod(shape),), minval=minval, maxval=maxval).reshape(shape)


def truncated_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`jax.random.truncated_normal` between -2 and 2."""
    return jax.random.truncated_normal(key, -2.0, 2.0, (math.prod(shape),)).reshape(shape)
