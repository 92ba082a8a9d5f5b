"""Where a run is saved when its own directory refuses it."""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.rundir import RunDirectory

if TYPE_CHECKING:
    from twister_jax.training.run import Run


def rescue(run: "Run") -> Path | None:
    """Saves the run as a run directory of its own at the first place that takes it, and says so.

    Returns:
      That directory, below the current one, the home or the one for temporary files; None where all refuse.
    """
    refusals = []
    for parent in dict.fromkeys([*_working_directory(), *_home(), Path(tempfile.gettempdir())]):
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{run.directory.name}-rescued-", dir=parent))
        except OSError as error:
            refusals.append(f"{parent}: {error.strerror}")
            continue
        try:
            RunDirectory(place).write_config(run.config.to_dict())
            with contextlib.suppress(OSError):  # rows are worth less than what was learned
                rows = files.read(run.log.file.path, 1 << 30)
                files.write_durably(place / "metrics.jsonl", rows)
            Checkpointer(place / "checkpoints").save(run.counters.position, run.snapshot())
        except (OSError, UserError) as error:
            refusals.append(f"{parent}: {error}")
            shutil.rmtree(place, ignore_errors=True)
            continue
        run.progress.say(
            f"NOT SAVED in {run.directory}: what was trained up to step {run.counters.env_steps:,} lies in "
            f"{place}"
        )
        return place
    run.progress.say(
        f"NOT SAVED: what was trained up to step {run.counters.env_steps:,} could be written neither to "
        f"{run.directory} nor elsewhere ({'; '.join(refusals)})"
    )
    return None


def _working_directory() -> list[Path]:
    with contextlib.suppress(OSError):  # it was deleted
        return [Path.cwd()]
    return []


def _home() -> list[Path]:
    with contextlib.suppress(RuntimeError):  # no HOME, and no entry in the password file
        return [Path.home()]
    return []
