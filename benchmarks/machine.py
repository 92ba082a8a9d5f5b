"""The machine and the program that the numbers belong to."""

import contextlib
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib

from twister_jax.training.memory import host_available
from twister_jax.training.provenance import commit


def describe(precision: str) -> dict[str, Any]:
    """Processor, memory, device, versions and commit; `load` is what else the machine is busy with."""
    device = jax.devices()[0]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "backend": jax.default_backend(),
        "precision": precision,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "commit": _short(commit()),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("XLA_", "JAX_", "OMP_", "MALLOC_", "LD_PRELOAD", "NVIDIA_TF32"))
        },
    }


def line(machine: dict[str, Any]) -> str:
    """`describe` as one line for people."""
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB",
        f"load {machine['load']}",
        f"device {machine['device']} ({machine['backend']})",
        machine["precision"],
        f"jax {machine['jax']}",
        f"python {machine['python']}",
        f"commit {machine['commit']}",
        *(f"{name}={value}" for name, value in machine["environment"].items()),
    ]
    return " · ".join(parts)


def host_peak_bytes() -> int:
    """Most memory this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


@contextlib.contextmanager
def limited_host_memory() -> Iterator[None]:
    """Limits host memory, so that what does not fit raises RESOURCE_EXHAUSTED and the kernel kills nothing.

    The heap may grow to what this process holds now and what is free. Does nothing where that is unknown, or
    where an accelerator's memory is what counts.
    """
    free = host_available() if jax.default_backend() == "cpu" else None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        free = None
    if free is None:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (held + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _cpu() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _short(commit: str | None) -> str:
    """The first digits, and `-dirty` where the source tree was changed; `unknown` outside a repository."""
    digits, *dirty = (commit or "unknown").partition("-")
    return digits[:10] + "".join(dirty)
