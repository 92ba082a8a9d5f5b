"""The work in a compiled program: kernels, their bytes and operations, and collectives.

Loops count as often as they go round. Of what is gathered or sliced, and of what is updated in place, only
the part that is touched counts as memory traffic.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

from benchmarks import programs
from benchmarks.instructions import Computation, Instruction, Shape, Text, roots, users

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_FUSIONS = ("fusion", "fusion-start")
_NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "opt-barrier", "domain"}
_NOTHING |= {"after-all", "add-dependency", "partition-id", "replica-id"}
_MOVES = _NOTHING | {"broadcast", "reshape", "copy", "transpose", "iota", "pad", "concatenate", "slice"}
_MOVES |= {"dynamic-slice", "dynamic-update-slice", "gather", "scatter", "custom-call"}
_ALL = {"reduce", "reduce-window", "dot", "convolution", "sort", "scatter", "tuple"}
"""What asks for all of its operands, however little is asked of it."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point and integer operations."""

    products: float = 0.0
    """Of matrix products and convolutions, two to a multiply-add."""
    padded: float = 0.0
    """The same with features rounded up to what the matrix unit takes."""
    vector: float = 0.0
    """Element-wise ones, and those of sums, on padded arrays."""
    precision: str = "bfloat16"
    """Of the products: bfloat16, float32, or `fast` for float32 rounded on the way."""

    def of(self, share: float) -> "Work":
        """With a share of the element-wise operations."""
        return dataclasses.replace(self, vector=self.vector * share)

    def __add__(self, other: "Work") -> "Work":
        larger = max(self, other, key=lambda each: each.padded)
        return Work(
            self.products + other.products,
            self.padded + other.padded,
            self.vector + other.vector,
            larger.precision,
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that the device executes.

    Attributes:
      name: as the program calls it.
      kind: of a fusion what makes it; of a call its target; else the operation.
      times: that an update runs it.
      loop: the innermost loop that it is in, or nothing.
      bytes: read from and written to the device's memory, each time.
      work: operations, each time.
      hidden: a copy beside other work; it takes bandwidth but no launch.
      scalar: makes single numbers.
      cycles: as the compiler estimates them; 0 where it does not say.
      collective: its kind, or nothing.
      sent: bytes of its operands, of a collective.
      source: the line of ours that it comes from.
    """

    name: str
    kind: str
    times: int
    loop: str
    bytes: float
    work: Work
    hidden: bool
    scalar: bool
    cycles: float
    collective: str
    sent: float
    source: str


def read(text: str, tile: int = 1) -> list[Kernel]:
    """Every kernel and collective of a compiled program. Of a conditional the branch with most counts.

    Args:
      text: as XLA prints it.
      tile: what the matrix unit rounds features up to.

    Raises:
      ValueError: the text is not such a program, or does not say how often a loop goes round.
    """
    program, sources = Text(text), programs.source_lines(text)
    reader = _Reader(program, tile)

    def walk(name: str, times: int, loop: str) -> Iterator[Kernel]:
        computation = program[name]
        for each in computation.values():
            operation = each.operation
            if operation == "while":
                rounds = program.rounds(each, computation)
                yield from walk(each.called("body")[0], times * rounds, each.name)
            elif operation == "conditional":
                branches = each.called("branch_computations|true_computation|false_computation")
                made = [list(walk(branch, times, loop)) for branch in branches]
                yield from max(made, key=lambda kernels: sum(kernel.times for kernel in kernels))
            elif operation in ("call", "async-start"):
                for inner in each.called("to_apply|calls"):
                    yield from walk(inner, times, loop)
            elif operation in _NOTHING or operation.endswith(("-done", "-update")):
                continue
            elif 'custom_call_target="AllocateBuffer"' not in each.line:
                source = sources.get(each.name, "no line of ours")
                yield reader.kernel(each, computation, times, loop, source)

    return list(walk(program.entry, 1, ""))


class _Reader:
    """Bytes and operations of single instructions."""

    def __init__(self, program: Text, tile: int):
        self.program, self.tile = program, tile
        self.channels: dict[str, str] = {}
        """The first instruction that each channel of a collective was met in."""

    def kernel(self, each: Instruction, inside: Computation, times: int, loop: str, source: str) -> Kernel:
        hidden = each.operation in ("copy-start", "slice-start")
        collective, sent = self.collective(each, inside)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', each.line)
        return Kernel(
            name=each.name,
            kind=_kind(each),
            times=times,
            loop=loop,
            bytes=_moved(each.results[:2]) if hidden else self.traffic(each, inside),
            work=Work() if hidden else self.work(each, inside),
            hidden=hidden,
            scalar=each.operation not in _FUSIONS and all(s.elements <= 2 for s in each.results),
            cycles=float(cycles[1]) if cycles else 0.0,
            collective=collective,
            sent=sent,
            source=source,
        )

    # ------------------------------------------------------------------------------------------ memory

    def traffic(self, each: Instruction, inside: Computation) -> float:
        """Bytes read and written."""
        if each.operation in _FUSIONS:
            fused = self.program[each.called("calls")[0]]
            parameters = [name for name, p in fused.items() if p.operation == "parameter"]
            return sum(self.reads(fused, name) for name in parameters) + sum(
                self.writes(root, fused) for root in roots(fused)
            )
        operands = [inside[name].result.bytes for name in each.operands if name in inside]
        if each.operation in ("dynamic-slice", "gather", "slice"):
            return each.result.bytes + each.result.bytes * bool(operands and operands[0])
        if each.operation == "dynamic-update-slice":
            return 2 * self.writes(each, inside)
        # The second result of a library's call is its scratch memory.
        results = each.results[:1] if each.operation.startswith("custom-call") else each.results
        return sum(operands) + sum(shape.bytes for shape in results)

    def reads(self, fused: Computation, name: str) -> float:
        """Of an argument of a fusion: all of it, or what its users slice out."""
        whole, read = fused[name].result.bytes, 0.0
        for user in users(fused)[name]:
            first = user.operands[0] == name
            if user.operation in ("dynamic-slice", "gather", "slice") and first:
                read += user.result.padded * user.result.itemsize
            elif user.operation == "bitcast":
                read += self.reads(fused, user.name) if whole else 0.0
            elif user.operation in _FUSIONS:
                inner = self.program[user.called("calls")[0]]
                for place in (i for i, operand in enumerate(user.operands) if operand == name):
                    parameter = next(p for p in inner.values() if f"parameter({place})" in p.line)
                    read += self.reads(inner, parameter.name)
            elif not ((user.operation == "dynamic-update-slice" and first) or user.operation == "tuple"):
                return whole
        return min(whole, read)

    def writes(self, root: Instruction, inside: Computation) -> float:
        """Of a result: all of it, or what is updated in place."""
        made = root
        while made.operation == "bitcast" and made.operands[0] in inside:
            made = inside[made.operands[0]]
        if made.operation == "dynamic-update-slice" and root.result.bytes:
            update = inside[made.operands[1]].result
            return min(root.result.bytes, update.padded * update.itemsize)
        if made.operation == "parameter":
            return 0.0
        return sum(shape.bytes for shape in root.results)

    # ------------------------------------------------------------------------------------------ operations

    def work(self, each: Instruction, inside: Computation) -> Work:
        """Operations, those of what it calls included."""
        if each.operation in _FUSIONS:
            fused = self.program[each.called("calls")[0]]
            shares = _shares(fused)
            return sum((self.work(inner, fused).of(shares[inner.name]) for inner in fused.values()), Work())
        operands = [inside[name].result for name in each.operands if name in inside]
        if each.operation in ("dot", "convolution") or "__cudnn$conv" in each.line or "__cublas" in each.line:
            products, lost = self.product(each, operands)
            highest = "highest" in each.line or '"HIGHEST"' in each.line
            wide = bool(operands) and operands[0].dtype == "f32"
            precision = ("float32" if highest else "fast") if wide else "bfloat16"
            return Work(products, products * lost, 0.0, precision)
        if each.operation == "reduce" or each.operation == "reduce-window":
            return Work(vector=float(operands[0].padded if operands else 0))
        if each.operation == "sort":
            return Work(vector=each.result.padded * max(1.0, math.log2(max(2, each.result.dims[-1]))) ** 2)
        return Work(vector=0.0 if each.operation in _MOVES else float(each.result.padded))

    def product(self, each: Instruction, operands: list[Shape]) -> tuple[float, float]:
        """Operations of a product, and how many times more its padded features are."""
        line, result = each.line, each.result
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
        if labels is None:
            contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{[]([^}\]]*)', line)
            axes = [int(n) for n in re.findall(r"\d+", contracted[1] if contracted else "")]
            depth = math.prod(operands[0].dims[axis] for axis in axes)
            return 2.0 * result.elements * depth, self.lost(depth) * self.lost(result.dims[-1])
        image, kernel, output = operands[0], operands[1], result
        if "convBackwardInput" in line:
            image, output = output, image
        elif "convBackwardFilter" in line:
            kernel, output = output, kernel
        of_kernel, of_output = labels[2], labels[3]
        depth, features = kernel.dims[of_kernel.index("i")], output.dims[of_output.index("f")]
        pairs = 1
        window = _window(line)
        for number, letter in enumerate(c for c in sorted(of_output) if c.isdigit()):
            pairs *= _pairs(
                image.dims[labels[1].index(letter)], output.dims[of_output.index(letter)], window(number)
            )
        batch = output.dims[of_output.index("b")]
        pixels = math.prod(output.dims[of_output.index(c)] for c in of_output if c.isdigit())
        # All that is summed for one number fills the matrix unit, whatever the channels.
        lost = self.lost(depth * pairs / max(1, pixels)) * self.lost(features)
        return 2.0 * batch * features * depth * pairs, lost

    def lost(self, size: float) -> float:
        """How many times more a padded axis is."""
        return -(-size // self.tile) * self.tile / max(1, size)

    # ----------------------------------------------------------------------------------------- collectives

    def collective(self, each: Instruction, inside: Computation, whole: str = "") -> tuple[str, float]:
        """Its kind, and the bytes that each device gives.

        On a TPU one collective may go on beside several fusions, each of which has it among its instructions:
        the first of its channel counts.
        """
        whole = whole or each.name
        kind = each.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", each.line)
            if channel and self.channels.setdefault(channel[1], whole) != whole:
                return "", 0.0
            operands = [inside[name] for name in each.operands if name in inside]
            shapes = [shape for operand in operands for shape in operand.results]
            return kind, sum(shape.elements * shape.itemsize for shape in shapes)
        for name in each.called("calls") if each.operation in _FUSIONS else ():
            fused = self.program[name]
            for inner in fused.values():
                found, sent = self.collective(inner, fused, whole)
                if found:
                    # A sum of which each device takes its part, as TPUs are given it.
                    scatters = found == "all-reduce" and all(
                        r.operation == "dynamic-slice" for r in roots(fused)
                    )
                    return ("reduce-scatter" if scatters else found), sent
        return "", 0.0


def _shares(fused: Computation) -> dict[str, float]:
    """Of each instruction of a fusion the share of its elements that are asked for.

    A fusion computes element by element: of what is sliced it computes the slices, one draw of random bits
    only where a kernel reads it.
    """
    asked, sliced = dict.fromkeys(fused, 0.0), dict.fromkeys(fused, 0.0)
    for each in reversed(fused.values()):
        here = 1.0 if each.is_root else max(asked[each.name], min(1.0, sliced[each.name]))
        asked[each.name] = here
        for place, operand in enumerate(each.operands):
            if operand not in fused:
                continue
            if each.operation in ("slice", "dynamic-slice", "gather") and place == 0:
                whole = max(1, fused[operand].result.elements)
                sliced[operand] += each.result.elements * here / whole
            else:
                asked[operand] = max(asked[operand], 1.0 if here and each.operation in _ALL else here)
    return asked


def _moved(ends: Sequence[Shape]) -> float:
    """Bytes of a copy or slice between two places, of which one may be on the chip."""
    return min(s.padded * s.itemsize for s in ends) * sum(s.space == 0 for s in ends)


def _kind(each: Instruction) -> str:
    if each.operation.startswith("custom-call"):
        found = re.search(r'custom_call_target="([^"]*)"', each.line)
        return f"call {found[1]}" if found else each.operation
    if each.operation in _FUSIONS:
        found = re.search(r'"kind":"__(\w+)"', each.line) or re.search(r"kind=(\w+)", each.line)
        return f"fusion {found[1]}" if found else each.operation
    return each.operation


_Axis = tuple[int, int, int, int, int]


def _window(line: str) -> Callable[[int], _Axis]:
    """Size, stride, padding before, dilation of image and kernel, along an axis of a convolution."""
    text = re.search(r"window={([^}]*)}", line)
    attributes = dict(each.split("=") for each in (text[1].split() if text else ()))

    def axis(number: int) -> _Axis:
        def of(name: str, default: str) -> str:
            values = attributes[name].split("x") if name in attributes else []
            return values[number] if number < len(values) else default

        padding = int(of("pad", "0_0").split("_")[0])
        return (int(of("size", "1")), int(of("stride", "1")), padding, int(of("lhs_dilate", "1")),
                int(of("rhs_dilate", "1")))  # fmt: skip

    return axis


def _pairs(image: int, output: int, axis: _Axis) -> int:
    """Products along an axis: pairs of output and kernel that meet an element, not padding or a gap."""
    size, stride, padding, of_image, of_kernel = axis
    last = (image - 1) * of_image
    places = (o * stride + k * of_kernel - padding for o in range(output) for k in range(size))
    return sum(0 <= place <= last and place % of_image == 0 for place in places)
