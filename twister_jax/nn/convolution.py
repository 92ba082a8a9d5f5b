"""Strided and transposed convolutions, as library calls on accelerators and as dense products on a CPU.

XLA's CPU backend multiplies by the zeros that a stride inserts: the gradient of a strided convolution, a
transposed convolution and its gradient each cost several times their arithmetic. The three products that
all of them are made of (values, gradient of the input, gradient of the kernel) are therefore written here
as matrix products, and a transposed convolution is the input gradient of a convolution. cuDNN and TPU
convolutions have no such trouble, so there the plain form is used.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Form = Literal["plain", "dense"]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv2d(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kh kw in out"],
    *,
    stride: int,
    padding: int,
    form: Form | None = None,
) -> Float[Array, "batch h w out"]:
    """Cross-correlation with `padding` zeros on every side: h = (height + 2 padding - kh) // stride + 1.

    Sums are taken in float32 and returned in the type of `x`. `form` is for tests and measurements: by
    default it follows the backend.

    Raises:
        ValueError: for shapes, strides or paddings that do not make a convolution.
    """
    _check(x, kernel, stride, padding)
    if (
        min(_conv_size(n, k, stride, padding) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True))
        < 1
    ):
        raise ValueError(
            f"kernel {kernel.shape[:2]} is larger than the padded image {x.shape[1:3]} + 2*{padding}"
        )
    if _resolve(form) == "plain":
        return _plain_conv(x, kernel, stride, padding)
    return _dense_conv(x, kernel, stride, padding)


def conv2d_transpose(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kh kw in out"],
    *,
    stride: int,
    padding: int,
    form: Form | None = None,
) -> Float[Array, "batch h w out"]:
    """PyTorch's `ConvTranspose2d`: h = (height - 1) stride - 2 padding + kh.

    Every input pixel adds `x @ kernel[a, b]` at output row `stride * i + a - padding` and the like column.
    PyTorch's weight (in, out, kh, kw) becomes `kernel` by moving axes alone, no flip:
    `weight.transpose(2, 3, 0, 1)`. Sums are taken in float32 and returned in the type of `x`.

    Raises:
        ValueError: for shapes, strides or paddings that do not make a transposed convolution.
    """
    _check(x, kernel, stride, padding)
    if (
        min(
            _transpose_size(n, k, stride, padding)
            for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)
        )
        < 1
    ):
        raise ValueError(
            f"padding {padding} leaves nothing of an image {x.shape[1:3]} under kernel {kernel.shape[:2]}"
        )
    if _resolve(form) == "plain":
        return _plain_transpose(x, kernel, stride, padding)
    return _dense_transpose(x, kernel, stride, padding)


def _check(x, kernel, stride, padding):
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"want (batch, height, width, in) and (kh, kw, in, out), got {x.shape} and {kernel.shape}"
        )
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(f"image has {x.shape[3]} channels, kernel takes {kernel.shape[2]}")
    if stride < 1 or padding < 0:
        raise ValueError(f"want stride >= 1 and padding >= 0, got {stride} and {padding}")


def _resolve(form: Form | None) -> Form:
    if form is None:
        return "dense" if jax.default_backend() == "cpu" else "plain"
    if form not in ("plain", "dense"):
        raise ValueError(f"form is 'plain' or 'dense', got {form!r}")
    return form


def _conv_size(n: int, k: int, stride: int, padding: int) -> int:
    return (n + 2 * padding - k) // stride + 1


def _transpose_size(n: int, k: int, stride: int, padding: int) -> int:
    return (n - 1) * stride - 2 * padding + k


def _plain_conv(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_DIMENSIONS
    )


def _plain_transpose(x, kernel, stride, padding):
    pads = [(k - 1 - padding,) * 2 for k in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel[::-1, ::-1], (1, 1), pads, lhs_dilation=(stride, stride), dimension_numbers=_DIMENSIONS
    )


# The three products. `x` is the large image, `y` the small one, `kernel` (kh, kw, large, small channels).


def _patches(x, kernel_size, stride, padding):
    """(batch, H, W, c) -> (batch, h, w, kh*kw*c): what each output pixel of a convolution sees."""
    kh, kw = kernel_size
    h, w = _conv_size(x.shape[1], kh, stride, padding), _conv_size(x.shape[2], kw, stride, padding)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    views = [
        x[:, a : a + (h - 1) * stride + 1 : stride, b : b + (w - 1) * stride + 1 : stride]
        for a in range(kh)
        for b in range(kw)
    ]
    return jnp.concatenate(views, axis=-1)


def _dot(a, b, out_dtype):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(out_dtype)


def _values(x, kernel, stride, padding):
    kh, kw, c, d = kernel.shape
    patches = _patches(x, (kh, kw), stride, padding)
    return _dot(patches, kernel.reshape(kh * kw * c, d), x.dtype)


def _kernel_gradient(x, y, kernel_size, stride, padding, dtype):
    patches = _patches(x, kernel_size, stride, padding)
    grad = jnp.einsum("nhwp,nhwd->pd", patches, y, preferred_element_type=jnp.float32)
    return grad.reshape(*kernel_size, x.shape[-1], y.shape[-1]).astype(dtype)


def _input_gradient(y, kernel, size, stride, padding):
    """Scatter `y @ kernel[a, b].T` to the pixels of a large image of `size` that it came from."""
    n, h, w, _ = y.shape
    kh, kw, c, d = kernel.shape
    ah, aw = -(-kh // stride), -(-kw // stride)  # strides a kernel spans
    # Kernel rows split into (stride spans, phases): one product, then shifted adds, then phases interleave.
    kernel = jnp.pad(kernel, ((0, ah * stride - kh), (0, aw * stride - kw), (0, 0), (0, 0)))
    kernel = kernel.reshape(ah, stride, aw, stride, c, d).transpose(5, 0, 2, 1, 3, 4)
    z = jnp.matmul(y, kernel.reshape(d, -1), preferred_element_type=jnp.float32)
    z = z.reshape(n, h, w, ah, aw, stride * stride * c)
    total = sum(
        jnp.pad(z[:, :, :, a, b], ((0, 0), (a, ah - 1 - a), (b, aw - 1 - b), (0, 0)))
        for a in range(ah)
        for b in range(aw)
    )
    hh, ww = h + ah - 1, w + aw - 1
    x = total.reshape(n, hh, ww, stride, stride, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, hh * stride, ww * stride, c).astype(y.dtype)
    bottom, right = (max(0, padding + s - e * stride) for s, e in zip(size, (hh, ww), strict=True))
    x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
    return x[:, padding : padding + size[0], padding : padding + size[1]]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense_conv(x, kernel, stride, padding):
    return _values(x, kernel, stride, padding)


def _dense_conv_forward(x, kernel, stride, padding):
    return _values(x, kernel, stride, padding), (x, kernel)


def _dense_conv_backward(stride, padding, saved, dy):
    x, kernel = saved
    dx = _input_gradient(dy, kernel, x.shape[1:3], stride, padding)
    return dx, _kernel_gradient(x, dy, kernel.shape[:2], stride, padding, kernel.dtype)


_dense_conv.defvjp(_dense_conv_forward, _dense_conv_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense_transpose(x, kernel, stride, padding):
    size = [
        _transpose_size(n, k, stride, padding) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    ]
    return _input_gradient(x, kernel.swapaxes(2, 3), size, stride, padding)


def _dense_transpose_forward(x, kernel, stride, padding):
    return _dense_transpose(x, kernel, stride, padding), (x, kernel)


def _dense_transpose_backward(stride, padding, saved, dy):
    x, kernel = saved
    swapped = kernel.swapaxes(2, 3)
    dkernel = _kernel_gradient(dy, x, kernel.shape[:2], stride, padding, kernel.dtype)
    return _values(dy, swapped, stride, padding), dkernel.swapaxes(2, 3)


_dense_transpose.defvjp(_dense_transpose_forward, _dense_transpose_backward)
