"""The matrix-product peak of this device."""

import jax

from benchmarks.bench import Bench
from benchmarks.timing import Yardstick, product_sizes

SECTION = "peak"


def run(bench: Bench) -> None:
    """All number formats that are fast here, and all sizes."""
    kinds: list[tuple[str, str | None, str]] = [("float32", None, "")]
    if jax.default_backend() != "cpu":
        kinds = [
            ("bfloat16", None, ""),
            ("float32", "highest", "as products run with precision float32"),
            ("float32", None, "JAX's default, which on NVIDIA is TF32; not used here"),
        ]
    for dtype, precision, note in kinds:
        for size in product_sizes(bench.options.quick):
            each = Yardstick.make(dtype, size, bench.fill, precision)
            times = each.clock.take(bench.options.repeats, budget=20.0)
            name = f"{dtype}{' highest' if precision else ''} product, {size} x {size}"
            bench.report.rate(SECTION, name, each.operations, times, "FLOP/s", note)
    best = bench.yardstick
    bench.report.summary["matmul_peak_flops"] = best.rate
    name, note = f"yardstick: {best.dtype}, {best.size} x {best.size}", "the fastest, in the run's precision"
    bench.report.rate(SECTION, name, best.operations, best.times, "FLOP/s", note)
