"""Freed memory stays with the process, whatever its size, but for what compiling took."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")

PROGRAM = """
import ctypes, resource
from twister_jax.allocator import keep_freed_memory
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
import ctypes, resource, threading
from pathlib import Path
from twister_jax.allocator import keep_freed_memory
keep_freed_memory()
import jax.numpy as jnp
from twister_jax.training.background import compile_in_background, trace
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

traced, compiler = trace(jnp.sin, jnp.ones(3)), Compiler()
compile_in_background({"sine": compiler})
[thread.join() for thread in threading.enumerate() if thread.name == "compile"]
print(compiler.before - resident())
"""


def test_what_compiling_took_goes_back():
    """A run lasts for days, its compilation for a minute."""
    ended = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, check=True)
    assert int(ended.stdout) > 900e6


def test_a_large_block_is_paid_for_once():
    """A paper-size update takes gigabytes of scratch memory; 2,560 pages of this block are touched."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 256
