"""Strided and transposed convolutions for XLA's CPU backend, as matrix products.

It multiplies by the zeros that a stride inserts: the gradient of a strided convolution, a transposed
convolution and its gradient each cost several times their arithmetic. The three products that all of them
consist of (values, gradient of the input, gradient of the kernel) are therefore written here as matrix
products, and a transposed convolution is the input gradient of a convolution. `kernels` checks the arguments.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twister_jax.nn.cpu_epilogues import CpuEpilogue, Params

# The three products: `_values`, `_input_gradient` and, over the rows of patches, `_product_over_rows`. `x` is
# the large image (channels c), `y` the small one (channels d), and the kernel is (kh, kw, c, d). The work is
# done a few images at a time, so that patches are used while they are in cache.

_CHUNK_BYTES = 2 << 20
_CHUNK_ROWS = 512  # so many rows of patches are always taken: products of fewer are slow
_WIDE = 256  # columns of a matrix


def _conv_size(n: int, k: int, stride: int, padding: int) -> int:
    return (n + 2 * padding - k) // stride + 1


def _transpose_size(n: int, k: int, stride: int, padding: int) -> int:
    return (n - 1) * stride - 2 * padding + k


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

    Neighbouring columns are adjacent in memory, so `stride` of them are copied as one piece.
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

    `narrow` is transposed beforehand, as the matrix library wants it: left to transpose it itself, XLA uses
    another library, which is slower and allocates for every product. Where a row is little work, a few rows
    are taken at a time, so that what was transposed is still in cache.
    """
    rows, depth = wide.shape
    few = () if depth >= _WIDE else range(64, 15, -1)
    size = next((n for n in few if rows % n == 0), rows)
    # In float32 from the start: XLA's CPU backend cannot run some products of bfloat16 behind a barrier.
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

        # Kernel rows of one phase land on the same image rows. They are added before the columns are, or each
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


# The gradient of the epilogue is taken chunk by chunk: both products use it while it is in cache, and it is
# never written out whole.


def _epilogue_gradients(epilogue, z, params, kept, dy):
    """Gradients of z and of `params`, computed once: XLA would compute dz anew for every use of it."""
    return jax.lax.optimization_barrier(epilogue.backward(z, params, kept, dy))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def conv2d(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kh kw in out"],
    params: Params,
    stride: int,
    padding: int,
    epilogue: CpuEpilogue,
) -> Float[Array, "batch h w out"]:
    """See `kernels.conv2d`; `params` are the epilogue's."""
    return epilogue.value(_values(x, kernel, stride, padding), params)


def _conv2d_forward(x, kernel, params, stride, padding, epilogue):
    z = _values(x, kernel, stride, padding)
    y, kept = epilogue.forward(z, params)
    return y, (x, kernel, params, z, kept)


def _conv2d_backward(stride, padding, epilogue, saved, dy):
    x, kernel, params, z, kept = saved
    kh, kw, c, d = kernel.shape

    def gradients(x, z, kept, dy):
        dz, dparams = _epilogue_gradients(epilogue, z, params, kept, dy)
        patches = _patches(x, (kh, kw), stride, padding).reshape(-1, kh * kw * c)
        dx = _input_gradient(dz, kernel, x.shape[1:3], stride, padding)
        return (_product_over_rows(dz.reshape(-1, d), patches), dparams), dx

    size = _chunk_size(x.shape[0], math.prod(z.shape[1:3]), kh * kw * c)
    (total, dparams), dx = _map_and_add(gradients, (x, z, kept, dy), size)
    return dx, total.T.reshape(kernel.shape).astype(kernel.dtype), dparams


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def conv2d_transpose(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kh kw in out"],
    params: Params,
    stride: int,
    padding: int,
    epilogue: CpuEpilogue,
) -> Float[Array, "batch h w out"]:
    """See `kernels.conv2d_transpose`; `params` are the epilogue's."""
    return epilogue.value(_transposed_values(x, kernel, stride, padding), params)


def _transposed_values(x, kernel, stride, padding):
    """Large image from a small one."""
    size = [
        _transpose_size(n, k, stride, padding) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    ]
    return _input_gradient(x, kernel.swapaxes(2, 3), size, stride, padding)


def _conv2d_transpose_forward(x, kernel, params, stride, padding, epilogue):
    z = _transposed_values(x, kernel, stride, padding)
    y, kept = epilogue.forward(z, params)
    return y, (x, kernel, params, z, kept)


def _conv2d_transpose_backward(stride, padding, epilogue, saved, dy):
    """Both gradients use the same patches."""
    x, kernel, params, z, kept = saved
    kh, kw, d, c = kernel.shape
    matrix = kernel.swapaxes(2, 3).reshape(-1, d)

    def gradients(x, z, kept, dy):
        dz, dparams = _epilogue_gradients(epilogue, z, params, kept, dy)
        patches = _patches(dz, (kh, kw), stride, padding)
        dx = jnp.matmul(patches, matrix, preferred_element_type=jnp.float32).astype(dy.dtype)
        return (_product_over_rows(x.reshape(-1, d), patches.reshape(-1, matrix.shape[0])), dparams), dx

    size = _chunk_size(x.shape[0], math.prod(x.shape[1:3]), matrix.shape[0])
    (total, dparams), dx = _map_and_add(gradients, (x, z, kept, dy), size)
    dkernel = jnp.moveaxis(total.reshape(d, kh, kw, c), 0, 2)
    return dx, dkernel.astype(kernel.dtype), dparams


conv2d_transpose.defvjp(_conv2d_transpose_forward, _conv2d_transpose_backward)
