"""`python -m experiments pack`: what others need to check a suite's numbers, in one folder with checksums.

The folder holds each run's configuration, metrics and evaluation, with the suite's plan, and on request the
newest checkpoint's policy. `aggregate` and `plot` read it like the suite's own directory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import runs, suite
from twister_jax import files
from twister_jax.errors import UserError

MANIFEST = "manifest.json"
FILES = ("config.json", "evaluation.json", "metrics.jsonl")
WEIGHTS = "checkpoints"


def pack(directory: Path, target: Path, weights: bool = False) -> dict[str, Any]:
    """Copies the finished runs of a suite into a new folder; returns the manifest it writes.

    Args:
      directory: the suite's.
      target: a folder that is not there yet.
      weights: whether the newest checkpoint of every run goes in, without its replay.

    Raises:
      UserError: nothing is finished, or the folder is there, or cannot be written.
    """
    plan = suite.read_plan(directory)
    finished = [run for run in plan.runs if runs.evaluation(directory / run.directory) is not None]
    if not finished:
        raise UserError(f"{directory} has no finished run: nothing to pack")
    if target.exists():
        raise UserError(f"{target} is there already: name another --out")
    try:
        target.mkdir(parents=True)
        shutil.copyfile(directory / suite.PLAN, target / suite.PLAN)
        for run in finished:
            source, copy = directory / run.directory, target / run.directory
            copy.mkdir(parents=True)
            for name in FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, copy / name)
            if weights:
                _copy_weights(source, copy)
        manifest = _manifest(plan, len(finished), directory, target)
        files.write_atomically(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {files.one_line(error)}") from None
    return manifest


def _copy_weights(source: Path, copy: Path) -> None:
    """The newest checkpoint's state: parameters and optimisers, without the replay."""
    complete = sorted(path for path in (source / WEIGHTS).glob("*/state") if path.is_dir())
    if complete:
        shutil.copytree(complete[-1], copy / WEIGHTS / complete[-1].parent.name / "state")


def _manifest(plan: suite.Plan, finished: int, directory: Path, target: Path) -> dict[str, Any]:
    protocols = [
        result["protocol"]
        for run in plan.runs
        if (result := runs.evaluation(directory / run.directory)) is not None
    ]

    def distinct(name: str) -> list[Any]:
        return list(
            {json.dumps(each.get(name), sort_keys=True): each.get(name) for each in protocols}.values()
        )

    return {
        "suite": plan.suite,
        "runs": finished,
        "missing": [run.directory for run in plan.runs if not (target / run.directory).is_dir()],
        "commits": distinct("commit"),
        "versions": distinct("versions"),
        "devices": distinct("device"),
        "precisions": distinct("precision"),
        "files": {
            str(path.relative_to(target)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in _below(target)
        },
    }


def _below(folder: Path) -> Iterator[Path]:
    for parent, below, names in os.walk(folder):
        below.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path != folder / MANIFEST:
                yield path


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> None:
    """Checks a pack against its manifest.

    Raises:
      UserError: a file is missing, was changed, or was added.
    """
    manifest = runs.read_json(folder / MANIFEST)
    listed = manifest.get("files") if manifest else None
    if not isinstance(listed, dict):
        raise UserError(f"{folder / MANIFEST} is not that of a pack")
    found = {str(path.relative_to(folder)): path for path in _below(folder)}
    for name in (*listed, *found):
        if name not in found:
            raise UserError(f"{folder} is incomplete: {name} is missing")
        if name not in listed:
            raise UserError(f"{folder} holds {name}, which its manifest does not know")
        if sha256(found[name]) != listed[name].get("sha256"):
            raise UserError(f"{folder}/{name} was changed since it was packed")
