"""Operations whose best formulation depends on the device: the one place where it is chosen.

Accelerators get library calls and plain compositions, which JAX differentiates but for transposed
convolutions. XLA's CPU backend is slow at some of these, so a CPU gets the formulations written out in
`cpu_convolutions` and `cpu_epilogues`. `runtime.target()` says which device is being traced for.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twister_jax import parallel, runtime
from twister_jax.nn import cpu_convolutions, cpu_epilogues
from twister_jax.nn.attention import float32_einsum
from twister_jax.nn.cpu_epilogues import CpuEpilogue, Params

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class Epilogue(NamedTuple):
    """What follows a layer: a function of the last axis. Call it on an array, or give it to a convolution.

    Attributes:
      plain: (x, params) -> y in the type of x.
      cpu: the same with its gradient written out.
      params: parameters that all positions share.
    """

    plain: Callable[[Array, Params], Array]
    cpu: CpuEpilogue
    params: Params

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        if runtime.target() == "cpu":
            return cpu_epilogues.apply(x, self.params, self.cpu)
        return self.plain(x, self.params)


_IDENTITY = Epilogue(lambda x, params: x, cpu_epilogues.IDENTITY, ())


def norm_silu(norm: nnx.LayerNorm) -> Epilogue:
    """silu(norm(x)), computed in float32 and rounded to the type of x once, at the end."""
    assert norm.scale is not None
    assert norm.bias is not None
    plain = partial(_norm_silu, epsilon=norm.epsilon)
    return Epilogue(plain, cpu_epilogues.norm_silu(plain, norm.epsilon), (norm.scale[...], norm.bias[...]))


def _norm_silu(x: Array, params: Params, epsilon: float) -> Array:
    scale, bias = params
    chex.assert_shape([scale, bias], x.shape[-1:])
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True)
    centred = wide - mean
    if variance_of_squares(x.dtype):
        variance = jnp.maximum(0.0, jnp.mean(wide * wide, -1, keepdims=True) - mean * mean)
    else:
        variance = jnp.mean(centred * centred, -1, keepdims=True)
    root = jax.lax.rsqrt(variance + epsilon)
    return jax.nn.silu(centred * (root * scale) + bias).astype(x.dtype)


def variance_of_squares(dtype: DTypeLike) -> bool:
    """Whether norms take E[x²] − E[x]² for the variance, and not the mean square of distances from the mean.

    On a TPU the product before the norm then sums up both as it goes, and its result is read once less. That
    is exact to 6e-8 · (mean / deviation)², relatively: enough for numbers of bfloat16, of which rounding
    leaves nothing where the mean is 256 deviations. On a GPU XLA does with the other in one kernel.
    """
    return runtime.target() == "tpu" and dtype == jnp.bfloat16


def bias_silu(bias: Float[Array, " features"]) -> Epilogue:
    """silu(x + bias), computed in float32 and rounded to the type of x."""
    return Epilogue(_bias_silu, cpu_epilogues.bias_silu(_bias_silu), (bias,))


def _bias_silu(x: Array, params: Params) -> Array:
    (bias,) = params
    chex.assert_shape(bias, x.shape[-1:])
    return jax.nn.silu(x.astype(jnp.float32) + bias).astype(x.dtype)


def conv2d(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kh kw in out"],
    *,
    stride: int,
    padding: int,
    epilogue: Epilogue | None = None,
) -> Float[Array, "batch h w out"]:
    """Cross-correlation with `padding` zeros on every side: h = (height + 2 padding - kh) // stride + 1.

    Sums are taken in float32 and returned in the type of `x`, then `epilogue` is applied to every pixel.

    Raises:
        ValueError: for shapes, strides or paddings that do not make a convolution.
    """
    _check(x, kernel, stride, padding)
    if any(n + 2 * padding < k for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)):
        raise ValueError(
            f"kernel {kernel.shape[:2]} is larger than the padded image {x.shape[1:3]} + 2*{padding}"
        )
    epilogue = epilogue or _IDENTITY
    if runtime.target() == "cpu":

        def conv(x, kernel, params):
            return cpu_convolutions.conv2d(x, kernel, params, stride, padding, epilogue.cpu)

        return parallel.on_shares(conv, x, kernel, epilogue.params)
    return epilogue(_plain_conv(x, kernel, stride, padding))


def _plain_conv(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_DIMENSIONS
    )


def conv2d_transpose(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kh kw in out"],
    *,
    stride: int,
    padding: int,
    epilogue: Epilogue | None = None,
) -> Float[Array, "batch h w out"]:
    """PyTorch's `ConvTranspose2d`: h = (height - 1) stride - 2 padding + kh.

    Every input pixel adds `x @ kernel[a, b]` at output row `stride * i + a - padding` and the like column.
    PyTorch's weight (in, out, kh, kw) becomes `kernel` by moving axes alone, no flip:
    `weight.transpose(2, 3, 0, 1)`. Sums are taken in float32 and returned in the type of `x`, then `epilogue`
    is applied to every pixel.

    Raises:
        ValueError: for shapes, strides or paddings that do not make a transposed convolution.
    """
    _check(x, kernel, stride, padding)
    if any((n - 1) * stride + k <= 2 * padding for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)):
        raise ValueError(
            f"padding {padding} leaves nothing of an image {x.shape[1:3]} under kernel {kernel.shape[:2]}"
        )
    epilogue = epilogue or _IDENTITY
    if runtime.target() == "cpu":

        def conv_transpose(x, kernel, params):
            return cpu_convolutions.conv2d_transpose(x, kernel, params, stride, padding, epilogue.cpu)

        return parallel.on_shares(conv_transpose, x, kernel, epilogue.params)
    return epilogue(_plain_transpose(x, kernel, stride, padding))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _plain_transpose(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """With the gradients of the convolution whose input gradient this is.

    JAX's own are of a convolution with a flipped kernel, for which a TPU flips the images.
    """
    pads = [(k - 1 - padding,) * 2 for k in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel[::-1, ::-1], (1, 1), pads, lhs_dilation=(stride, stride), dimension_numbers=_DIMENSIONS
    )


def _plain_transpose_backward(
    stride: int, padding: int, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    conv = partial(_plain_conv, stride=stride, padding=padding)
    dx, pull = jax.vjp(conv, dy, kernel.swapaxes(2, 3))
    return dx, pull(x)[1].swapaxes(2, 3)


_plain_transpose.defvjp(
    lambda x, kernel, stride, padding: (_plain_transpose(x, kernel, stride, padding), (x, kernel)),
    _plain_transpose_backward,
)


def _check(x: Array, kernel: Array, stride: int, padding: int) -> None:
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"want (batch, height, width, in) and (kh, kw, in, out), got {x.shape} and {kernel.shape}"
        )
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(f"image has {x.shape[3]} channels, kernel takes {kernel.shape[2]}")
    if stride < 1 or padding < 0:
        raise ValueError(f"want stride >= 1 and padding >= 0, got {stride} and {padding}")


def product(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """x @ kernel.

    With more than two axes XLA's CPU backend copies the gradients first, so a CPU multiplies two matrices.
    Where devices share an axis that is not the first, making it part of one would bring it together.
    """
    if runtime.target() != "cpu" or parallel.devices_in_use() > 1:
        return jnp.matmul(x, kernel)
    return jnp.matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def as_stored(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x`, on a TPU laid out as arguments are: by rows, where they fill its tiles.

    For gradients. Else XLA lays out the parameter and both its moments as the product that made the gradient
    happens to leave it, and copies all three, there and back.
    """
    if runtime.target() != "tpu" or x.ndim < 2 or x.shape[-1] % 128 or x.shape[-2] % 8:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def few_products(equation: str, *factors: Array) -> Array:
    """An einsum with little to sum for each of its results, in float32.

    A matrix product, but on a GPU a sum of products, which the kernels before and after it can take: a
    product's own kernel, and those that pad its factors to what tensor cores want, would cost more than its
    arithmetic.
    """
    if runtime.target() != "gpu":
        return float32_einsum(equation, *factors)
    inputs, result = equation.split("->")
    summed = sorted(set(inputs) - set(result) - {","})
    axes = [*result, *summed]

    def aligned(factor: Array, names: str) -> Array:
        order = sorted(range(len(names)), key=lambda n: axes.index(names[n]))
        shape = iter(factor.shape[n] for n in order)
        there = {*names}
        return factor.transpose(order).reshape([next(shape) if axis in there else 1 for axis in axes])

    wide = [aligned(f.astype(jnp.float32), n) for f, n in zip(factors, inputs.split(","), strict=True)]
    return jnp.sum(math.prod(wide[1:], start=wide[0]), axis=tuple(range(len(result), len(axes))))
