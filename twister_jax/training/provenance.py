"""What a result may depend on besides its settings: versions, source, and the device it was computed on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from twister_jax.files import printable
from twister_jax.runtime import processor

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
    changed = {name: value for name, value in now.items() if value != before.get(name)}
    was = {name: printable(str(before.get(name)), 40) for name in changed}
    return ", ".join(f"{name} {value} (was {was[name]})" for name, value in changed.items())


def numerics(precision: str) -> dict[str, Any]:
    """What decides the numbers of a run beside its settings; where it differs, no resumption is exact."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_cpu = jax.default_backend() == "cpu"
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": processor() if on_cpu else None,
        "threads": cores if on_cpu else None,  # products are summed in as many pieces
        "precision": precision,
        "generator": str(jax.config.values["jax_default_prng_impl"]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
