"""What the spaces of gymnasium mean here: where the picture is, and what actions are."""

from collections.abc import Callable
from typing import Any

import numpy as np

from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean
from twister_jax.files import one_line

_SMALLEST_PICTURE = 32  # pixels; what is smaller is a board of symbols, as MiniGrid's 7x7x3


def find_picture(env: Any, key: str, game: str) -> tuple[Callable[[Any], Any] | None, str]:
    """How to read the picture from an observation, or None where it has to be rendered; and that in words.

    Raises:
      UserError: there is none, or no such entry, or several.
    """
    import gymnasium

    space = env.observation_space
    entries = dict(space.items()) if isinstance(space, gymnasium.spaces.Dict) else {}
    if key:
        if key not in entries:
            known = f"one of {', '.join(entries)}" if entries else "its observations are no dictionary"
            raise UserError(f"env.image_key = {key}: no entry of {game}{did_you_mean(key, entries)}; {known}")
        return lambda observation: observation[key], f"observation {key}"
    if _is_picture(space):
        return lambda observation: observation, "observation"
    pictures = [name for name, entry in entries.items() if _is_picture(entry)]
    if len(pictures) > 1:
        raise UserError(f"{game} has several pictures: choose with --env.image-key {' or '.join(pictures)}")
    if pictures:
        return lambda observation: observation[pictures[0]], f"observation {pictures[0]}"
    if "rgb_array" in (env.metadata.get("render_modes") or ()):
        return None, "rendering"
    raise UserError(
        f"{game} has no picture: it observes {one_line(space)} and does not render to rgb_array; "
        f"let it observe uint8 [height, width, 3], at least {_SMALLEST_PICTURE} pixels wide and high"
    )


def _is_picture(space: Any) -> bool:
    shape = getattr(space, "shape", None) or ()
    return (
        getattr(space, "dtype", None) == np.uint8
        and is_picture_shape(shape)
        and min(shape[:2]) >= _SMALLEST_PICTURE
    )


def is_picture_shape(shape: tuple[int, ...]) -> bool:
    """[height, width], or the same with one channel or three."""
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3))


def understand_actions(space: Any, game: str) -> tuple[int, bool, Callable[[Any], Any], str]:
    """Size of the action vector, whether actions are discrete, how to make one of ours theirs, and words.

    Raises:
      UserError: actions are neither discrete nor a bounded box of numbers.
    """
    import gymnasium

    if isinstance(space, gymnasium.spaces.Discrete):
        count, start = int(space.n), space.start
        return count, True, lambda action: start + action, f"actions: {count} discrete"
    if (
        isinstance(space, gymnasium.spaces.Box)
        and np.issubdtype(space.dtype, np.floating)
        and space.is_bounded()
        and space.shape != (0,)
    ):
        low, high = space.low, space.high

        def rescale(action: np.ndarray) -> np.ndarray:
            share = (action.reshape(low.shape) + 1.0) / 2.0
            return np.clip(low + share * (high - low), low, high).astype(space.dtype)

        count = int(np.prod(low.shape))
        bounds = f"{low.min():g} to {high.max():g}"
        plain = np.all(low == -1) and np.all(high == 1)
        return (
            count,
            False,
            rescale,
            f"actions: {count} continuous" + ("" if plain else f", [-1, 1] rescaled to {bounds}"),
        )
    raise UserError(
        f"{game} has actions of an unsupported kind, {one_line(space)}: wrap it so that they are Discrete, "
        f"or a Box of floats with finite bounds"
    )
