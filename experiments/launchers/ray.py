"""`--launcher ray`: every job a Ray task, on a cluster that is there or on one started on this machine.

Ray places the tasks and starts those of a lost worker or node again, elsewhere if need be. The suite's
directory must lie on storage that all nodes share: there the run goes on from its newest checkpoint.
"""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.job import ROOT, Job, Outcome, run_job
from experiments.launchers import Options, Summary
from experiments.suite import Plan
from twister_jax.errors import UserError
from twister_jax.files import one_line
from twister_jax.training.progress import say
from twister_jax.training.signals import Signals

_SECONDS_TO_ANSWER = 10.0
_STORE_BYTES = 100_000_000  # of Ray's object store, through which nothing but names goes


def launch(directory: Path, plan: Plan, jobs: list[Job], options: Options) -> int:
    """Gives all jobs to Ray and waits; a signal stops them, and what ran goes on next time."""
    with _cluster(options.address) as ray:
        needs = _needs(ray, options)
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / options.per_device:.3f}"}
        environment = share if options.per_device > 1 and needs["num_gpus"] else {}
        # A worker trains one job, so that a task that was lost leaves nothing to the next one.
        train = ray.remote(max_retries=-1, max_calls=1, scheduling_strategy="SPREAD", **needs)(_train)
        path = directory.absolute()
        tasks = {train.remote(path, plan, job, environment, options.attempts): job for job in jobs}
        address = ray.get_runtime_context().gcs_address
        say(f"{len(tasks)} jobs at Ray {address}, each with {_show(needs)}")
        summary = Summary(jobs)
        with Signals() as signals:
            stopping = False
            while tasks:
                if signals.received is not None and not stopping:
                    say(f"{signals.name}: runs save and stop")
                    stopping = True
                    for task in tasks:
                        ray.cancel(task, force=False)
                done, _ = ray.wait(list(tasks), timeout=0.5)
                for task in done:
                    outcome = _outcome(ray, task, len(tasks[task]))
                    if outcome is not None:
                        summary.add(tasks[task], outcome)
                    del tasks[task]
        code = summary.close()
        return signals.exit_code if signals.received is not None else code


def _train(directory: Path, plan: Plan, job: Job, environment: dict[str, str], attempts: int) -> Outcome:
    """What a worker does."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return run_job(directory, plan, job, f"gpu {device}" if device else "cpu", environment, attempts)


def _outcome(ray: Any, task: Any, runs: int) -> Outcome | None:
    """How a task ended; None where it was cancelled before it began."""
    try:
        return ray.get(task)
    except ray.exceptions.TaskCancelledError:
        return None
    except ray.exceptions.RayError as error:
        return Outcome("failed", one_line(error), runs)


def _needs(ray: Any, options: Options) -> dict[str, float]:
    """What a run asks for: a share of a GPU where there are any, and otherwise of a node's cores."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU") for node in nodes):
        return {"num_gpus": 1 / options.per_device, "num_cpus": options.cpus or 1}
    smallest = min(int(node.get("CPU", 1)) for node in nodes)
    return {"num_gpus": 0, "num_cpus": options.cpus or max(1, smallest // options.per_device)}


def _show(needs: dict[str, float]) -> str:
    gpus = f"{needs['num_gpus']:g} GPU and " if needs["num_gpus"] else ""
    return f"{gpus}{needs['num_cpus']:g} cores"


# ------------------------------------------------------------------------------------------------ clusters


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster, or to one of this machine's own that ends with the context.

    Raises:
      UserError: Ray is missing, or no cluster answers.
    """
    if not address:
        _keep_to_this_machine()
    try:
        import ray
    except ImportError:
        raise UserError(
            "--launcher ray needs Ray: install it with `pip install 'twister_jax[ray]'`"
        ) from None
    folder = None if address else tempfile.mkdtemp(prefix="ray-")
    own: dict[str, Any] = {
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
        "_temp_dir": folder,
    }
    try:
        if address:
            _check(address)
        ray.init(
            **({"address": address} if address else own),
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        yield ray
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {one_line(error)}") from error
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _keep_to_this_machine() -> None:
    """Before Ray is imported: loopback only, for who knows the token; nothing reported, or left in the home.

    Whoever reaches a Ray cluster can run anything on it. Ray offers loopback on macOS and Windows by default,
    under a name to match.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def _check(address: str) -> None:
    """Refuses an address where nothing listens; Ray itself tries for minutes, and then ends the process.

    Raises:
      UserError: nothing answers there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        if address == "auto":
            return
        raise UserError(f"--address {address}: must be HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({one_line(error)}): start one with `ray start --head`, "
            "or leave --address out"
        ) from None
