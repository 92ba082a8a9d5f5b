"""What is traced for which device, how precisely, and what becomes of freed memory."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from twister_jax import runtime

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")


# ---- what is traced, and how ---------------------------------------------------------------------


def test_the_target_is_the_default_device_unless_another_is_traced_for():
    here = jax.default_backend()
    assert runtime.target() == here
    with runtime.tracing_for("tpu"):
        assert runtime.target() == "tpu"
        with runtime.tracing_for("gpu"):
            assert runtime.target() == "gpu"
        assert runtime.target() == "tpu"
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(runtime.target()))
        thread.start()
        thread.join()
        assert elsewhere == [here]
    with pytest.raises(ZeroDivisionError), runtime.tracing_for("gpu"):
        1 / 0  # noqa: B018
    assert runtime.target() == here


@pytest.mark.parametrize(
    ("device", "precision", "resolved", "products"),
    [
        ("cpu", "auto", "float32", None),
        ("cpu", "float32", "float32", None),
        ("cpu", "bfloat16", "bfloat16", None),
        ("gpu", "auto", "bfloat16", None),
        ("gpu", "float32", "float32", "highest"),
        ("gpu", "bfloat16", "bfloat16", None),
        ("tpu", "auto", "bfloat16", None),
        ("tpu", "float32", "float32", "highest"),
    ],
)
def test_precision_of_products(device, precision, resolved, products):
    with runtime.tracing_for(device):
        assert runtime.resolve_precision(precision) == resolved
        assert runtime.compute_dtype(precision) == jnp.dtype(resolved)
        assert runtime.product_precision(precision) == products


def test_a_function_multiplies_as_its_run_does():
    square = jnp.ones((2, 2))

    def product(x):
        return x @ x

    with runtime.tracing_for("cpu"):
        assert runtime.in_precision(product, "float32") is product
    with runtime.tracing_for("gpu"):
        exact, fast = (runtime.in_precision(product, each) for each in ("float32", "bfloat16"))
    assert exact.__name__ == "product"
    assert "HIGHEST" in str(jax.make_jaxpr(exact)(square))
    assert "HIGHEST" not in str(jax.make_jaxpr(fast)(square))


# ---- host memory ---------------------------------------------------------------------------------

PROGRAM = """
import ctypes, resource
from twister_jax.runtime import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 5 << 29  # 2.5 GiB: more than an int says
faults = []
for _ in range(2):
    block = libc.malloc(size)
    for at in range(0, size, 1 << 20):
        ctypes.memset(block + at, 1, 1)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[1] - faults[0])
"""


COMPILING = """
import ctypes, resource
from pathlib import Path
from twister_jax.runtime import keep_freed_memory
keep_freed_memory()
import jax, jax.numpy as jnp
from twister_jax.training.programs import Programs
from twister_jax.training.signals import Signals
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

class Compiler:  # of one that took a GiB for itself
    def lower(self):
        block = libc.malloc(1 << 30)
        ctypes.memset(block, 1, 1 << 30)
        libc.malloc(1000)  # above it, and kept: as the compiled program is
        libc.free(block)
        self.before = resident()
        return traced.lower()

traced, compiler = jax.jit(jnp.sin).trace(jnp.ones(3)), Compiler()
Programs({"sine": compiler}, Signals())["sine"]
print(compiler.before - resident())
"""


@linux
def test_what_compiling_took_goes_back():
    """A run lasts for days, its compilation for a minute."""
    ended = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, check=True)
    assert int(ended.stdout) > 900e6


@linux
def test_a_large_block_is_paid_for_once():
    """A paper-size update takes gigabytes of scratch memory; 2,560 pages of this block are touched."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 256
