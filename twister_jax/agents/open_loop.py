"""What a world model makes of recorded steps, and what it predicts from the actions alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8
from PIL import Image, ImageDraw

from twister_jax.agents.base import Dream, Glimpse, State
from twister_jax.replay import store
from twister_jax.replay.store import Replay, Transition

CONTEXT = 8
"""Steps that the model sees before it has to go on alone."""
COLUMNS = 16
"""Steps of a picture."""
ROWS = ("truth", "reconstruction", "imagination", "difference")
_LABEL_WIDTH = 92


class OpenLoop(NamedTuple):
    """Glimpses [batch, time] of recorded windows."""

    seen: Glimpse
    """With every step seen."""
    foreseen: Glimpse
    """The same for the context; from there on given the actions alone."""
    known: Bool[Array, "batch time"]
    """Steps of the episode that the context ended in: what comes after cannot be foreseen."""


def open_loop(dream: Dream, state: State, windows: Transition, context: int, key: PRNGKeyArray) -> OpenLoop:
    """Runs a world model on whole windows, and again on their first `context` steps only.

    Args:
      dream: the world model.
      state: of its agent.
      windows: recorded steps [batch, time, ...]; the first is treated as an episode's first.
      context: steps seen.
      key: of the latents drawn.
    """
    batch, length = windows.is_first.shape
    windows = windows._replace(is_first=windows.is_first.at[:, 0].set(True))

    def step(minds, inputs):
        seen, foreseen = minds
        time, here, key = inputs
        key_seen, key_foreseen = jax.random.split(key)
        alone = dream.imagine(state, foreseen, here.action, key_foreseen)
        seen = dream.observe(state, seen, here, key_seen)
        foreseen = jax.tree.map(lambda a, b: jnp.where(time < context, a, b), seen, alone)
        return (seen, foreseen), (dream.look(state, seen), dream.look(state, foreseen))

    nothing = dream.begin(state, batch)
    over_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), windows)
    inputs = (jnp.arange(length), over_time, jax.random.split(key, length))
    _, glimpses = jax.lax.scan(step, (nothing, nothing), inputs)
    seen, foreseen = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), glimpses)
    after = jnp.arange(length) >= context
    return OpenLoop(seen, foreseen, jnp.cumsum(windows.is_first & after, axis=1) == 0)


def open_loop_picture(
    dream: Dream, state: State, replay: Replay, key: PRNGKeyArray, stored: int
) -> UInt8[Array, "picture_height picture_width 3"]:
    """Four windows of the replay over time, in rows with their names; a line parts what was seen.

    `stored` is the number of steps that every stream holds at least.
    """
    columns = min(COLUMNS, stored)
    context = min(CONTEXT, columns // 2)
    key_window, key_draw = jax.random.split(key)
    windows = store.sample(replay, key_window, 4, columns)
    images = windows.image / 255.0
    found = open_loop(dream, state, windows, context, key_draw)
    difference = 0.5 + 0.5 * (found.foreseen.image - images)
    rows = jnp.stack([images, found.seen.image, found.foreseen.image, difference], axis=1)
    picture = tile(rows.reshape(-1, *rows.shape[2:]))
    height, size = picture.shape[0], images.shape[2]
    line = jnp.arange(picture.shape[1])[:, None] // 2 == context * size // 2
    picture = jnp.where(line, jnp.array([255, 80, 80], jnp.uint8), picture)
    labels = np.concatenate([label(ROWS[row % len(ROWS)], size) for row in range(height // size)])
    return jnp.concatenate([labels, picture], axis=1)


def tile(
    images: Float[Array, "row column height width channel"],
) -> UInt8[Array, "picture_height picture_width 3"]:
    """One picture of a grid of images in [0, 1]; grey ones become RGB."""
    rows, columns, height, width, channels = images.shape
    grid = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    grid = jnp.clip(grid * 255.0, 0, 255).astype(jnp.uint8)
    return jnp.broadcast_to(grid, (*grid.shape[:2], 3))


def label(text: str, height: int) -> UInt8[np.ndarray, "height width 3"]:
    """A row's name, to stand left of it."""
    image = Image.new("RGB", (_LABEL_WIDTH, height), "white")
    ImageDraw.Draw(image).text((4, height // 2), text, fill="black", anchor="lm")
    return np.asarray(image)
