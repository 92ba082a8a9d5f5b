"""`--launcher local`: the devices of this machine, one or several runs on each."""

import os
import queue
import shutil
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

from experiments.job import Job, Outcome, run_job
from experiments.launchers import Options, Summary
from experiments.suite import Plan
from twister_jax.training.progress import say
from twister_jax.training.signals import Signals


class Slot(NamedTuple):
    """Room for one run: a device, variables that choose it, and the cores it may use (None: all)."""

    device: str
    environment: dict[str, str]
    cores: frozenset[int] | None


def launch(directory: Path, plan: Plan, jobs: list[Job], options: Options) -> int:
    """Trains jobs in the slots of this machine; a signal stops them, and what ran goes on next time."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    ended: queue.SimpleQueue[tuple[Job, Outcome]] = queue.SimpleQueue()
    stopping = threading.Event()

    def work(slot: Slot) -> None:
        if slot.cores is not None:
            os.sched_setaffinity(0, slot.cores)  # of this thread, and of what it starts
        while not stopping.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                outcome = run_job(
                    directory,
                    plan,
                    job,
                    slot.device,
                    slot.environment,
                    options.attempts,
                    stopping.is_set,
                    say=say,
                )
            except OSError as error:  # a full disk, say: the others may still work
                outcome = Outcome("failed", str(error), len(job))
            ended.put((job, outcome))

    summary = Summary(jobs)
    threads = [threading.Thread(target=work, args=(slot,)) for slot in slots(options.per_device)[: len(jobs)]]
    with Signals() as signals:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not ended.empty():
            if signals.received is not None and not stopping.is_set():
                say(f"{signals.name}: runs save and stop")
                stopping.set()
            try:
                job, outcome = ended.get(timeout=0.2)
            except queue.Empty:
                continue
            summary.add(job, outcome)
    code = summary.close()
    return signals.exit_code if signals.received is not None else code


def slots(per_device: int) -> list[Slot]:
    """One for each GPU, or one for all cores, times `per_device`; they share a GPU's memory or the cores."""
    gpus = visible_gpus()
    if gpus:
        share = {} if per_device == 1 else {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / per_device:.3f}"}
        # The first slots are on different GPUs.
        return [
            Slot(f"gpu {gpu}", {"CUDA_VISIBLE_DEVICES": gpu, **share}, None)
            for _ in range(per_device)
            for gpu in gpus
        ]
    if per_device == 1 or not hasattr(os, "sched_setaffinity"):
        return [Slot("cpu", {}, None)] * per_device
    cores = sorted(os.sched_getaffinity(0))
    shares = [frozenset(cores[at::per_device] or cores) for at in range(per_device)]
    return [Slot(f"cpu {','.join(map(str, sorted(share)))}", {}, share) for share in shares]


def visible_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them, found without starting JAX."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    return found.stdout.split() if found.returncode == 0 else []
