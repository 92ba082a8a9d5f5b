"""Memory that an update frees is kept for the next one.

XLA's CPU backend takes its scratch memory with malloc at every call. By default glibc hands gigabytes back to
the kernel each time, and the next call pays for them page by page: a fifth of a CPU update of the paper's
size, more than half of a small one.
"""

import contextlib
import ctypes

# Option numbers of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed; elsewhere does nothing. Call before JAX allocates."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never: the largest number would still trim what is above 2 GB
        mallopt(_TOP_PAD, 1 << 28)
        mallopt(_ARENA_MAX, 1)  # the others unmap whatever is larger than 64 MB


def return_freed_memory() -> None:
    """Gives the kernel what was kept, to be told from what is taken; elsewhere does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
