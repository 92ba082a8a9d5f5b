"""The matrix-product peak of this device: the yardstick for everything else."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from benchmarks.timing import Clock, Times, compile_program
from twister_jax.agents import product_precision

if TYPE_CHECKING:
    from benchmarks.bench import Bench


@dataclasses.dataclass
class Yardstick:
    """A square matrix product that can be timed again and again."""

    dtype: str
    size: int
    clock: Clock

    @property
    def operations(self) -> float:
        """Of one product."""
        return 2.0 * self.size**3

    @property
    def times(self) -> Times:
        """All samples so far."""
        return self.clock.times

    @property
    def rate(self) -> float:
        """Operations per second, by the median of all samples so far."""
        return self.operations / self.times.median

    @classmethod
    def make(cls, dtype: str, size: int, fill: float, precision: str | None = None) -> "Yardstick":
        """A product of random matrices: some devices are faster on zeros.

        Args:
          dtype: of the matrices and of the result.
          size: rows and columns.
          fill: seconds that one sample lasts at least.
          precision: as in `jax.lax.Precision`; None is JAX's default, which on NVIDIA hardware is TF32 for
            float32.
        """
        key_a, key_b = jax.random.split(jax.random.key(0))
        a = jax.random.normal(key_a, (size, size), jnp.dtype(dtype))
        b = jax.random.normal(key_b, (size, size), jnp.dtype(dtype))
        program = compile_program(lambda a, b: jnp.matmul(a, b, precision=precision), a, b)
        return cls(dtype, size, Clock(lambda _: program.call(a, b), None, fill))

    @classmethod
    def best(cls, dtype: str, quick: bool, fill: float) -> "Yardstick":
        """The fastest of a few sizes, multiplying as the agents do; it has three samples."""
        made = [cls.make(dtype, size, fill, product_precision(dtype)) for size in sizes(quick)]
        for each in made:
            each.clock.take(3, budget=20.0)
        return max(made, key=lambda each: each.rate)


def sizes(quick: bool) -> tuple[int, ...]:
    """Sizes that fill the device."""
    if jax.default_backend() == "cpu":
        return (512,) if quick else (1024, 2048, 3072)
    return (4096,) if quick else (4096, 8192, 12288)


def run(bench: "Bench") -> None:
    """All number formats that are fast here, and all sizes."""
    on_cpu = jax.default_backend() == "cpu"
    kinds: list[tuple[str, str | None, str]] = [("float32", None, "")]
    if not on_cpu:
        kinds = [
            ("bfloat16", None, ""),
            ("float32", "highest", "as products run with precision float32"),
            ("float32", None, "JAX's default, which on NVIDIA is TF32; not used here"),
        ]
    for dtype, precision, note in kinds:
        for size in sizes(bench.options.quick):
            yardstick = Yardstick.make(dtype, size, bench.fill, precision)
            times = yardstick.clock.take(bench.options.repeats, budget=20.0)
            name = f"{dtype}{' highest' if precision else ''} product, {size} x {size}"
            bench.report.rate("peak", name, yardstick.operations, times, "FLOP/s", note)
    yardstick = bench.yardstick
    bench.report.summary["matmul_peak_flops"] = yardstick.rate
    bench.report.rate(
        "peak",
        f"yardstick: {yardstick.dtype}, {yardstick.size} x {yardstick.size}",
        yardstick.operations,
        yardstick.times,
        "FLOP/s",
        "the fastest size in the precision of the run",
    )
