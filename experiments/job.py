"""A job: one program that trains one run, or several seeds of it, from a launcher's slot to its end."""

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import runs
from experiments.runs import LOG, RECORD
from experiments.suite import Plan, PlannedRun
from twister_jax import files

ROOT = Path(__file__).parents[1]
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 300.0
"""How long a job waits for a process that still holds its run, because it is saving, say."""

Job = tuple[PlannedRun, ...]


class Outcome(NamedTuple):
    """How a job ended: `finished`, `failed` or `interrupted`, and what people should know."""

    state: str
    message: str


def title(job: Job) -> str:
    """`SET Pong seed 0`, with all its seeds."""
    seeds = " ".join(str(run.seed) for run in job)
    return f"{job[0].set} {job[0].game} seed{'s' if len(job) > 1 else ''} {seeds}"


def finished(directory: Path, job: Job) -> bool:
    """Whether nothing is left of it."""
    return all(runs.standing(directory / run.directory, run.steps).state == "finished" for run in job)


def command(directory: Path, plan: Plan, job: Job) -> list[str]:
    """What trains it: the ordinary command line, tethered."""
    run = job[0]
    words = [sys.executable, "-m", "experiments.tethered", plan.register, "train"]
    words += ["--agent", run.agent, "--game", run.game, "--preset", run.preset]
    words += ["--seed", str(run.seed), "--logdir", str(directory / run.directory)]
    for name, value in run.overrides.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def run_job(
    directory: Path,
    plan: Plan,
    job: Job,
    device: str = "",
    environment: Mapping[str, str] | None = None,
    attempts: int = 1,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Trains a job to its end, and again where it fails.

    Args:
      directory: of the suite.
      plan: the suite's.
      job: what to train.
      device: where, for people.
      environment: variables of the process, on top of this one's.
      attempts: how often at most.
      stop: asked now and then; once it is true the run is told to save and stop.
      say: takes lines for people.
    """
    message = ""
    for attempt in range(1, attempts + 1):
        if finished(directory, job):
            return Outcome("finished", _scores(directory, job))
        if not _wait_until_free(directory, job, stop):
            return Outcome("interrupted", "it is still trained by another process")
        say(
            f"started {title(job)}{f' on {device}' if device else ''}{f', attempt {attempt}' * (attempt > 1)}"
        )
        code, asked = _train(directory, plan, job, device, environment or {}, attempt, stop)
        if code == 0:
            return Outcome("finished", _scores(directory, job))
        folder = directory / job[0].directory
        message = f"exit code {code}: {runs.last_line(folder) or 'nothing was said'}; log {folder / LOG}"
        if asked:
            return Outcome("interrupted", message)
        if attempt < attempts:
            say(f"failed {title(job)}: {message}; trying again")
    return Outcome("failed", message)


def _train(
    directory: Path,
    plan: Plan,
    job: Job,
    device: str,
    environment: Mapping[str, str],
    attempt: int,
    stop: Callable[[], bool],
) -> tuple[int, bool]:
    """One attempt; returns the exit code, and whether it was told to stop."""
    folders = [directory / run.directory for run in job]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), variables.get("PYTHONPATH"))))
    record: dict[str, Any] = {"host": socket.gethostname(), "device": device, "attempt": attempt}
    record["started"] = _now()
    with files.open_regular(folders[0] / LOG, "ab", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log:
        # Of a session of its own: Ctrl-C is for this process, which then stops the run once, not twice.
        process = subprocess.Popen(
            command(directory, plan, job),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=variables,
            start_new_session=True,
        )
        with process:
            _write(folders, {**record, "state": "running", "pid": process.pid})
            asked = False
            while process.poll() is None:
                try:
                    if stop() and not asked:
                        process.terminate()
                        asked = True
                    time.sleep(_POLL_SECONDS)
                except KeyboardInterrupt:  # how Ray cancels
                    process.terminate()
                    asked = True
    code = process.returncode
    state = "finished" if code == 0 else "interrupted" if asked else "failed"
    last = "" if code == 0 else runs.last_line(folders[0])
    _write(folders, {**record, "state": state, "ended": _now(), "exit_code": code, "last_line": last})
    return code, asked


def _wait_until_free(directory: Path, job: Job, stop: Callable[[], bool]) -> bool:
    """Waits while another process holds the runs; says whether it let go."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while any(_held(directory / run.directory) for run in job):
        if stop() or time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _held(folder: Path) -> bool:
    import fcntl

    try:
        with files.open_regular(folder / "run.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _scores(directory: Path, job: Job) -> str:
    found = [runs.standing(directory / run.directory, run.steps) for run in job]
    scores = " ".join("–" if each.score is None else f"{each.score:g}" for each in found)
    return f"score {scores}"


def _write(folders: Sequence[Path], record: Mapping[str, Any]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it is for people; the run itself says what it cannot write
            files.write_atomically(folder / RECORD, json.dumps(record) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
