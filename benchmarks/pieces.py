"""What an agent's module of pieces gives: its update cut into parts that can be compiled alone.

`pieces_AGENT.pieces(subject, key)` is a generator: it yields a `Piece` and is sent that piece's output, from
which it makes the next one's arguments. So every piece runs on real inputs, and each is computed once.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

Pieces = Generator["Piece", Any, None]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the update."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    whole: bool = True
    """Together the whole pieces make up the update; the others are parts of them, timed for insight."""


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution layer of the agent: images in, kernel (height, width, in, out), stride 2."""

    name: str
    transposed: bool
    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    padding: int


def convolution_layers(
    part: str, transposed: bool, images: int, size: int, kernels: list[Any], padding: int
) -> list[Convolution]:
    """One layer after another, from the shapes of their kernels."""
    layers = []
    for index, kernel in enumerate(kernels):
        height, _, channels, _ = kernel.shape
        layer = Convolution(
            f"{part} {index + 1}", transposed, (images, size, size, channels), tuple(kernel.shape), padding
        )
        layers.append(layer)
        larger, smaller = (size - 1) * 2 - 2 * padding + height, (size + 2 * padding - height) // 2 + 1
        size = larger if transposed else smaller
    return layers


def in_order(kernels: dict[Any, Any] | list[Any]) -> list[Any]:
    """A list of modules as Flax's pure dictionaries keep it, by number."""
    return [kernels[name] for name in sorted(kernels, key=int)] if isinstance(kernels, dict) else kernels
