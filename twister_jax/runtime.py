"""How JAX is started: devices, compilation cache, precision, host memory, and the kind of device traced for.

XLA's CPU backend takes its scratch memory with malloc at every call. By default glibc hands gigabytes back to
the kernel each time, and the next call pays for them page by page: a fifth of a CPU update of the paper's
size, more than half of a small one. So what is freed is kept.
"""

import contextlib
import contextvars
import ctypes
import functools
import glob
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from twister_jax.errors import UserError

_log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------ start


def start_jax() -> None:
    """Starts JAX once the input is known to be good; freed memory and compiled programs are kept.

    Raises:
      UserError: JAX finds no device it can use, or is set to work in another way.
    """
    keep_freed_memory()
    import jax

    # 64 bits change every number, and without compilation nothing ends.
    for setting, name in (("jax_enable_x64", "JAX_ENABLE_X64"), ("jax_disable_jit", "JAX_DISABLE_JIT")):
        if getattr(jax.config, setting):
            raise UserError(f"{name} is set, with which this program does not work: unset it")
    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        raise UserError(f"JAX cannot start: {error}; run `python -m twister_jax doctor`") from error
    keep_compiled_programs(backend)


def keep_compiled_programs(backend: str) -> None:
    """Sets JAX's compilation cache to `cache_directory`; without write access, every start compiles anew."""
    import jax

    cache = cache_directory(backend)
    if cache is None:
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(cache, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(cache))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        # XLA's own caches (autotuning, on a GPU) would put this path into every key: no program in a copied
        # cache would be found.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        _remove_damaged_programs(cache)


def _remove_damaged_programs(cache: Path) -> None:
    """From here on, deletes cached programs that JAX cannot read, so that the recompiled ones are stored.

    JAX warns of the program's name, before it compiles. Which of that name is damaged it does not say, so
    all of them go.
    """
    show, warning = warnings.showwarning, "Error reading persistent compilation cache entry for '([^'/]+)'"

    def remove_and_show(message: Any, *args: Any, **kwargs: Any) -> None:
        found = re.match(warning, str(message))
        if found is None:
            show(message, *args, **kwargs)
            return
        _log.warning("the compiled program %s in %s was damaged: compiling it anew", found[1], cache)
        for path in cache.glob(f"{glob.escape(found[1])}-*"):
            with contextlib.suppress(OSError):
                path.unlink()

    warnings.filterwarnings("always", warning)
    warnings.showwarning = remove_and_show


def cache_directory(backend: str) -> Path | None:
    """`$TWISTER_JAX_CACHE` or ~/.cache/twister_jax/xla, and a folder for this kind of processor in it.

    What was compiled for one processor may not run on another one that shares the home directory. None for a
    user without a home; a folder that others can write is no place for programs.
    """
    chosen = os.environ.get("TWISTER_JAX_CACHE")
    try:
        cache = Path(chosen) if chosen else Path.home() / ".cache/twister_jax/xla"
    except RuntimeError:
        return None
    return cache / f"{backend}-{processor()}"


def processor() -> str:
    """A short name for what this processor can do."""
    import hashlib
    import platform

    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "flags", "Features")):
                features += line
            elif not line:
                break
    return hashlib.sha256(features.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------- what is traced, and how

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def target() -> str:
    """Kind of device that programs are traced for: `cpu`, `gpu` or `tpu`. Formulations follow it."""
    import jax

    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(kind: str) -> Iterator[None]:
    """Traces for another kind of device than JAX's default, to compile for it or to test its formulation.

    JAX keeps traced programs by function and shapes alone, so trace new functions inside.
    """
    token = _target.set(kind)
    try:
        yield
    finally:
        _target.reset(token)


def resolve_precision(precision: str) -> str:
    """`auto` is bfloat16 where the device is fast at it, and float32 on a CPU."""
    return ("float32" if target() == "cpu" else "bfloat16") if precision == "auto" else precision


def compute_dtype(precision: str) -> Any:
    """Number format of matrix products."""
    import jax.numpy as jnp

    return jnp.dtype(resolve_precision(precision))


def product_precision(precision: str) -> str | None:
    """What `jax.default_matmul_precision` has to be for a run of this precision; None leaves it alone.

    JAX's default on accelerators is coarser than float32: TF32 on NVIDIA hardware, bfloat16 on a TPU.
    """
    return "highest" if resolve_precision(precision) == "float32" and target() != "cpu" else None


def in_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """`function`, multiplying as a run of this precision does."""
    import jax

    products = product_precision(precision)
    if products is None:
        return function

    @functools.wraps(function)
    def exact(*args: Any) -> Any:
        with jax.default_matmul_precision(products):
            return function(*args)

    return exact


# ------------------------------------------------------------------------------------------ host memory

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
    """Returns freed memory that glibc kept to the kernel; elsewhere does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
