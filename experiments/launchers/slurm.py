"""`--launcher slurm`: an array job whose members are jobs; submitit writes the script, sbatch takes it.

A member that runs out of time, or is preempted, saves and puts itself back into the queue; one that was
cancelled saves and ends.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from experiments import suite
from experiments.job import ROOT, Job, run_job
from experiments.launchers import Options
from twister_jax import files, foreign_json
from twister_jax.errors import UserError
from twister_jax.training.progress import say
from twister_jax.training.signals import Signals

_DEFAULTS: dict[str, Any] = {"time": 2880, "gpus_per_node": 1, "cpus_per_task": 8, "array_parallelism": 256}
"""Minutes and what a run needs at the paper's size; `--slurm NAME=VALUE` changes them and adds others."""

_SECONDS_TO_SAVE = 180
"""Before its time is over, a job is told so."""

_TIME_IS_OVER = signal.SIGURG
"""SLURM signals every process of a job, and a run must be told once: nobody minds this one by default."""


def launch(directory: Path, plan: suite.Plan, jobs: list[Job], options: Options) -> int:
    """Writes an array of these jobs into the suite's directory and submits it."""
    folder = directory / "slurm"
    (folder / "logs").mkdir(parents=True, exist_ok=True)  # SLURM makes none
    number = 1 + max((int(path.stem.split("-")[1]) for path in folder.glob("array-*.json")), default=0)
    array, script = folder / f"array-{number:03d}.json", folder / f"array-{number:03d}.sh"
    text = _script(array, len(jobs), plan.suite, options)  # refuses before anything is written
    members = [[run.directory for run in job] for job in jobs]
    files.write_atomically(
        array,
        json.dumps({"directory": str(directory.absolute()), "attempts": options.attempts, "jobs": members}),
    )
    files.write_atomically(script, text)
    say(f"array of {len(jobs)} jobs → {script}")
    if options.dry_run:
        return 0
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "there is no sbatch on this machine: submit the script on a cluster, or use --dry-run"
        ) from None
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip() or done.stdout.strip()}")
    say(done.stdout.strip())
    return 0


def _script(array: Path, count: int, name: str, options: Options) -> str:
    """The text of an array script.

    Raises:
      UserError: submitit is missing, or knows no such parameter.
    """
    try:
        from submitit.slurm.slurm import _get_default_parameters, _make_sbatch_string
    except ImportError:
        raise UserError(
            "--launcher slurm needs submitit: install it with `pip install 'twister_jax[slurm]'`"
        ) from None
    chosen = {**_DEFAULTS, **({"cpus_per_task": options.cpus} if options.cpus else {})}
    known = _get_default_parameters()
    for word in options.slurm:
        parameter, equals, value = word.partition("=")
        if not equals or parameter not in known:
            raise UserError(f"--slurm {word}: must be NAME=VALUE, with a NAME of {', '.join(sorted(known))}")
        chosen[parameter] = int(value) if value.isdecimal() else value
    if not chosen["gpus_per_node"]:
        del chosen["gpus_per_node"]
    words = [sys.executable, "-m", "experiments", "job", str(array.absolute())]
    return _make_sbatch_string(
        command=f'{shlex.join(words)} "$SLURM_ARRAY_TASK_ID"',
        folder=array.absolute().parent / "logs",
        job_name=name,
        map_count=count,
        setup=[f"export PYTHONPATH={shlex.quote(str(ROOT))}"],
        stderr_to_stdout=True,
        additional_parameters={
            "requeue": True,
            "signal": f"URG@{_SECONDS_TO_SAVE}",
        },
        **chosen,
    )


def run_member(array: Path, index: int) -> int:
    """Trains one job of an array; returns the exit code.

    Raises:
      UserError: the array has no such job.
    """
    try:
        data = foreign_json.parse(files.read(array, 1 << 26))
        directory, attempts, members = Path(data["directory"]), int(data["attempts"]), data["jobs"]
        wanted = list(members[index]) if 0 <= index < len(members) else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{array} cannot be read: {files.one_line(error)}") from None
    plan = suite.read_plan(directory)
    planned = {run.directory: run for run in plan.runs}
    job = tuple(planned[name] for name in wanted if name in planned)
    if not job:
        raise UserError(f"{array} has no job {index}: it has {len(members)}")
    suite.register(plan.register)
    device = f"slurm {os.environ.get('SLURM_ARRAY_JOB_ID', '')}_{index}"
    time_is_over = threading.Event()
    before = signal.signal(_TIME_IS_OVER, lambda *_: time_is_over.set())
    try:
        with Signals() as signals:
            outcome = run_job(
                directory,
                plan,
                job,
                device,
                attempts=attempts,
                stop=time_is_over.is_set,
                told=lambda: signals.received is not None,
            )
    finally:
        signal.signal(_TIME_IS_OVER, before)
    say(f"{outcome.state}: {outcome.message}")
    if outcome.state == "interrupted" and "SLURM_JOB_ID" in os.environ:
        _queue_again(os.environ["SLURM_JOB_ID"])
    return 0 if outcome.state == "finished" else 1


def _queue_again(number: str) -> None:
    """Where the job still runs: SLURM would start one again too that people have cancelled."""
    asked = subprocess.run(["scontrol", "show", "job", "--oneliner", number], capture_output=True, text=True)
    if "JobState=RUNNING" in asked.stdout:
        subprocess.run(["scontrol", "requeue", number], check=False)
