"""Machines that a program can be compiled for without having them, and what their makers say of them.

Bandwidth of links is the published sum over all links of a chip and both directions. What a kernel costs
however little it does is published by nobody: `launch` is an assumption, the same for all programs.
"""

import dataclasses
import math
import os
import re

from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      kind: `tpu` or `gpu`, as JAX calls it.
      device_kind: what JAX calls this model, or how that begins.
      memory: bytes of it.
      bandwidth: of this memory, bytes per second.
      peak: operations of matrix products per second: bfloat16, float32, and `fast` for float32 rounded on the
        way, which is JAX's default on accelerators.
      vector: element-wise operations per second.
      link: bytes per second to other chips, both directions together.
      launch: seconds that a kernel costs at least; assumed.
      tile: what the matrix unit pads features to; 1 where it is fine-grained.
      clock: cycles per second, where compilers count in them.
      source: of these numbers.
    """

    kind: str
    device_kind: str
    memory: float
    bandwidth: float
    peak: dict[str, float]
    vector: float
    link: float
    launch: float
    tile: int
    clock: float
    source: str


def _tpu(
    page: str, kind: str, memory: float, bandwidth: float, peak: float, link: float, tile: int, clock: float,
    cores: int = 1,
) -> Chip:  # fmt: skip
    """float32 takes six products of bfloat16; a core does 4 × 8 × 128 element-wise operations in a cycle."""
    peaks = {"bfloat16": peak, "fast": peak, "float32": peak / 6}
    source = f"cloud.google.com/tpu/docs/{page}; vectors and clock: jax-ml.github.io/scaling-book/tpus"
    vector = cores * 4096 * clock
    return Chip("tpu", kind, memory, bandwidth, peaks, vector, link, 0.5e-6, tile, clock, source)


def _hopper(page: str, memory: float, bandwidth: float) -> Chip:
    """SXM, dense. A fused multiply-add counts twice for the vendor, an element-wise operation once here."""
    peaks = {"bfloat16": 989e12, "fast": 494e12, "float32": 67e12}
    source = f"nvidia.com/en-us/data-center/{page}"
    kind = f"NVIDIA {page.upper()}"
    return Chip("gpu", kind, memory, bandwidth, peaks, 67e12 / 2, 900e9, 2.5e-6, 1, 0.0, source)


CHIPS = {
    "v5e": _tpu("v5e", "TPU v5 lite", 16e9, 819e9, 197e12, 200e9, 128, 1.5e9),
    "v6e": _tpu("v6e", "TPU v6 lite", 32e9, 1640e9, 918e12, 448e9, 256, 1.75e9),
    "v5p": _tpu("v5p", "TPU v5", 95e9, 2765e9, 459e12, 600e9, 128, 1.75e9, cores=2),
    "H100": _hopper("h100", 80e9, 3350e9),
    "H200": _hopper("h200", 141e9, 4800e9),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """`count` chips of one kind, in a grid of TPUs or a node of GPUs."""

    name: str
    chip: Chip
    grid: tuple[int, ...]

    @property
    def count(self) -> int:
        """Chips."""
        return math.prod(self.grid)


def parse(name: str) -> Target:
    """A target by its name: `v5e:2x4`, `v5p:2x2x1`, `H200:8`; without a size one chip.

    Raises:
      UserError: an unknown chip, or a size that is none of it.
    """
    model, _, size = name.partition(":")
    if model not in CHIPS:
        raise UserError(
            f"--target {name}: unknown device {model!r}{did_you_mean(model, CHIPS)}; "
            f"one of {', '.join(CHIPS)}"
        )
    chip = CHIPS[model]
    axes = 1 if chip.kind == "gpu" else 3 if model == "v5p" else 2
    example = {1: f"{model}:8", 2: f"{model}:2x4", 3: f"{model}:2x2x1"}[axes]
    if not re.fullmatch("x".join(["[1-9][0-9]{0,3}"] * axes), size or "x".join(["1"] * axes)):
        raise UserError(f"--target {name}: must be one chip, {model}, or a size as in {example}")
    return Target(name, chip, tuple(int(n) for n in size.split("x")) if size else (1,) * axes)


def prepare() -> None:
    """Before JAX is imported: it uses the CPU here, and does not look for TPUs that libtpu could drive."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: else it asks, and says that nobody answers
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile
    }


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None of one that is not in the table."""
    found = [chip for chip in CHIPS.values() if device_kind.startswith(chip.device_kind)]
    return max(found, key=lambda chip: len(chip.device_kind), default=None)
