"""Strided and transposed convolutions, as library calls on accelerators and as dense products on a CPU.

XLA's CPU backend multiplies by the zeros that a stride inserts: the gradient of a strided convolution, a
transposed convolution and its gradient each cost several times their arithmetic. The three products that
all of them are made of (values, gradient of the input, gradient of the kernel) are therefore written here
as matrix products, and a transposed convolution is the input gradient of a convolution. cuDNN and TPU
convolutions have no such trouble, so there the plain form is used.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twister_jax.nn.rowwise import IDENTITY, Rowwise

Form = Literal["plain", "dense"]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv2d(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kh kw in out"],
    *,
    stride: int,
    padding: int,
    then: Rowwise = IDENTITY,
    form: Form | None = None,
) -> Float[Array, "batch h w out"]:
    """Cross-correlation with `padding` zeros on every side: h = (height + 2 padding - kh) // stride + 1.

    Sums are taken in float32 and returned in the type of `x`. `then` is applied to every pixel of the result.
    `form` is for tests and measurements: by default it follows the backend.

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
        return then(_plain_conv(x, kernel, stride, padding))
    return _dense_conv(x, kernel, then.params, stride, padding, then._replace(params=()))


def conv2d_transpose(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kh kw in out"],
    *,
    stride: int,
    padding: int,
    then: Rowwise = IDENTITY,
    form: Form | None = None,
) -> Float[Array, "batch h w out"]:
    """PyTorch's `ConvTranspose2d`: h = (height - 1) stride - 2 padding + kh.

    Every input pixel adds `x @ kernel[a, b]` at output row `stride * i + a - padding` and the like column.
    PyTorch's weight (in, out, kh, kw) becomes `kernel` by moving axes alone, no flip:
    `weight.transpose(2, 3, 0, 1)`. Sums are taken in float32 and returned in the type of `x`. `then` is
    applied to every pixel of the result.

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
        return then(_plain_transpose(x, kernel, stride, padding))
    return _dense_transpose(x, kernel, then.params, stride, padding, then._replace(params=()))


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


# The three products: `_values`, `_input_gradient` and, over the rows of patches, `_product_over_rows`. `x` is
# the large image (channels c), `y` the small one (channels d), and the kernel is
# (kh, kw, c, d). The work is done a few images at a time, so that patches are used while they are in cache.

_CHUNK_BYTES = 2 << 20
_CHUNK_ROWS = 512  # that many rows of patches always fit: products of fewer are slow
_WIDE = 256  # columns of a matrix


def _chunk_size(images: int, rows: int, columns: int) -> int:
    """The largest divisor of `images` whose patches, rows x columns each, fit; at least one image."""
    fit = min(images, max(_CHUNK_BYTES // (4 * rows * columns), _CHUNK_ROWS // rows, 1))
    return next(n for n in range(fit, 0, -1) if images % n == 0)


def _chunks(array, size):
    return array.reshape(-1, size, *array.shape[1:])


def _map_and_add(function, arrays, size):
    """(sum, ys) of `function(*chunk) -> (addend, y)` over chunks of `size` images."""
    chunks = jax.tree.map(lambda array: _chunks(array, size), arrays)

    def step(total, chunk):
        addend, y = function(*chunk)
        return jax.tree.map(jnp.add, total, addend), y

    addend, _ = jax.eval_shape(function, *jax.tree.map(lambda array: array[0], chunks))
    zeros = jax.tree.map(jnp.zeros_like, addend)
    total, ys = jax.lax.scan(step, zeros, chunks)
    return total, ys.reshape(-1, *ys.shape[2:])


def _patches(x, kernel_size, stride, padding):
    """(n, H, W, c) -> (n, h, w, kh*kw*c): what each pixel of the small image sees.

    Neighbouring columns lie next to each other in memory, so `stride` of them are copied as one piece.
    """
    n, height, width, c = x.shape
    kh, kw = kernel_size
    h, w = _conv_size(height, kh, stride, padding), _conv_size(width, kw, stride, padding)
    rows, columns = (h - 1 + -(-kh // stride)), (w - 1 + -(-kw // stride))  # in strides
    x = jax.lax.pad(
        x,
        jnp.zeros((), x.dtype),
        [
            (0, 0, 0),
            (padding, rows * stride - height - padding, 0),
            (padding, columns * stride - width - padding, 0),
            (0, 0, 0),
        ],
    )
    x = x.reshape(n, rows, stride, columns, stride * c)
    pieces = [
        x[
            :,
            a // stride : a // stride + h,
            a % stride,
            b // stride : b // stride + w,
            : min(stride, kw - b) * c,
        ]
        for a in range(kh)
        for b in range(0, kw, stride)
    ]
    return jnp.concatenate(pieces, axis=-1)


def _values(x, kernel, stride, padding):
    """Small image from a large one: patches @ kernel."""
    kh, kw, _, d = kernel.shape
    h, w = _conv_size(x.shape[1], kh, stride, padding), _conv_size(x.shape[2], kw, stride, padding)
    matrix = kernel.reshape(-1, d)

    def chunk(x):
        patches = _patches(x, (kh, kw), stride, padding)
        return jnp.matmul(patches, matrix, preferred_element_type=jnp.float32).astype(x.dtype)

    size = _chunk_size(x.shape[0], h * w, matrix.shape[0])
    return jax.lax.map(chunk, _chunks(x, size)).reshape(x.shape[0], h, w, d)


def _product_over_rows(
    narrow: Float[Array, "rows d"], wide: Float[Array, "rows depth"]
) -> Float[Array, "d depth"]:
    """narrow^T @ wide in float32.

    Written with `narrow` already transposed, as the matrix library wants it; left to transpose it itself, XLA
    takes another library, slower and allocating for every product. Where a row is little work, rows are taken
    a few at a time, so that what is transposed is still in cache.
    """
    rows, depth = wide.shape
    few = () if depth >= _WIDE else range(64, 15, -1)
    size = next((n for n in few if rows % n == 0), rows)
    # In float32 from the start: some products of bfloat16 behind a barrier XLA's CPU backend cannot run.
    narrow, wide = narrow.astype(jnp.float32), wide.astype(jnp.float32)
    transposed = jax.lax.optimization_barrier(_chunks(narrow, size).swapaxes(1, 2))
    return jnp.matmul(transposed, _chunks(wide, size)).sum(0)


def _input_gradient(y, kernel, size, stride, padding):
    """Large image of `size` from a small one: every pixel adds y @ kernel[a, b]^T where it came from."""
    n, h, w, d = y.shape
    kh, kw, c, _ = kernel.shape
    matrix = kernel.reshape(-1, d).T
    rows, columns = (h - 1 + -(-kh // stride)), (w - 1 + -(-kw // stride))  # in strides

    def chunk(y):
        z = jnp.matmul(y, matrix, preferred_element_type=jnp.float32).reshape(-1, h, w, kh, kw * c)
        zero = jnp.zeros((), z.dtype)

        def row(a):
            up = a // stride
            return jax.lax.pad(z[:, :, :, a], zero, [(0, 0, 0), (up, rows - h - up, 0), *[(0, 0, 0)] * 2])

        # Kernel rows of one phase fall on the same image rows. They are added before the columns are, or each
        # pixel would be a sum over the rows and columns of the kernel at once.
        phases = [
            sum(row(a) for a in range(phase, kh, stride))
            if phase < kh
            else jnp.zeros((z.shape[0], rows, w, kw * c), z.dtype)
            for phase in range(stride)
        ]
        z = jnp.stack(phases, axis=2).reshape(-1, rows * stride, w, kw * c)

        def column(b):  # `stride` columns, which stay next to each other
            left, part = b // stride, z[..., b * c : (b + stride) * c]
            wide = (0, stride * c - part.shape[-1], 0)
            return jax.lax.pad(part, zero, [*[(0, 0, 0)] * 2, (left, columns - w - left, 0), wide])

        x = sum(column(b) for b in range(0, kw, stride)).reshape(-1, rows * stride, columns * stride, c)
        crop = [
            (-padding, size[0] + padding - rows * stride, 0),
            (-padding, size[1] + padding - columns * stride, 0),
        ]
        return jax.lax.pad(x, zero, [(0, 0, 0), *crop, (0, 0, 0)]).astype(y.dtype)

    count = _chunk_size(n, h * w, matrix.shape[1])
    return jax.lax.map(chunk, _chunks(y, count)).reshape(n, *size, c)


# `then` comes without its parameters, which are differentiated. Its gradient is taken chunk by chunk: both
# products use it while it is in cache, and it is never written out whole.


def _through(then, z, params, kept, dy):
    """Gradients of z and of `params`, made once: XLA would make dz anew in everything that reads it."""
    return jax.lax.optimization_barrier(then.backward(z, params, kept, dy))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _dense_conv(x, kernel, params, stride, padding, then):
    return then.value(_values(x, kernel, stride, padding), params)


def _dense_conv_forward(x, kernel, params, stride, padding, then):
    z = _values(x, kernel, stride, padding)
    y, kept = then.forward(z, params)
    return y, (x, kernel, params, z, kept)


def _dense_conv_backward(stride, padding, then, saved, dy):
    x, kernel, params, z, kept = saved
    kh, kw, c, d = kernel.shape

    def gradients(x, z, kept, dy):
        dz, dparams = _through(then, z, params, kept, dy)
        patches = _patches(x, (kh, kw), stride, padding).reshape(-1, kh * kw * c)
        dx = _input_gradient(dz, kernel, x.shape[1:3], stride, padding)
        return (_product_over_rows(dz.reshape(-1, d), patches), dparams), dx

    size = _chunk_size(x.shape[0], math.prod(z.shape[1:3]), kh * kw * c)
    (total, dparams), dx = _map_and_add(gradients, (x, z, kept, dy), size)
    return dx, total.T.reshape(kernel.shape).astype(kernel.dtype), dparams


_dense_conv.defvjp(_dense_conv_forward, _dense_conv_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _dense_transpose(x, kernel, params, stride, padding, then):
    return then.value(_transposed_values(x, kernel, stride, padding), params)


def _transposed_values(x, kernel, stride, padding):
    """Large image from a small one."""
    size = [
        _transpose_size(n, k, stride, padding) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    ]
    return _input_gradient(x, kernel.swapaxes(2, 3), size, stride, padding)


def _dense_transpose_forward(x, kernel, params, stride, padding, then):
    z = _transposed_values(x, kernel, stride, padding)
    y, kept = then.forward(z, params)
    return y, (x, kernel, params, z, kept)


def _dense_transpose_backward(stride, padding, then, saved, dy):
    """Both gradients are made of the same patches."""
    x, kernel, params, z, kept = saved
    kh, kw, d, c = kernel.shape
    matrix = kernel.swapaxes(2, 3).reshape(-1, d)

    def gradients(x, z, kept, dy):
        dz, dparams = _through(then, z, params, kept, dy)
        patches = _patches(dz, (kh, kw), stride, padding)
        dx = jnp.matmul(patches, matrix, preferred_element_type=jnp.float32).astype(dy.dtype)
        return (_product_over_rows(x.reshape(-1, d), patches.reshape(-1, matrix.shape[0])), dparams), dx

    size = _chunk_size(x.shape[0], math.prod(x.shape[1:3]), matrix.shape[0])
    (total, dparams), dx = _map_and_add(gradients, (x, z, kept, dy), size)
    dkernel = jnp.moveaxis(total.reshape(d, kh, kw, c), 0, 2)
    return dx, dkernel.astype(kernel.dtype), dparams


_dense_transpose.defvjp(_dense_transpose_forward, _dense_transpose_backward)
