"""Measured seconds: warm-up, several calls to a sample, median with minimum and maximum."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import operations


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
    would, and one wait at the end. Two calls warm up; the second tells how long a call takes.
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
