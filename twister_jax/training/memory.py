"""Whether what a run needs fits into memory, asked before it starts."""

from pathlib import Path
from typing import Any

from twister_jax.errors import UserError


def check_memory(needed: dict[str, int], device: Any = None) -> None:
    """Refuses at the start what would run out of memory hours later.

    Args:
      needed: bytes needed, by what needs them.
      device: the JAX device that is to hold them; None, or one without memory of its own, means the host.

    Raises:
      UserError: the free memory does not suffice. Says nothing where it cannot be known.
    """
    stats = (device.memory_stats() or {}) if device is not None else {}
    if "bytes_limit" in stats:
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
