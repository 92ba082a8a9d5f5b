"""Frames with words on them, as videos and pictures."""

import io
import math
import secrets
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from twister_jax.errors import UserError
from twister_jax.files import write_atomically
from twister_jax.view.extras import require

Picture = UInt8[np.ndarray, "_ _ 3"]

BACKGROUND = (46, 49, 58)
"""Lighter than games are, so that their edges are seen."""
INK = (240, 240, 240)
MARK = (255, 90, 80)
"""Of what is dreamt."""
FAINT = (105, 110, 125)
_CURVE = (120, 200, 255)
_LEAST_SPAN = 0.1
"""Smallest range of values that a curve is scaled to, so that noise is not magnified."""
_MARGIN = 8
_LINE = 24
_FONT = ImageFont.load_default(18)


def to_uint8(image: np.ndarray) -> Picture:
    """A picture of floats in [0, 1], grey or RGB; what overshoots is cut."""
    return as_rgb(np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8))


def as_rgb(image: UInt8[np.ndarray, "height width channel"]) -> Picture:
    """Grey pictures get three equal channels."""
    return np.broadcast_to(image, (*image.shape[:2], 3))


def enlarge(image: Picture, height: int) -> Picture:
    """Enlarges by the integer factor that comes closest to a height, so pixels stay square and sharp."""
    factor = max(1, round(height / image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def beside(
    pictures: Sequence[Picture], titles: Sequence[str], lines: Sequence[str] = (), border: bool = False
) -> Picture:
    """Pictures in a row with a title over each, and lines of text below them; `border` marks the whole.

    The size does not depend on the lines: what does not fit is cut off.
    """
    widths = [max(picture.shape[1], _width(t)) for picture, t in zip(pictures, titles, strict=True)]
    row = max(picture.shape[0] for picture in pictures)
    width = sum(widths) + _MARGIN * (len(pictures) + 1)
    height = row + _LINE * (1 + len(lines)) + 2 * _MARGIN
    canvas = _canvas(width, height)
    draw, left = ImageDraw.Draw(canvas), _MARGIN
    for picture, title, each in zip(pictures, titles, widths, strict=True):
        write(draw, (left, _MARGIN // 2), title)
        canvas.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, _LINE + _MARGIN // 2))
        left += each + _MARGIN
    for index, line in enumerate(lines):
        write(draw, (_MARGIN, row + _LINE * (index + 1) + _MARGIN), line)
    if border:
        draw.rectangle((0, 0, canvas.width - 1, canvas.height - 1), outline=MARK, width=3)
    return np.asarray(canvas)


def stack(pictures: Sequence[Picture], gap: int = 0) -> Picture:
    """Pictures of different widths under one another, `gap` pixels apart."""
    width = max(picture.shape[1] for picture in pictures)
    height = sum(picture.shape[0] + gap for picture in pictures) - gap
    canvas = np.full((height, width, 3), BACKGROUND, np.uint8)
    top = 0
    for picture in pictures:
        canvas[top : top + picture.shape[0], : picture.shape[1]] = picture
        top += picture.shape[0] + gap
    return canvas


def labels(rows: Sequence[str], lines: Sequence[str], height: int, row: int) -> Picture:
    """Names to stand left of columns that `beside` made: of `rows` pixel rows each, then of lines of text."""
    canvas = _canvas(max(map(_width, [*rows, *lines])) + 2 * _MARGIN, height)
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(rows):
        write(draw, (_MARGIN, _LINE + row * index + row // 2 - _MARGIN), name)
    for index, name in enumerate(lines):
        write(draw, (_MARGIN, height - _MARGIN - _LINE * (len(lines) - index)), name)
    return np.asarray(canvas)


def heading(text: str) -> Picture:
    """A line of text, to stand over pictures."""
    canvas = _canvas(_width(text) + 2 * _MARGIN, _LINE + _MARGIN)
    write(ImageDraw.Draw(canvas), (_MARGIN, _MARGIN // 2), text)
    return np.asarray(canvas)


def trace(name: str, values: Sequence[float], marked: Sequence[int], now: int, width: int) -> Picture:
    """A curve of values over all steps, drawn as far as the step `now`; `marked` steps get a tick."""
    height, low = 3 * _LINE, min(values)
    high = max(*values, low + _LEAST_SPAN)
    canvas = _canvas(width, height)
    draw, left = ImageDraw.Draw(canvas), 2 * _MARGIN + max(_width(name), _width(number(high)))
    right, top, bottom = width - _MARGIN, _MARGIN, height - _MARGIN
    write(draw, (_MARGIN, _LINE), name)
    write(draw, (_MARGIN, 0), number(high))
    write(draw, (_MARGIN, 2 * _LINE), number(low))
    draw.rectangle((left, top, right, bottom), outline=FAINT)

    def x(step: int) -> float:
        return left + (right - left) * step / max(1, len(values) - 1)

    for step in (step for step in marked if step <= now):
        draw.line((x(step), bottom - _MARGIN, x(step), bottom), fill=MARK, width=2)
    scale = (bottom - top) / (high - low)
    points = [(x(step), bottom - scale * (value - low)) for step, value in enumerate(values[: now + 1])]
    draw.line(points, fill=_CURVE, width=2)
    at, up = points[-1]
    draw.ellipse((at - 4, up - 4, at + 4, up + 4), fill=_CURVE)
    return np.asarray(canvas)


def number(value: float) -> str:
    """For people: whole numbers as such, others with two digits."""
    return f"{value:,.0f}" if value == int(value) else f"{value:z,.2f}"


def _canvas(width: int, height: int) -> Image.Image:
    """Both even, as the video format wants them."""
    return Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)


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


def require_video() -> ModuleType:
    """imageio; for those who would otherwise find out after the games were played.

    Raises:
      UserError: it is not installed.
    """
    require("imageio_ffmpeg", "view", "a video")
    return require("imageio", "view", "a video")


def save_video(path: Path, frames: Iterable[Picture], rate: int) -> int:
    """Writes an MP4 (H.264) of frames of one size as they come; returns how many there were.

    Raises:
      UserError: imageio is not installed, or the file cannot be written.
    """
    imageio = require_video()
    # Of a name that nobody can have put a link in the place of.
    count, temporary = 0, path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"format": "FFMPEG", "fps": rate, "codec": "libx264", "macro_block_size": 2}
        options["ffmpeg_log_level"] = "error"
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
