"""The safetensors format: a header in JSON that says where each array lies, and the arrays; no code.

Eight bytes of length, the header, and the arrays' bytes, little-endian, in C order and without gaps
(https://github.com/huggingface/safetensors#format). It is read and written here so that a policy needs no
package besides those that run it.
"""

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from twister_jax import foreign_json
from twister_jax.files import printable

_DTYPES = {
    "BOOL": np.bool_,
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "UI" for size in (1, 2, 4, 8)},
    "BF16": jnp.bfloat16,
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH = 8
"""Bytes of the header's length; headers are padded to a multiple of it, so that arrays are aligned."""
_MOST_HEADER = 1 << 24
"""Bytes: JSON takes many times as much memory, and a thousand arrays need a hundredth of it."""
_MOST_ARRAY = 1 << 62
"""Bytes that NumPy can count."""
_MOST_AXES = 64


def dump(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Arrays and words about them as one file."""
    # The widest numbers first: all are aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    pieces, end = [], 0
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        pieces.append(array.tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH)
    return b"".join([len(text).to_bytes(_LENGTH, "little"), text, *pieces])


def parse(data: bytes | mmap.mmap) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and the words about them; the arrays are views of `data`.

    Raises:
      ValueError: the file is damaged, or of another format; the message says what is wrong.
    """
    start = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if not _LENGTH < start <= len(data):
        raise ValueError("it does not begin with a header")
    if start > _MOST_HEADER:
        raise ValueError(
            f"its header has {start - _LENGTH:,} bytes, and {_MOST_HEADER - _LENGTH:,} are the most"
        )
    try:
        header = foreign_json.parse(data[_LENGTH:start].decode(), _object)
        metadata = dict(header.pop(_METADATA, {}))
        entries = [
            (*_whole(entry["data_offsets"], 2), name, str(entry["dtype"]), _whole(entry["shape"]))
            for name, entry in header.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("its header cannot be read") from None
    arrays, expected = {}, 0
    for begin, end, name, kind, shape in sorted(entries):
        shown = printable(name)
        if kind not in _DTYPES:
            raise ValueError(f"{shown} has numbers of type {printable(kind)}, which are not supported")
        dtype, count = np.dtype(_DTYPES[kind]), math.prod(shape)
        if min(shape, default=0) < 0 or begin != expected or end - begin != count * dtype.itemsize:
            raise ValueError(f"its header contradicts itself about {shown}")
        if math.prod(size or 1 for size in shape) * dtype.itemsize > _MOST_ARRAY:
            raise ValueError(f"{shown} has a shape that no array has")
        if start + end > len(data):
            raise ValueError(f"it ends in the midst of {shown}, after {len(data):,} bytes")
        arrays[name] = np.frombuffer(data, dtype, count, start + begin).reshape(shape)
        expected = end
    if start + expected != len(data):
        raise ValueError(f"{len(data) - start - expected:,} bytes follow the last array")
    return arrays, metadata


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which every key stands once: readers do not agree on which of two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _whole(values: Any, count: int | None = None) -> tuple[int, ...]:
    """A list of whole numbers, as many as NumPy has axes at most."""
    if type(values) is not list or len(values) > _MOST_AXES or count not in (None, len(values)):
        raise TypeError
    if not all(type(value) is int and abs(value) <= _MOST_ARRAY for value in values):
        raise TypeError
    return tuple(values)
