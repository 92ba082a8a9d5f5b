"""Measured seconds: warm-up, several calls to a sample, median with minimum and maximum.

And the yardstick for everything else: a matrix product, timed again and again.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import operations
from twister_jax.runtime import product_precision


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call, one number per sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)


class Clock:
    """Times a function that turns a carry into the next one, so that buffers may be donated.

    A sample is as many calls as fill `fill` seconds, enqueued without waiting in between as a real loop
    would, and one wait at the end. Two calls warm up; the second shows how long a call takes.
    """

    def __init__(self, step: Callable[[Any], Any], carry: Any, fill: float):
        self.step = step
        self.carry = jax.block_until_ready(step(carry))
        self.calls = 1
        self.samples: list[float] = []
        self.sample()
        self.calls = min(100, max(1, math.ceil(fill / max(self.samples.pop(), 1e-9))))

    def sample(self, span: int = 1) -> float:
        """Takes one sample, `span` times as long as usual, with `span` waits: seconds per call."""
        started = time.perf_counter()
        for _ in range(span):
            carry = self.carry
            for _ in range(self.calls):
                carry = self.step(carry)
            self.carry = jax.block_until_ready(carry)
        self.samples.append((time.perf_counter() - started) / (span * self.calls))
        return self.samples[-1]

    def take(self, repeats: int, budget: float, beside: "Clock | None" = None, beside_span: int = 1) -> Times:
        """Takes `repeats` samples, or at least three when they would take more than `budget` seconds.

        Each follows a sample of the clock `beside`, which forgets its earlier ones: both see one machine.
        Give that a span that makes its samples about as long as these: bursts of slowness hit few of many
        short samples but most long ones, so that medians of unequal samples differ.
        """
        started = time.perf_counter()
        if beside is not None:
            beside.samples = []
        for done in range(repeats):
            if done >= 3 and time.perf_counter() - started > budget:
                break
            if beside is not None:
                beside.sample(beside_span)
            self.sample()
        return self.times

    @property
    def times(self) -> Times:
        """Of all samples so far."""
        return Times(tuple(self.samples))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function, and what is known of it without running it."""

    call: Callable[..., Any]
    seconds: float
    """To trace, lower and compile."""
    operations: float
    """Of its matrix products, loops included; see `operations.count`."""
    xla_operations: float
    temp_bytes: int
    """Scratch memory, and results that do not take the place of donated arguments."""
    argument_bytes: int
    text: Callable[[], str]
    """The optimised program, as XLA prints it."""


def compile_program(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compiles for arguments of these shapes."""
    started = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donate).trace(*args)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    sizes = {
        name: getattr(memory, f"{name}_size_in_bytes", 0) for name in ("temp", "argument", "output", "alias")
    }
    return Program(
        call=compiled,
        seconds=seconds,
        operations=operations.count(traced.jaxpr),
        xla_operations=operations.xla_count(compiled),
        temp_bytes=sizes["temp"] + max(0, sizes["output"] - sizes["alias"]),
        argument_bytes=sizes["argument"],
        text=compiled.as_text,
    )


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
        made = [cls.make(dtype, size, fill, product_precision(dtype)) for size in product_sizes(quick)]
        for each in made:
            each.clock.take(3, budget=20.0)
        return max(made, key=lambda each: each.rate)


def product_sizes(quick: bool) -> tuple[int, ...]:
    """Sizes of products that fill the device."""
    if jax.default_backend() == "cpu":
        return (512,) if quick else (1024, 2048, 3072)
    return (4096,) if quick else (4096, 8192, 12288)
