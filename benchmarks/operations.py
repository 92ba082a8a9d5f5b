"""Floating-point operations of a program: all its matrix products and convolutions, loops included.

XLA's own count (`cost_analysis`) takes the body of a loop once, however often it runs, and knows nothing of
products that became library calls; `loops_counted_by_xla` checks the first on the spot. The count here walks
the traced program instead, and multiplies a scan's body by its length. Two operations per multiply-add;
element-wise work is left out, as it is in published counts; so are the zeros that a dilation inserts.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


def count(jaxpr: Any) -> float:
    """Operations of all products in a traced program (a `Jaxpr` or `ClosedJaxpr`).

    Of a conditional the costliest branch counts, of a while loop of unknown length one round.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += params["length"] * count(params["jaxpr"])
        elif name == "cond":
            total += max(count(branch) for branch in params["branches"])
        else:
            total += sum(count(inner) for inner in inner_programs(params))
    return total


def loops_counted_by_xla(length: int = 8, size: int = 16) -> float:
    """How many of `length` rounds of a loop XLA's cost analysis counts: 1, or all."""

    def products(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=length)[0]

    compiled = jax.jit(products).lower(jnp.ones((size, size))).compile()
    return xla_count(compiled) / (2 * size**3)


def xla_count(compiled: Any) -> float:
    """XLA's own count of a compiled program; nan where it gives none."""
    analysis = compiled.cost_analysis()
    if isinstance(analysis, list):  # one for each computation, in some versions
        analysis = analysis[0] if analysis else None
    return float((analysis or {}).get("flops", math.nan))


def inner_programs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation with these parameters runs."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(each, "jaxpr", each), "eqns"):
                yield each


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    params = equation.params
    kernel = equation.invars[1].aval.shape
    each = math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * each / math.prod(params["lhs_dilation"])
