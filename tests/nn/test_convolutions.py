"""The CPU's convolutions and plain ones agree, in values and all gradients; bad arguments are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.nn.helpers import DEVICES, random_norm
from twister_jax import runtime
from twister_jax.nn import cpu_convolutions
from twister_jax.nn.kernels import bias_silu, conv2d, conv2d_transpose, norm_silu

CONV_LAYERS = [  # height, width, in, out, kernel, stride, padding
    (64, 64, 3, 32, 4, 2, 1),
    (32, 32, 32, 64, 4, 2, 1),
    (16, 16, 64, 128, 4, 2, 1),
    (8, 8, 128, 256, 4, 2, 1),
    (64, 64, 4, 48, 4, 2, 0),
    (31, 31, 48, 96, 4, 2, 0),
    (14, 14, 96, 192, 4, 2, 0),
    (6, 6, 192, 384, 4, 2, 0),
]
TRANSPOSE_LAYERS = [
    (4, 4, 256, 128, 4, 2, 1),
    (8, 8, 128, 64, 4, 2, 1),
    (16, 16, 64, 32, 4, 2, 1),
    (32, 32, 32, 3, 4, 2, 1),
    (1, 1, 768, 192, 5, 2, 0),
    (5, 5, 192, 96, 5, 2, 0),
    (13, 13, 96, 48, 6, 2, 0),
    (30, 30, 48, 4, 6, 2, 0),
]


def close(a, b, tolerance=2e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    scale = np.sqrt(np.mean(b**2)) + 1e-12
    np.testing.assert_allclose(a / scale, b / scale, atol=tolerance * 20)


def draw(function, x_shape, kernel_shape, stride, padding):
    """Image, kernel, and a gradient of the result."""
    a, b, c = jax.random.split(jax.random.key(sum(x_shape) + sum(kernel_shape)), 3)
    x, kernel = jax.random.normal(a, x_shape), jax.random.normal(b, kernel_shape)
    out = jax.eval_shape(lambda x, k: function(x, k, stride=stride, padding=padding), x, kernel)
    return x, kernel, jax.random.normal(c, out.shape)


def run(function, x, kernel, dy, stride, padding, device):
    """Values, gradient of the image, gradient of the kernel, as computed on a kind of device."""

    @jax.jit
    def f(x, kernel, dy):
        y, back = jax.vjp(lambda *p: function(*p, stride=stride, padding=padding), x, kernel)
        return y, *back(dy)

    with runtime.tracing_for(device):
        return f(x, kernel, dy)


def compare(function, x_shape, kernel_shape, stride, padding):
    """Values and both gradients of the CPU's form against the plain one."""
    arrays = draw(function, x_shape, kernel_shape, stride, padding)
    forms = (run(function, *arrays, stride, padding, device) for device in ("cpu", "gpu"))
    for ours, plain in zip(*forms, strict=True):
        close(ours, plain)


def by_definition(function, x, kernel, dy, stride, padding):
    """What `run` returns, pixel by pixel in float64.

    The large image is padded, and every pixel of the small one meets a window of it of the kernel's size.
    """
    x, kernel, dy = (np.asarray(array, np.float64) for array in (x, kernel, dy))
    large, small = (x, dy) if function is conv2d else (dy, x)
    zeros = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    large = np.pad(large, zeros)
    scattered = np.zeros_like(large)
    gathered, dkernel = np.zeros(small.shape), np.zeros_like(kernel)
    toward_small = kernel if function is conv2d else kernel.swapaxes(2, 3)
    for i in range(small.shape[1]):
        for j in range(small.shape[2]):
            rows = slice(i * stride, i * stride + kernel.shape[0])
            columns = slice(j * stride, j * stride + kernel.shape[1])
            window, pixel = large[:, rows, columns], small[:, i, j]
            gathered[:, i, j] = np.einsum("nabc,abcd->nd", window, toward_small)
            scattered[:, rows, columns] += np.einsum("nd,abcd->nabc", pixel, toward_small)
            dkernel += np.einsum("nabc,nd->abcd" if function is conv2d else "nabc,nd->abdc", window, pixel)
    inside = slice(padding, -padding or None)
    scattered = scattered[:, inside, inside]
    return (gathered, scattered, dkernel) if function is conv2d else (scattered, gathered, dkernel)


def compare_with_definition(function, x_shape, kernel_shape, stride, padding, device="cpu"):
    """A device's form against sums over pixels: for some odd shapes XLA cannot compile the plain form."""
    arrays = draw(function, x_shape, kernel_shape, stride, padding)
    results = run(function, *arrays, stride, padding, device)
    for ours, exact in zip(results, by_definition(function, *arrays, stride, padding), strict=True):
        close(ours, exact)


@pytest.mark.parametrize("layer", CONV_LAYERS)
def test_convolution_layers(layer):
    h, w, c, d, k, s, p = layer
    compare(conv2d, (3, h, w, c), (k, k, c, d), s, p)


@pytest.mark.parametrize("layer", TRANSPOSE_LAYERS)
def test_transposed_layers(layer):
    h, w, c, d, k, s, p = layer
    compare(conv2d_transpose, (3, h, w, c), (k, k, c, d), s, p)


sizes = st.integers(1, 9)


@settings(deadline=None, max_examples=10)
@given(
    st.integers(1, 3),
    sizes,
    sizes,
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_any_convolution(n, h, w, kh, kw, stride, padding):
    assume(h + 2 * padding >= kh and w + 2 * padding >= kw)
    compare_with_definition(conv2d, (n, h, w, 2), (kh, kw, 2, 3), stride, padding)


@settings(deadline=None, max_examples=10)
@given(
    st.integers(1, 3),
    sizes,
    sizes,
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_any_transposed_convolution(n, h, w, kh, kw, stride, padding):
    assume((h - 1) * stride - 2 * padding + kh >= 1 and (w - 1) * stride - 2 * padding + kw >= 1)
    compare_with_definition(conv2d_transpose, (n, h, w, 2), (kh, kw, 2, 3), stride, padding)


@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding"),
    [((5, 4), (1, 5), 3, 0), ((4, 6), (6, 3), 2, 2), ((3, 3), (2, 2), 3, 0), ((4, 3), (3, 4), 1, 1)],
)
def test_the_plain_form_of_odd_transposed_convolutions(image, kernel, stride, padding):
    """Its gradients are not those that JAX makes of it."""
    shapes = (2, *image, 2), (*kernel, 2, 3)
    compare_with_definition(conv2d_transpose, *shapes, stride, padding, device="gpu")


@pytest.mark.parametrize("function", [conv2d, conv2d_transpose])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("follows", ["norm_silu", "bias_silu"])
def test_epilogues_are_differentiated_with_their_convolution(function, follows, dtype, monkeypatch):
    """Norm or bias, and activation, two images to a chunk, against the plain composition in float32."""
    x_shape, kernel_shape = (6, 8, 8, 16), (4, 4, 16, 24)
    x, kernel, dy = (array.astype(dtype) for array in draw(function, x_shape, kernel_shape, 2, 1))
    monkeypatch.setattr(cpu_convolutions, "_chunk_size", lambda images, rows, columns: 2)
    start = random_norm(24)

    def run_on(device, x, kernel, dy):
        def f(x, kernel, scale, bias):
            norm = random_norm(24, dtype=x.dtype)
            norm.scale[...], norm.bias[...] = scale, bias
            epilogue = norm_silu(norm) if follows == "norm_silu" else bias_silu(bias)
            return function(x, kernel, stride=2, padding=1, epilogue=epilogue)

        @jax.jit
        def all_gradients(x, kernel, dy):
            y, back = jax.vjp(f, x, kernel, start.scale[...], start.bias[...])
            return y, *back(dy)

        with runtime.tracing_for(device):
            return all_gradients(x, kernel, dy)

    wide = [array.astype(jnp.float32) for array in (x, kernel, dy)]
    exact = run_on("gpu", *wide)
    for device in DEVICES if dtype == jnp.bfloat16 else ["cpu"]:
        results = run_on(device, x, kernel, dy)
        assert [array.dtype for array in results] == [dtype] * 3 + [jnp.float32] * 2
        for ours, each in zip(results, exact, strict=True):
            close(ours.astype(jnp.float32), each, tolerance=2e-6 if dtype == jnp.float32 else 2e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_transposed_convolution_follows_pytorch(device):
    """Each input pixel adds its product with kernel[a, b] at row stride * i + a - padding."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(4, 4, 5, 6))
    full = np.zeros((2, 8, 10, 6))
    for i in range(3):
        for j in range(4):
            for a in range(4):
                for b in range(4):
                    full[:, 2 * i + a, 2 * j + b] += x[:, i, j] @ kernel[a, b]
    with runtime.tracing_for(device):
        y = conv2d_transpose(jnp.float32(x), jnp.float32(kernel), stride=2, padding=1)
    close(y, full[:, 1:-1, 1:-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [conv2d, conv2d_transpose])
def test_half_precision_keeps_its_type(function, device):
    arrays = draw(function, (2, 8, 8, 16), (4, 4, 16, 8), 2, 1)
    results = run(function, *(array.astype(jnp.bfloat16) for array in arrays), 2, 1, device)
    assert [array.dtype for array in results] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("function", [conv2d, conv2d_transpose])
@pytest.mark.parametrize("channels", [3, 24])
def test_half_precision_rounds_no_more_than_its_inputs(function, channels):
    """Sums are taken in float32: of the same rounded numbers, only the result is rounded."""
    arrays = draw(function, (4, 16, 16, channels), (4, 4, channels, 8), 2, 1)
    half = [array.astype(jnp.bfloat16) for array in arrays]
    ours = run(function, *half, 2, 1, "cpu")
    plain = run(function, *(array.astype(jnp.float32) for array in half), 2, 1, "gpu")
    for rounded, exact in zip(ours, plain, strict=True):
        close(rounded.astype(jnp.float32), exact, tolerance=1e-3)


@pytest.mark.parametrize("function", [conv2d, conv2d_transpose])
@pytest.mark.parametrize(
    ("x", "kernel", "stride", "padding"),
    [
        ((8, 8, 3), (4, 4, 3, 5), 2, 1),
        ((1, 8, 8, 3), (4, 4, 2, 5), 2, 1),
        ((1, 8, 8, 3), (4, 3, 5), 2, 1),
        ((1, 8, 8, 3), (4, 4, 3, 5), 0, 1),
        ((1, 8, 8, 3), (4, 4, 3, 5), 2, -1),
    ],
)
def test_bad_arguments_are_refused(function, x, kernel, stride, padding):
    with pytest.raises((ValueError, TypeError)):  # the latter where annotations are checked
        function(jnp.zeros(x), jnp.zeros(kernel), stride=stride, padding=padding)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_outputs_are_refused(device):
    with runtime.tracing_for(device):
        with pytest.raises(ValueError, match="larger than"):
            conv2d(jnp.zeros((1, 2, 2, 3)), jnp.zeros((5, 5, 3, 4)), stride=2, padding=1)
        with pytest.raises(ValueError, match="leaves nothing"):
            conv2d_transpose(jnp.zeros((1, 1, 1, 3)), jnp.zeros((2, 2, 3, 4)), stride=2, padding=1)
