"""How long a compiled program would take on a machine that is not there: predicted, never measured.

A kernel takes the largest of its bytes over the memory's bandwidth, its products over the matrix unit's peak
and its element-wise operations over theirs, and a launch; kernels follow one another. A collective takes what
a ring takes at half the published bandwidth of the links, which is that of one direction.
"""

import dataclasses
from collections.abc import Iterable

from benchmarks.kernels import Kernel
from benchmarks.targets import Chip

_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
"""What a device sends in a ring of n, of the bytes that it gives."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds that a kernel takes in an update, all its rounds, by what they are spent on."""

    memory: float
    products: float
    vector: float
    launch: float
    links: float

    @property
    def total(self) -> float:
        """Memory and both kinds of arithmetic go on at the same time."""
        return max(self.memory, self.products, self.vector) + self.launch + self.links

    @property
    def bound(self) -> str:
        """What most of it is."""
        parts = dataclasses.asdict(self)
        return max(parts, key=parts.__getitem__)


def cost(kernel: Kernel, chip: Chip, count: int = 1) -> Cost:
    """Of a kernel on a chip, one of `count` that work together."""
    # A TPU's scalar unit needs no memory and no vectors: a tenth of a launch.
    launch = 0.0 if kernel.hidden else chip.launch / (10 if kernel.scalar and chip.kind == "tpu" else 1)
    links = ring(kernel.collective, kernel.sent, chip.link, count) if kernel.collective else 0.0
    return Cost(
        memory=kernel.times * kernel.bytes / chip.bandwidth,
        products=kernel.times * kernel.work.padded / chip.peak[kernel.work.precision],
        vector=kernel.times * kernel.work.vector / chip.vector,
        launch=kernel.times * launch,
        links=kernel.times * links,
    )


def ring(kind: str, given: float, link: float, count: int) -> float:
    """Seconds of a collective of `count` devices that give so many bytes each."""
    return _SENT[kind](count) * given / (link / 2)


def by_line(kernels: Iterable[Kernel], chip: Chip, count: int = 1) -> list[tuple[str, float, str]]:
    """Lines of ours, the dearest first: seconds in an update, and what most of them are spent on."""
    spent: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        of_kernel, of_line = cost(kernel, chip, count), spent.setdefault(kernel.source, {})
        of_line[of_kernel.bound] = of_line.get(of_kernel.bound, 0.0) + of_kernel.total
    found = [(line, sum(each.values()), max(each, key=each.__getitem__)) for line, each in spent.items()]
    return sorted(found, key=lambda each: -each[1])
