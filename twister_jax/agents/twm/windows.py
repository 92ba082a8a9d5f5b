"""From the replay's stream of steps to TWM's observations and transitions.

The replay stores, at every step n, the single grey frame x_n and what led to it: a_n, r_n, whether the game
ended with it. A reset frame is a step of its own, with `is_first`. An episode of k actions is thus k + 1
steps, and the step after its last belongs to the next episode:

    step        0        1    2    3        4        5    …
    frame       reset    x    x    last     reset    x
    led to by   -        a_1  a_2  a_3      -        a_5
    is_first    1        0    0    0        1        0

TWM reads a stream of observations o_t at which actions were taken, and transitions (o_t, a_t, r_t, d_t)
between neighbours. No action is taken at an episode's last frame, so that frame is no observation: it is
dropped, as the published code does, and what led to it ends the transition from the frame before:

    observation   0              1              2                          4
    transition    a_1 r_1 d=0    a_2 r_2 d=0    a_3 r_3 d=1 (an end)       a_5 r_5 …

d_t says that o_t was its episode's last observation; o_{t+1} is then the next episode's reset frame. It is
either terminated (discount label 0) or truncated, cut by the time limit (label 0.99). The next-latent loss
skips both, and attention looks across neither.

An observation is the newest `frame_stack` frames, oldest first, of its own episode; where the episode is
younger, its reset frame is repeated.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from twister_jax.replay import store
from twister_jax.replay.store import Replay


class Windows(NamedTuple):
    """Consecutive observations of TWM's, one more than transitions."""

    frames: UInt8[Array, "batch step_plus_1 height width stack"]
    action: Float[Array, "batch step action"]
    """Taken at each observation, one-hot."""
    reward: Float[Array, "batch step"]
    """Came of it; tanh of the game's reward."""
    terminated: Bool[Array, "batch step"]
    """The game (or a life) ended with it."""
    truncated: Bool[Array, "batch step"]
    """The time limit ended the episode with it."""

    @property
    def last(self) -> Bool[Array, "batch step"]:
        """Whether each observation was its episode's last."""
        return self.terminated | self.truncated

    def discount(self, discount: float) -> Float[Array, "batch step"]:
        """Label of the discount head: 0 where the game ended, also when a time limit did not."""
        return jnp.where(self.terminated, 0.0, discount)


def is_observation(replay: Replay) -> Bool[Array, "stream capacity"]:
    """Which steps, counted from the oldest, are observations of TWM's: not an episode's last frame.

    Of the newest step it is not known yet whether the time limit cut the episode there; it counts as an
    observation unless it is terminal, and can only be a window's last one.
    """
    is_first = store.in_order(replay, replay.is_first)
    terminal = store.in_order(replay, replay.terminal)
    steps = jnp.arange(replay.capacity)
    ends = jnp.where(steps == replay.size - 1, terminal, jnp.roll(is_first, -1, axis=1))
    return (steps < replay.size) & ~ends


def valid_starts(replay: Replay, observations: int) -> Bool[Array, "stream capacity"]:
    """Which steps a window of `observations` can start at: those followed by enough observations."""
    kept = is_observation(replay)
    # Every episode has an observation for its last frame, so the newest 2·observations steps hold enough.
    reach = min(2 * observations, replay.capacity)
    newest = jnp.maximum(replay.size - 1 - jnp.arange(reach), 0)
    enough = jnp.cumsum(kept[:, newest] & (jnp.arange(reach) < replay.size), axis=1) >= observations
    steps = jnp.arange(replay.capacity)
    back = jnp.clip(replay.size - 1 - steps, 0, reach - 1)
    return kept & jnp.take_along_axis(enough, jnp.broadcast_to(back, kept.shape), axis=1)


def stack_frames(
    replay: Replay, stream: Int[Array, "*batch"], step: Int[Array, "*batch"], stack: int
) -> UInt8[Array, "*batch height width stack"]:
    """Observations at steps counted from the oldest: the frame and those before it in its episode."""
    newest_first = [step]
    for _ in range(stack - 1):
        here = newest_first[-1]
        stay = replay.is_first[stream, store.slot_of(replay, here)] | (here == 0)
        newest_first.append(jnp.where(stay, here, here - 1))
    steps = jnp.stack(newest_first[::-1], axis=-1)
    height, width, _ = replay.image_shape
    frames = replay.frames[stream[..., None], store.slot_of(replay, steps)]
    return jnp.moveaxis(frames.reshape(*steps.shape, height, width), -3, -1)


def gather_windows(
    replay: Replay, stream: Int[Array, " batch"], start: Int[Array, " batch"], observations: int, stack: int
) -> Windows:
    """Windows of this many observations, from steps that are `valid_starts`."""
    raw = jnp.minimum(start[:, None] + jnp.arange(2 * observations), replay.size - 1)
    kept = is_observation(replay)[stream[:, None], raw]
    # The first `observations` of them, in order.
    chosen = jnp.argsort(~kept, axis=1, stable=True)[:, :observations]
    steps = jnp.take_along_axis(raw, chosen, axis=1)
    frames = stack_frames(replay, jnp.broadcast_to(stream[:, None], steps.shape), steps, stack)

    outcome = (stream[:, None], store.slot_of(replay, steps[:, :-1] + 1))
    terminated = replay.terminal[outcome]
    skipped = steps[:, 1:] - steps[:, :-1] > 1
    return Windows(
        frames=frames,
        action=replay.action[outcome],
        reward=jnp.tanh(replay.reward[outcome]),
        terminated=terminated,
        truncated=skipped & ~terminated,
    )


def sample_balanced(
    replay: Replay, key: PRNGKeyArray, batch_size: int, observations: int, stack: int, temperature: float
) -> tuple[Windows, Replay]:
    """Windows drawn less often the more often they were before (section 3.1); counts the draws."""
    allowed = valid_starts(replay, observations)
    stream, start, replay = store.draw_balanced(replay, key, batch_size, allowed, temperature)
    return gather_windows(replay, stream, start, observations, stack), replay


def sample_uniform(
    replay: Replay, key: PRNGKeyArray, batch_size: int, observations: int, stack: int
) -> Windows:
    """Windows drawn uniformly without replacement, and not counted."""
    stream, start = store.draw_uniform(key, batch_size, valid_starts(replay, observations))
    return gather_windows(replay, stream, start, observations, stack)


def sample_frames(
    replay: Replay, key: PRNGKeyArray, count: int, stack: int
) -> UInt8[Array, "count height width stack"]:
    """Single observations, uniformly without replacement."""
    stream, step = store.draw_uniform(key, count, is_observation(replay))
    return stack_frames(replay, stream, step, stack)
