"""Checks, before a run starts, that what it needs fits into memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from twister_jax.errors import UserError

PROCESS_BYTES = 500_000_000
"""Host memory that a process takes between its start and its first updates, beside replay and state.
Measured with preset cpu of both agents on one core: 0.64 and 0.58 GB, including the updates' own scratch,
which is asked for later."""


def check_memory(needed: dict[str, int], device: Any = None) -> None:
    """Refuses at the start what would run out of memory hours later.

    Args:
      needed: bytes needed, by what needs them.
      device: the JAX device that is to hold them; None, or one without memory of its own, means the host.

    Raises:
      UserError: the free memory does not suffice. Says nothing where it cannot be known.
    """
    if not on_host(device):
        stats = device.memory_stats()
        where, available = str(device), stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        where, free = "this host", host_available()
        if free is None:
            return
        available = free
    total = sum(needed.values())
    if total > available:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needed.items())
        raise UserError(
            f"not enough memory on {where}: {total / 1e9:.2f} GB needed ({parts}), "
            f"{available / 1e9:.2f} GB available: choose a smaller replay.capacity, model or batch"
        )


def check_start(replay: int, agent: int, compiling: int, device: Any, say: Callable[[str], None]) -> None:
    """Refuses a run that cannot fit, and warns of one that fits only if its programs are already cached.

    Args:
      replay: bytes of the store.
      agent: bytes of the agent's state.
      compiling: bytes that compiling takes on the host for a while; see `AgentPackage.compiling_bytes`.
      device: the JAX device that is to hold replay and agent.
      say: prints a line.

    Raises:
      UserError: as `check_memory`.
    """
    arrays, process = {"replay": replay, "agent": agent}, {"the process itself": PROCESS_BYTES}
    if on_host(device):
        check_memory(needed := arrays | process)
    else:
        check_memory(arrays, device)
        check_memory(needed := process)
    free, most = host_available(), sum(needed.values()) + compiling
    if free is not None and free < most:
        say(
            f"memory is tight: {free / 1e9:.2f} GB available, {most / 1e9:.2f} GB needed while programs that "
            "are not in the cache compile; what ends without a word then was killed for memory"
        )


def on_host(device: Any) -> bool:
    """Whether the device has no memory of its own."""
    return device is None or "bytes_limit" not in (device.memory_stats() or {})


def host_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes this process can still take: what the machine has free, or its control group if less."""
    free = []
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        groups = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    for _, controllers, group in groups:
        if controllers == "":
            root, limit, usage = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Every group up to the root may set a limit. In a container the path may not exist; the root does.
        group_path = root / group.strip("/")
        for path in (group_path, *(p for p in group_path.parents if p.is_relative_to(root))):
            try:
                most, used = int((path / limit).read_text()), int((path / usage).read_text())
                stat = dict(line.split() for line in (path / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or no limit ("max")
                continue
            # The page cache counts as used, but makes way.
            free.append(most - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))
    return max(0, min(free)) if free else None
