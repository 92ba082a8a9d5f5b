"""What a result may depend on besides its settings: versions, source, and the device it was computed on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from twister_jax.files import printable
from twister_jax.runtime import processor

_SETTINGS = {
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_default_matmul_precision": None,
    "jax_numpy_dtype_promotion": "standard",
    "jax_softmax_custom_jvp": False,
    "jax_allow_f16_reductions": True,
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_exec_time_optimization_effort": 0.0,
}
"""Settings of JAX that change numbers, as they are where nobody sets them. The generator stands apart."""

PACKAGES = ("twister_jax", "jax", "jaxlib", "flax", "optax", "numpy", "ale-py")


def versions() -> dict[str, str]:
    """Versions of everything that a score may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit of the source tree, with `-dirty` where it was changed; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def different_numerics(before: Any, precision: str) -> str:
    """Which entries of `before`, from `numerics`, have changed; empty if none has."""
    now, before = numerics(precision), before if isinstance(before, dict) else {}
    # What an older version did not record was not set either, as far as anybody knows.
    changed = {
        name: value for name, value in now.items() if value != before.get(name, "" if value == "" else None)
    }
    was = {name: printable(str(before.get(name)), 40) or "none" for name in changed}
    return ", ".join(f"{name} {value or 'none'} (was {was[name]})" for name, value in changed.items())


def numerics(precision: str) -> dict[str, Any]:
    """What decides the numbers of a run beside its settings; where it differs, no resumption is exact."""
    import jax

    values = {name: jax.config.values.get(name, usual) for name, usual in _SETTINGS.items()}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    on_cpu = jax.default_backend() == "cpu"
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": processor() if on_cpu else None,
        "threads": _threads() if on_cpu else None,  # products are summed in as many pieces
        "precision": precision,
        "generator": str(jax.config.values["jax_default_prng_impl"]),
        "settings": " ".join(f"{name}={value}" for name, value in values.items() if value != _SETTINGS[name]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def _threads() -> int | None:
    """Threads of XLA's CPU backend: as many as two variables say, or as this process may use cores."""
    for name in ("PJRT_NPROC", "NPROC"):
        if (said := os.environ.get(name, "")).isdecimal() and int(said):
            return int(said)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
