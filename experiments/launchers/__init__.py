"""Where runs are trained: on this machine, on a Ray cluster, or by SLURM."""

import dataclasses
from collections.abc import Sequence

from experiments.job import Job, Outcome, title
from twister_jax.training.progress import say

LAUNCHERS = ("local", "ray", "slurm")


@dataclasses.dataclass(frozen=True)
class Options:
    """What launchers are told.

    Attributes:
      per_device: runs on a device at the same time.
      attempts: how often a run that fails is tried.
      address: of a Ray cluster; empty starts one on this machine.
      cpus: cores that a run asks a cluster for; 0 leaves it to the launcher.
      slurm: parameters of the SLURM job, by submitit's names.
      dry_run: write the SLURM script, and do not submit it.
    """

    per_device: int = 1
    attempts: int = 3
    address: str = ""
    cpus: int = 0
    slurm: tuple[str, ...] = ()
    dry_run: bool = False


class Summary:
    """What a launcher says while jobs end, and what it leaves as its exit code; it counts runs."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.runs, self.ended = sum(map(len, jobs)), {"finished": 0, "failed": 0, "interrupted": 0}

    def add(self, job: Job, outcome: Outcome) -> None:
        """Says how a job ended."""
        self.ended["finished"] += len(job) - outcome.left
        self.ended[outcome.state] += outcome.left
        counted = f"{sum(self.ended.values())}/{self.runs}"
        say(f"{outcome.state} {title(job)}: {outcome.message} ({counted})")

    def close(self) -> int:
        """Says the totals; returns the exit code: 0 where everything is finished."""
        counts = ", ".join(f"{count} {state}" for state, count in self.ended.items() if count)
        left = self.runs - sum(self.ended.values())
        say((counts or "nothing ended") + (f", {left} not started" if left else ""))
        return 0 if self.ended["finished"] == self.runs else 1
