"""`python -m twister_jax doctor`: can this machine run everything, and if not, what fixes it."""

import importlib.metadata
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from twister_jax.errors import UserError
from twister_jax.training.progress import say

NEEDED = {
    "jax": (0, 10),
    "flax": (0, 12),
    "optax": (0, 2, 6),
    "orbax-checkpoint": (0, 11),
    "ale-py": (0, 11),
}
"""Oldest versions that work, as in pyproject.toml."""


class Finding(Exception):
    """What is wrong, and how to fix it."""


def main() -> int:
    """Runs every check and prints a line for each; returns 1 if any found something."""
    bad = 0
    checks = {**CHECKS, **suite_checks()}
    for name, check in checks.items():
        try:
            if (found := check()) is not None:
                say(f"ok    {name:<10} {found}")
        except (Finding, UserError) as finding:
            bad += 1
            say(f"WRONG {name:<10} {finding}")
        except Exception as error:
            bad += 1
            reason = " ".join(str(error).split())[:300] or "no message"
            say(f"WRONG {name:<10} {type(error).__name__}: {reason}")
    say(f"{bad} of {len(checks)} checks found something wrong" if bad else "everything works")
    return 1 if bad else 0


def check_python() -> str:
    """The interpreter is new enough."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036, started without make or pip
        raise Finding(f"Python {found} is too old: install 3.11 or newer, then `make clean` and run again")
    return found


def check_versions() -> str:
    """The packages are there and new enough."""
    found = {}
    for name, least in NEEDED.items():
        wanted = ".".join(map(str, least))
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise Finding(f"{name} is not installed: `pip install '{name}>={wanted}'`") from None
        if tuple(map(int, re.findall(r"\d+", found[name])[:3])) < least:
            raise Finding(f"{name} {found[name]} is too old: `pip install '{name}>={wanted}'`")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def check_device() -> str:
    """JAX sees a device, and the one the machine seems to have."""
    import jax

    devices = jax.devices()
    if jax.default_backend() == "cpu" and Path("/proc/driver/nvidia/version").exists():
        raise Finding(
            "there is an NVIDIA GPU, but JAX sees only the CPU: `make install` installs JAX for its driver; "
            "also look whether JAX_PLATFORMS is set"
        )
    kind = f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"
    stats = devices[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 1e9:.0f} GB each" if "bytes_limit" in stats else ""
    return f"{kind}{memory}, {os.cpu_count()} processors"


def check_compile() -> str:
    """A compiled call gives the right answer."""
    import jax
    import jax.numpy as jnp

    started = time.perf_counter()
    result = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((256, 256))))
    if result != 256**3:
        raise Finding(
            f"a product of matrices gave {result:g} in place of {256**3}: reinstall JAX, or the driver"
        )
    return f"compiled and ran in {time.perf_counter() - started:.2f} s"


def check_environments() -> str:
    """The default game starts, and a step changes what is seen."""
    import numpy as np

    from twister_jax import envs

    env = envs.make_vector_env(envs.DEFAULT_GAME, None, 1, 0)
    try:
        env.reset()
        actions = env.spec.random_actions(np.random.default_rng(0), 1)
        step = env.step(env.spec.to_env(actions))
    finally:
        env.close()
    shape = "x".join(map(str, step.image.shape[1:]))
    return f"one step of {envs.DEFAULT_GAME}: {shape}, {env.spec.num_actions} actions"


def check_files() -> str:
    """Runs and the compilation cache can be written."""
    from twister_jax.runtime import cache_directory

    cache = cache_directory("cpu")
    if cache is None:
        raise Finding("this user has no home for the compilation cache: name a place with TWISTER_JAX_CACHE=")
    for what, path in (("runs", Path("runs")), ("the compilation cache", cache)):
        there = path.absolute()
        while not there.exists():
            there = there.parent
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"0")
        except OSError as error:
            fix = "name another with LOGDIR=" if what == "runs" else "name another with TWISTER_JAX_CACHE="
            raise Finding(f"{there}, for {what}, cannot be written ({error.strerror}): {fix}") from None
    return "the current directory and the compilation cache can be written"


def suite_checks() -> dict[str, Callable[[], str | None]]:
    """The checks that environment suites bring."""
    from twister_jax import envs

    return {name: envs.suite(name).check for name in envs.SUITES}


CHECKS: dict[str, Callable[[], str]] = {
    "python": check_python,
    "packages": check_versions,
    "device": check_device,
    "compile": check_compile,
    "games": check_environments,
    "files": check_files,
}
