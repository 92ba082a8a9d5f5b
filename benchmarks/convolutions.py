"""Every convolution of the agent, formulated as a library call and as a dense product."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from benchmarks.pieces import Convolution
from benchmarks.timing import compile_program
from twister_jax.agent import compute_dtype
from twister_jax.agents import in_precision
from twister_jax.nn.convolution import Form, conv2d, conv2d_transpose

if TYPE_CHECKING:
    from benchmarks.bench import Bench

SECTION = "convolutions"
FORMS: tuple[Form, ...] = ("plain", "dense")


def run(bench: "Bench") -> None:
    """Forward, and forward with both gradients; the agents use one form everywhere, by the backend."""
    dtype, yardstick = compute_dtype(bench.config.precision), bench.yardstick
    for layer in bench.pieces.convolutions(bench.subject):
        for form in FORMS:
            if bench.out_of_time:
                bench.report.fail(SECTION, f"--minutes are over at {layer.name}")
                return
            for what, function, args in _functions(layer, form, dtype):
                program = compile_program(in_precision(function, bench.config.precision), *args)
                times = bench.measure(program, *args)
                yardstick.clock.sample()
                useful = _operations(layer) * (1 if what == "forward" else 3)
                height, width, a, b = layer.kernel
                note = f"{height}x{width}, {a} to {b}, {useful / (times.median * yardstick.rate):.0%} of peak"
                bench.report.time(SECTION, f"{layer.name}, {form}, {what}", times, note)


def _functions(layer: Convolution, form: Form, dtype: Any) -> list[tuple[str, Callable[..., Any], tuple]]:
    operator = partial(
        conv2d_transpose if layer.transposed else conv2d, stride=2, padding=layer.padding, form=form
    )
    key_image, key_kernel, key_output = jax.random.split(jax.random.key(0), 3)
    image = jax.random.normal(key_image, layer.image, dtype)
    kernel = jax.random.normal(key_kernel, layer.kernel, dtype)
    shape = jax.eval_shape(operator, image, kernel).shape
    cotangent = jax.random.normal(key_output, shape, dtype)

    def both(image, kernel, cotangent):
        value, pull = jax.vjp(operator, image, kernel)
        return value, pull(cotangent)

    return [
        ("forward", operator, (image, kernel)),
        ("forward+backward", both, (image, kernel, cotangent)),
    ]


def _operations(layer: Convolution) -> float:
    """Of one product: every pixel of the small image meets the whole kernel."""
    batch, height, width, _ = layer.image
    kernel = math.prod(layer.kernel)
    if layer.transposed:
        return 2.0 * batch * height * width * kernel
    size = (height + 2 * layer.padding - layer.kernel[0]) // 2 + 1
    return 2.0 * batch * size * size * kernel
