"""Frames with words on them, as videos and pictures."""

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from twister_jax.errors import UserError
from twister_jax.files import write_atomically
from twister_jax.view.extras import require

Picture = UInt8[np.ndarray, "_ _ 3"]

BACKGROUND = (24, 24, 28)
INK = (235, 235, 235)
MARK = (255, 90, 80)
"""Of what is dreamt."""
_MARGIN = 8
_LINE = 20
_FONT = ImageFont.load_default(14)


def to_uint8(image: np.ndarray) -> Picture:
    """A picture of floats in [0, 1], grey or RGB; what overshoots is cut."""
    return as_rgb(np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8))


def as_rgb(image: UInt8[np.ndarray, "height width channel"]) -> Picture:
    """Grey pictures get three equal channels."""
    return np.broadcast_to(image, (*image.shape[:2], 3))


def enlarge(image: Picture, height: int) -> Picture:
    """By the whole factor that comes closest to a height: pixels stay square and sharp."""
    factor = max(1, round(height / image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def beside(
    pictures: Sequence[Picture], titles: Sequence[str], lines: Sequence[str] = (), border: bool = False
) -> Picture:
    """Pictures in a row with a title over each, and lines of text below them; `border` marks the whole."""
    widths = [max(picture.shape[1], _width(t)) for picture, t in zip(pictures, titles, strict=True)]
    row = max(picture.shape[0] for picture in pictures)
    width = max(
        [sum(widths) + _MARGIN * (len(pictures) + 1), *(_width(line) + 2 * _MARGIN for line in lines)]
    )
    height = row + _LINE * (1 + len(lines)) + 2 * _MARGIN
    # Both even, as the video format wants them.
    canvas = Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)
    draw, left = ImageDraw.Draw(canvas), _MARGIN
    for picture, title, each in zip(pictures, titles, widths, strict=True):
        write(draw, (left, 2), title)
        canvas.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, _LINE + _MARGIN // 2))
        left += each + _MARGIN
    for index, line in enumerate(lines):
        write(draw, (_MARGIN, row + _LINE * (index + 1) + _MARGIN), line)
    if border:
        draw.rectangle((0, 0, canvas.width - 1, canvas.height - 1), outline=MARK, width=3)
    return np.asarray(canvas)


def stack(pictures: Sequence[Picture]) -> Picture:
    """Pictures of different widths under one another."""
    width = max(picture.shape[1] for picture in pictures)
    canvas = np.full((sum(p.shape[0] for p in pictures), width, 3), BACKGROUND, np.uint8)
    top = 0
    for picture in pictures:
        canvas[top : top + picture.shape[0], : picture.shape[1]] = picture
        top += picture.shape[0]
    return canvas


def labels(names: Sequence[str], height: int, row: int) -> Picture:
    """Names of rows of pictures that `beside` made, to stand left of them."""
    canvas = Image.new("RGB", (max(map(_width, names)) + 2 * _MARGIN, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(names):
        write(draw, (_MARGIN, _LINE + row * index + row // 2 - _MARGIN), name)
    return np.asarray(canvas)


def _width(text: str) -> int:
    """Pixels that a line of text takes."""
    return math.ceil(_FONT.getlength(text))


def write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, color: tuple[int, int, int] = INK
) -> None:
    """A line of text; `at` is its upper left corner."""
    draw.text(at, text, fill=color, font=_FONT)


def save(path: Path, data: bytes | str) -> None:
    """Writes a file; its directory is made if need be.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def save_png(path: Path, picture: Picture) -> None:
    """Writes a picture; see `save`."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    save(path, buffer.getvalue())


def save_video(path: Path, frames: Iterable[Picture], rate: int) -> int:
    """Writes an MP4 (H.264) of frames of one size as they come; returns how many there were.

    Raises:
      UserError: imageio is not installed, or the file cannot be written.
    """
    imageio = require("imageio", "view", "a video")
    require("imageio_ffmpeg", "view", "a video")
    count, temporary = 0, path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"format": "FFMPEG", "fps": rate, "codec": "libx264", "macro_block_size": 2}
        with warnings.catch_warnings(), imageio.get_writer(temporary, **options) as video:
            # JAX warns of every fork; what is forked here becomes another program at once.
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            for frame in frames:
                video.append_data(frame)
                count += 1
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count
