"""Every convolution of the agent, as a library call and as the dense products written out for a CPU."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from benchmarks.bench import Bench
from benchmarks.operations import inner_programs
from benchmarks.subject import make_shapes
from benchmarks.timing import Program, compile_program
from twister_jax.config import Config
from twister_jax.nn.kernels import conv2d, conv2d_transpose
from twister_jax.runtime import compute_dtype, in_precision, tracing_for

SECTION = "convolutions"
FORMS = {"plain": "gpu", "dense": "cpu"}
"""Formulation -> a kind of device that has it."""


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A layer: image (height, width, channels), kernel (height, width, in, out)."""

    transposed: bool
    image: tuple[int, int, int]
    kernel: tuple[int, int, int, int]
    stride: int
    padding: int

    def __str__(self) -> str:
        size = "x".join(map(str, self.image))
        return f"{size} {'up to' if self.transposed else 'to'} {self.kernel[-1]}"


def run(bench: Bench) -> None:
    """Forward, and forward with both gradients; the agents use one form everywhere, by the device."""
    images, yardstick = bench.subject.agent.tokens_per_update, bench.yardstick
    found = layers(bench.config)
    if not found:
        bench.report.add(SECTION, "convolutions", None, "", "the agent has none")
    for layer in found:
        for form, kind in FORMS.items():
            if bench.out_of_time:
                bench.report.fail(SECTION, f"--minutes are over at {layer}")
                return
            for what, useful, program, args in _programs(layer, images, kind, bench.config.precision):
                times = bench.measure(program, *args)
                yardstick.clock.sample()
                height, width, *_ = layer.kernel
                note = f"{height}x{width}, stride {layer.stride}, {images} images, "
                note += f"{useful / (times.median * yardstick.rate):.0%} of peak"
                bench.report.time(SECTION, f"{layer}, {form}, {what}", times, note)


def layers(config: Config) -> list[Convolution]:
    """The different convolutions of the agent's forward passes, all of which its pictures need."""
    with tracing_for("gpu"):  # there each is one operation
        subject = make_shapes(config)
        arguments = subject.state, subject.replay, jax.random.key(0)
        traced = jax.make_jaxpr(lambda *args: subject.agent.report(*args))(*arguments)
    return list(dict.fromkeys(_layers(traced)))


def _layers(jaxpr: Any) -> Iterator[Convolution]:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "conv_general_dilated":
            image, kernel = (each.aval.shape for each in equation.invars)
            stride, dilation, pads = (
                equation.params[name][0] for name in ("window_strides", "lhs_dilation", "padding")
            )
            if dilation > 1:
                yield Convolution(True, image[1:], kernel, dilation, kernel[0] - 1 - pads[0])
            else:
                yield Convolution(False, image[1:], kernel, stride, pads[0])
        for inner in inner_programs(equation.params):
            yield from _layers(inner)


def _programs(
    layer: Convolution, images: int, kind: str, precision: str
) -> Iterator[tuple[str, float, Program, tuple[Any, ...]]]:
    """What is timed: its name, operations, program and arguments."""
    operator = partial(
        conv2d_transpose if layer.transposed else conv2d, stride=layer.stride, padding=layer.padding
    )
    dtype, keys = compute_dtype(precision), jax.random.split(jax.random.key(0), 3)
    image = jax.random.normal(keys[0], (images, *layer.image), dtype)
    kernel = jax.random.normal(keys[1], layer.kernel, dtype)
    cotangent = jax.random.normal(keys[2], jax.eval_shape(operator, image, kernel).shape, dtype)

    def both(image, kernel, cotangent):
        value, pull = jax.vjp(operator, image, kernel)
        return value, pull(cotangent)

    # Every pixel of the small image meets the whole kernel.
    small = image if layer.transposed else cotangent
    useful = 2.0 * math.prod(small.shape[:3]) * math.prod(layer.kernel)
    for name, function, products, args in (
        ("forward", lambda image, kernel: operator(image, kernel), 1, (image, kernel)),
        ("forward+backward", both, 3, (image, kernel, cotangent)),
    ):
        exact = in_precision(function, precision)  # as the device here needs it, whatever is traced for
        with tracing_for(kind):
            program = compile_program(exact, *args)
        yield name, products * useful, program, args
