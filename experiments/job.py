"""A job: one program that trains one run, or several seeds of it, from a launcher's slot to its end."""

import contextlib
import datetime
import json
import os
import signal
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
_SECONDS_APART = 2.0
"""Most seconds between the processes of a job receiving the same signal."""

Job = tuple[PlannedRun, ...]


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
      state: `finished`, `failed` or `interrupted`; of a job of several runs, that of those that are left.
      message: what people should know.
      left: runs that are not finished.
    """

    state: str
    message: str
    left: int


def title(job: Job) -> str:
    """`SET Pong seed 0`, with all its seeds."""
    seeds = " ".join(str(run.seed) for run in job)
    return f"{job[0].set} {job[0].game} seed{'s' if len(job) > 1 else ''} {seeds}"


def unfinished(directory: Path, planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Planned runs that are not finished."""
    return [run for run in planned if runs.standing(directory / run.directory, run.steps).state != "finished"]


def command(directory: Path, plan: Plan, job: Job) -> list[str]:
    """What trains it: the ordinary command line, tethered."""
    run = job[0]
    folder = directory / run.directory
    words = [sys.executable, "-m", "experiments.tethered", plan.register, "train"]
    words += ["--agent", run.agent, "--game", run.game, "--preset", run.preset]
    if len(job) == 1:
        words += ["--seed", str(run.seed), "--logdir", str(folder)]
    else:  # `train` puts every seed where the plan has it, in LOGDIR/seedN
        words += ["--seeds", ",".join(str(each.seed) for each in job), "--logdir", str(folder.parent)]
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
    told: Callable[[], bool] = lambda: False,
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
      told: whether somebody else has told it, who tells all processes; twice would end it at once, unsaved.
      say: takes lines for people.
    """
    message = ""
    for attempt in range(1, attempts + 1):
        left = tuple(unfinished(directory, job))
        if not left:
            break
        if not _wait_until_free(directory, left, lambda: stop() or told()):
            return Outcome("interrupted", "it is still trained by another process", len(left))
        again = f", attempt {attempt}" * (attempt > 1)
        say(f"started {title(left)}{f' on {device}' if device else ''}{again}")
        code, asked, reasons = _train(directory, plan, left, device, environment or {}, attempt, stop, told)
        if not reasons:
            break
        why = "; ".join(dict.fromkeys(reasons))
        message = f"exit code {code}: {why}; log {directory / left[0].directory / LOG}"
        if asked:
            return Outcome("interrupted", message, len(reasons))
        if attempt < attempts:
            say(f"failed {title(left)}: {message}; trying again")
    else:
        return Outcome("failed", message, len(reasons))
    return Outcome("finished", _scores(directory, job), 0)


def _train(
    directory: Path,
    plan: Plan,
    job: Job,
    device: str,
    environment: Mapping[str, str],
    attempt: int,
    stop: Callable[[], bool],
    told: Callable[[], bool],
) -> tuple[int, bool, list[str]]:
    """One attempt; returns the exit code, whether it was told to stop, and of each run that is left why."""
    folders = [directory / run.directory for run in job]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), variables.get("PYTHONPATH"))))
    record: dict[str, Any] = {"host": socket.gethostname(), "device": device, "attempt": attempt}
    record["started"] = _now()
    with files.open_regular(folders[0] / LOG, "ab", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log:
        begins = log.tell()
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
            for folder in folders:
                _write(folder, folders[0], {**record, "state": "running", "pid": process.pid})
            asked = False
            while process.poll() is None:
                try:
                    if not asked and stop():
                        process.terminate()
                        asked = True
                    asked = asked or told()
                    time.sleep(_POLL_SECONDS)
                except KeyboardInterrupt:  # how Ray cancels
                    process.terminate()
                    asked = True
    code = process.returncode
    asked = asked or (code == 128 + signal.SIGTERM and _within(_SECONDS_APART, told))
    record |= {"ended": _now(), "exit_code": code}
    left = unfinished(directory, job) if code else []
    reasons = []
    for run, folder in zip(job, folders, strict=True):
        if run not in left:
            _write(folder, folders[0], {**record, "state": "finished"})
            continue
        reasons.append(runs.last_line(folders[0], begins, f"seed {run.seed} stops:") or "nothing was said")
        state = "interrupted" if asked else "failed"
        _write(folder, folders[0], {**record, "state": state, "last_line": reasons[-1]})
    return code, asked, reasons


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


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


def _write(folder: Path, of_log: Path, record: Mapping[str, Any]) -> None:
    """Leaves a record in a run's directory, with the way to the log that it shares with the job's others."""
    record = {**record, "log": os.path.relpath(of_log / LOG, folder)}
    with contextlib.suppress(OSError):  # it is for people; the run itself says what it cannot write
        files.write_atomically(folder / RECORD, json.dumps(record) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
