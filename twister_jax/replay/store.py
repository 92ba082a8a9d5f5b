"""The replay store: circular, on the device, inserted in place, windows drawn inside the compiled update.

Every environment has a stream of its own; all streams advance together, so one cursor serves all. Frames
are kept as flat uint8 rows, because a trailing axis of 3 channels would be padded to 128 on a TPU.
"""

import dataclasses
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8


class Transition(NamedTuple):
    """One stored step of each environment: `action` led to `image`, and `reward` came with it.

    A reset step has `is_first`, a zero action and zero reward. Actions are one-hot, or in [−1, 1].
    """

    image: UInt8[Array, "*batch height width channel"]
    action: Float[Array, "*batch action"]
    reward: Float[Array, "*batch"]
    terminal: Bool[Array, "*batch"]
    is_first: Bool[Array, "*batch"]


@struct.dataclass
class Replay:
    """All stored steps. Donate it to whatever returns a new one, so that it is updated in place."""

    frames: UInt8[Array, "stream capacity pixel"]
    action: Float[Array, "stream capacity action"]
    reward: Float[Array, "stream capacity"]
    terminal: Bool[Array, "stream capacity"]
    is_first: Bool[Array, "stream capacity"]
    visits: Int[Array, "stream capacity"]
    """How often a window starting here was drawn; only balanced sampling looks at it."""
    inserted: Int[Array, ""]
    """Steps ever inserted into each stream; the next goes to slot `inserted % capacity`."""
    image_shape: tuple[int, int, int] = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """Steps each stream can hold."""
        return self.frames.shape[1]

    @property
    def size(self) -> Int[Array, ""]:
        """Steps each stream holds now."""
        return jnp.minimum(self.inserted, self.capacity)


def init(streams: int, capacity: int, image_shape: tuple[int, int, int], num_actions: int) -> Replay:
    """An empty store of `capacity` steps for each of `streams` environments."""
    rows = (streams, capacity)
    return Replay(
        frames=jnp.zeros((*rows, math.prod(image_shape)), jnp.uint8),
        action=jnp.zeros((*rows, num_actions), jnp.float32),
        reward=jnp.zeros(rows, jnp.float32),
        terminal=jnp.zeros(rows, bool),
        is_first=jnp.zeros(rows, bool),
        visits=jnp.zeros(rows, jnp.int32),
        inserted=jnp.zeros((), jnp.int32),
        image_shape=image_shape,
    )


def insert(replay: Replay, step: Transition) -> Replay:
    """Appends one step to every stream, over the oldest one when full.

    `step` has one leading axis, the stream. Actions are stored as the environments took them, clipped to
    [−1, 1]; that of a reset step as zeros, whatever is given.
    """
    streams = replay.frames.shape[0]
    chex.assert_shape(step.image, (streams, *replay.image_shape))
    chex.assert_shape(step.action, (streams, replay.action.shape[-1]))
    chex.assert_shape([step.reward, step.terminal, step.is_first], (streams,))
    slot = replay.inserted % replay.capacity

    def put(rows: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, value[:, None].astype(rows.dtype), slot, axis=1)

    return dataclasses.replace(
        replay,
        frames=put(replay.frames, step.image.reshape(streams, -1)),
        action=put(replay.action, jnp.where(step.is_first[:, None], 0.0, jnp.clip(step.action, -1.0, 1.0))),
        reward=put(replay.reward, step.reward),
        terminal=put(replay.terminal, step.terminal),
        is_first=put(replay.is_first, step.is_first),
        visits=put(replay.visits, jnp.zeros(streams, jnp.int32)),
        inserted=replay.inserted + 1,
    )


def slot_of(replay: Replay, step: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
    """The slot of a step that is counted from the oldest one held."""
    oldest = jnp.where(replay.inserted > replay.capacity, replay.inserted % replay.capacity, 0)
    return (oldest + step) % replay.capacity


def in_order(replay: Replay, rows: Array) -> Array:
    """`rows` [stream, capacity, ...] of the store, oldest step first; unused slots come last."""
    return jnp.roll(rows, -slot_of(replay, jnp.zeros((), jnp.int32)), axis=1)


def gather(
    replay: Replay, stream: Int[Array, " batch"], start: Int[Array, " batch"], length: int
) -> Transition:
    """Windows of `length` consecutive steps; `start` counts from the oldest step a stream holds.

    Returns leaves shaped [batch, length, ...].
    """
    slots = slot_of(replay, start[:, None] + jnp.arange(length))
    index = (stream[:, None], slots)
    return Transition(
        image=replay.frames[index].reshape(*slots.shape, *replay.image_shape),
        action=replay.action[index],
        reward=replay.reward[index],
        terminal=replay.terminal[index],
        is_first=replay.is_first[index],
    )


def sample(replay: Replay, key: PRNGKeyArray, batch_size: int, length: int) -> Transition:
    """`batch_size` windows of `length` steps, uniform over all start positions of all streams.

    Each stream must hold at least `length` steps. No window crosses the write head: windows run from the
    oldest step a stream holds to its newest.
    """
    key_stream, key_start = jax.random.split(key)
    stream = jax.random.randint(key_stream, (batch_size,), 0, replay.frames.shape[0])
    start = jax.random.randint(key_start, (batch_size,), 0, replay.size - length + 1)
    return gather(replay, stream, start, length)


def draw_uniform(
    key: PRNGKeyArray, count: int, allowed: Bool[Array, "stream capacity"]
) -> tuple[Int[Array, " count"], Int[Array, " count"]]:
    """Draws `count` different allowed steps uniformly; at least that many must be allowed.

    Returns:
      streams, and steps counted from the oldest.
    """
    return _draw(key, count, jnp.where(allowed, 0.0, -jnp.inf))


def draw_balanced(
    replay: Replay, key: PRNGKeyArray, count: int, allowed: Bool[Array, "stream capacity"], temperature: float
) -> tuple[Int[Array, " count"], Int[Array, " count"], Replay]:
    """Draws steps without replacement with probabilities softmax(−visits / temperature), and counts them.

    Robine et al. 2023, section 3.1: steps that came in late were drawn less often, and make up for it.

    Args:
      replay: the store, whose `visits` say how often each step was drawn before.
      key: of the draw.
      count: how many to draw; at least so many must be allowed.
      allowed: steps that may be drawn, counted from the oldest.
      temperature: in visits; the lower, the more evenly steps are visited.

    Returns:
      streams, steps counted from the oldest, and the store with its visits counted.
    """
    chex.assert_equal_shape([allowed, replay.visits])
    logits = -in_order(replay, replay.visits) / temperature
    stream, step = _draw(key, count, jnp.where(allowed, logits, -jnp.inf))
    visits = replay.visits.at[stream, slot_of(replay, step)].add(1)
    return stream, step, dataclasses.replace(replay, visits=visits)


def _draw(
    key: PRNGKeyArray, count: int, logits: Float[Array, "stream capacity"]
) -> tuple[Int[Array, " count"], Int[Array, " count"]]:
    """Sampling without replacement: the largest logits after Gumbel noise (Kool et al. 2019).

    JAX's generator counts the numbers of an array from its first one on. With the steps as the leading axis,
    the noise of a step, and which of two equal ones comes first, do not depend on the capacity.
    """
    noisy = logits.T + jax.random.gumbel(key, logits.T.shape)
    _, place = jax.lax.top_k(noisy.reshape(-1), count)
    step, stream = jnp.divmod(place, logits.shape[0])
    return stream, step
