"""Freed memory stays with the process, whatever its size."""

import subprocess
import sys

import pytest

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_large_block_is_paid_for_once():
    """A paper-size update takes gigabytes of scratch memory; 2,560 pages of this block are touched."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 256
