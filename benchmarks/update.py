"""One update: how long, how much work, how close to the yardstick, how much memory, how long to compile."""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import operations
from benchmarks.bench import Bench
from benchmarks.machine import host_peak_bytes

SECTION = "update"


def run(bench: Bench) -> None:
    """Everything about a single compiled update."""
    _compilation(bench)
    _speed(bench)
    _memory(bench)


def _compilation(bench: Bench) -> None:
    """Tracing, lowering and compiling, with an empty and with a filled persistent cache."""
    report = bench.report
    bench.subject  # its own little programs are compiled before  # noqa: B018
    with fresh_cache():
        bench.update_program = None
        cold = bench.compile_update()
        report.add(SECTION, "compile, cold", cold.seconds, "s", "in-process, empty persistent cache")
        bench.update_program = None
        jax.clear_caches()
        warm = bench.compile_update()
        report.add(SECTION, "compile, warm", warm.seconds, "s", "in-process, traced anew, cache filled")
    bench.update_program = cold


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
    """A persistent compilation cache that nothing was compiled into before.

    What it gets goes into the usual cache afterwards: the loop, and the next start, need not compile again.
    """
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="benchmarks-cache-") as directory:
        try:
            for name, value in zip(names, (True, directory, 0.0, 0), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # or the old directory stays in use
            jax.clear_caches()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            usual = before["jax_compilation_cache_dir"]
            if usual is not None and Path(usual).is_dir():
                shutil.copytree(directory, usual, dirs_exist_ok=True)


def _speed(bench: Bench) -> None:
    """Updates and yardstick interleaved, so that both see the same machine."""
    report, options, yardstick = bench.report, bench.options, bench.yardstick
    program, clock = bench.compile_update(), bench.update_clock()
    times = clock.take(options.repeats, options.budget, beside=yardstick.clock)
    yardstick.clock.sample()
    bench.keep(clock)
    tokens = bench.subject.agent.tokens_per_update
    bench.update_times = times
    report.time(SECTION, "one update", times, f"{clock.calls} in a row to a sample")
    report.rate(SECTION, "tokens", tokens, times, "tokens/s", f"{tokens} replayed steps to an update")
    report.rate(
        SECTION,
        f"yardstick between them, {yardstick.dtype}",
        yardstick.operations,
        yardstick.times,
        "FLOP/s",
        f"{yardstick.size} x {yardstick.size}; utilisations refer to its median",
    )

    published, peak = bench.published_operations, yardstick.rate
    loop = operations.loops_counted_by_xla()
    report.add(SECTION, "products, counted", program.operations, "FLOP", "traced program, loops included")
    report.add(
        SECTION,
        "all operations, by XLA",
        program.xla_operations,
        "FLOP",
        f"compiled program; checked here: of a loop of 8 rounds XLA counts {loop:.3g}",
    )
    elsewhere = "" if published else "published for the paper's setting only"
    report.add(SECTION, "products, published", published, "FLOP", elsewhere)
    report.rate(SECTION, "utilisation, counted", program.operations / peak, times, "")
    utilization = program.operations / (times.median * peak)
    by_published = published and published / (times.median * peak)
    if published:
        report.rate(SECTION, "utilisation, published", published / peak, times, "")
    report.summary |= {
        "seconds_per_update": times.median,
        "tokens_per_second": tokens / times.median,
        "flops_per_update": program.operations,
        "published_flops_per_update": published,
        "matmul_peak_flops": peak,
        "utilization": utilization if math.isfinite(utilization) else None,
        "utilization_published": by_published,
    }


def _memory(bench: Bench) -> None:
    report, program = bench.report, bench.compile_update()
    report.add(SECTION, "arguments", program.argument_bytes, "B", "state and replay")
    report.add(SECTION, "temporary memory", program.temp_bytes, "B", "as the compiler plans it")
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        report.add(SECTION, "device memory, peak", stats["peak_bytes_in_use"], "B", "of this process so far")
    report.add(SECTION, "host memory, peak", host_peak_bytes(), "B", "of this process so far")
