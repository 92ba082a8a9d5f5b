"""The instructions of a compiled program, with the shapes that they have on the device.

Of a TPU the text says how arrays are tiled: what the last two axes lack to a multiple of 8 × 128 is stored,
read and computed all the same, and is counted here.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from benchmarks import programs

_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of an array: its type, axes, and where and how it lies."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0
    """0 is the device's large memory; others are on the chip."""

    @property
    def elements(self) -> int:
        """Without padding."""
        return math.prod(self.dims)

    @property
    def padded(self) -> int:
        """Elements that are stored."""
        if not self.tile:
            return self.elements
        sizes = [self.dims[axis] for axis in self.minor_to_major][::-1]
        sizes = [1] * (len(self.tile) - len(sizes)) + sizes
        head, tail = sizes[: -len(self.tile)], sizes[-len(self.tile) :]
        return math.prod(head) * math.prod(
            -(-size // of_tile) * of_tile for size, of_tile in zip(tail, self.tile, strict=True)
        )

    @property
    def itemsize(self) -> float:
        """Bytes of an element."""
        bits = re.search(r"\d+", self.dtype)
        return _BITS.get(self.dtype, int(bits[0]) if bits else 32) / 8

    @property
    def bytes(self) -> float:
        """In the device's large memory, padding included; 0 of what is on the chip."""
        return self.padded * self.itemsize if self.space == 0 else 0.0


def shapes(text: str) -> tuple[Shape, ...]:
    """All shapes in a piece of a program, in order."""
    found = []
    for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", text):
        order, _, rest = layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        found.append(
            Shape(dtype, _integers(dims), _integers(order), _integers(tile[1]) if tile else (),
                  int(space[1]) if space else 0)
        )  # fmt: skip
    return tuple(found)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    operation: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    line: str

    @property
    def result(self) -> Shape:
        """The first array that it makes."""
        return self.results[0] if self.results else Shape("token", (0,))

    @property
    def is_root(self) -> bool:
        """Whether the computation returns it."""
        return self.line.lstrip().startswith("ROOT")

    def called(self, attributes: str) -> list[str]:
        """Computations that it calls by these attributes."""
        return programs.called(self.line, attributes)


Computation = dict[str, Instruction]


class Text:
    """A compiled program: computations by name, each with its instructions by name."""

    def __init__(self, text: str):
        self.entry, lines = programs.computations(text)
        self.lines = lines

    @functools.cache  # noqa: B019 - one program is read in a process, and then let go
    def __getitem__(self, name: str) -> Computation:
        """The instructions of a computation.

        Raises:
          ValueError: there is none of that name.
        """
        if name not in self.lines:
            raise ValueError(f"no computation {name!r} in the compiled program")
        return {each.name: each for each in map(_instruction, self.lines[name])}

    def rounds(self, loop: Instruction, around: Computation) -> int:
        """How often a loop goes round.

        Raises:
          ValueError: the program does not say.
        """
        known = re.search(r"known_trip_count\D*(\d+)", loop.line)
        if known is not None:
            return int(known[1])
        try:
            return self._counted(loop, around)
        except (KeyError, IndexError, TypeError, ValueError, StopIteration):
            raise ValueError(f"the compiled program does not say how often {loop.name} goes round") from None

    def _counted(self, loop: Instruction, around: Computation) -> int:
        """From first value, step and end of the index, as the loop's condition and body have them."""
        condition, body = self[loop.called("condition")[0]], self[loop.called("body")[0]]
        first = around[loop.operands[0]].operands
        test = _root(condition)
        if test.operation != "compare":
            raise ValueError
        index, end = test.operands if "direction=LT" in test.line else test.operands[::-1]
        if not ("direction=LT" in test.line or "direction=GT" in test.line):
            raise ValueError
        place = _element(condition[index])

        def value(name: str, inside: Computation) -> int:
            each = _copied(name, inside)
            if each.operation == "get-tuple-element" and inside is not around:
                return value(first[_element(each)], around)
            found = re.search(r"constant\((-?\d+)\)", each.line)
            if each.operation != "constant" or found is None:
                raise ValueError
            return int(found[1])

        step = _copied(_root(body).operands[place], body)
        if step.operation != "add":
            raise ValueError
        added = [_copied(name, body) for name in step.operands]
        is_index = [each.operation == "get-tuple-element" and _element(each) == place for each in added]
        by = value(added[is_index.index(False)].name, body)
        return max(0, math.ceil((value(end, condition) - value(first[place], around)) / by))


def _copied(name: str, inside: Computation) -> Instruction:
    """What an instruction is a copy of."""
    each = inside[name]
    while each.operation in ("copy", "copy-done", "copy-start", "convert", "bitcast"):
        each = inside[each.operands[0]]
    return each


def _root(computation: Computation) -> Instruction:
    return next(each for each in computation.values() if each.is_root)


def _element(instruction: Instruction) -> int:
    """Which element a `get-tuple-element` takes."""
    return int(re.search(r"\bindex=(\d+)", instruction.line)[1])  # type: ignore[index]


def users(computation: Computation) -> dict[str, list[Instruction]]:
    """Who reads each instruction."""
    found: dict[str, list[Instruction]] = {name: [] for name in computation}
    for each in computation.values():
        for operand in dict.fromkeys(each.operands):
            found.setdefault(operand, []).append(each)
    return found


def roots(computation: Computation) -> Iterator[Instruction]:
    """What a computation returns, a tuple taken apart."""
    root = _root(computation)
    if root.operation == "tuple":
        yield from (computation[name] for name in root.operands)
    else:
        yield root


def _instruction(line: str) -> Instruction:
    name, operation = programs.name_of(line), programs.operation_of(line)
    rest = line.partition(" = ")[2]
    before, _, after = rest.partition(f" {operation}(")
    depth, stop = 1, len(after)
    for match in re.finditer(r"[()]", after):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            stop = match.start()
            break
    operands = tuple(re.findall(r"%([\w.\-]+)", after[:stop]))
    return Instruction(name, operation, shapes(before), operands, line)
