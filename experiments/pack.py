"""`python -m experiments pack`: what others need to check scores, in one folder with checksums.

The folder holds each run's configuration, metrics and evaluation, with the suite's plan where there is one,
and on request the newest checkpoint's policy. `aggregate` and `plot` read it like the runs themselves.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import runs, suite
from twister_jax import files, foreign_json
from twister_jax.errors import UserError

MANIFEST = "manifest.json"
CONFIG, EVALUATION, METRICS = "config.json", "evaluation.json", "metrics.jsonl"
WEIGHTS = "checkpoints"
_OF_EVERY_ROW = ("env_steps", "updates", "wall_seconds", "phase", "phase_updates")
_MOST_FULL_ROWS = 100
"""Of thinned metrics; the others keep their episodes' scores."""
_DIGITS = 5


def pack(sources: Sequence[Path], target: Path, weights: bool = False, thin: bool = False) -> dict[str, Any]:
    """Copies finished runs into a new folder; returns the manifest it writes.

    Args:
      sources: a suite's directory, which keeps its plan; or runs, packs, and folders of them.
      target: a folder that does not exist yet.
      weights: whether the newest checkpoint of every run goes in, without its replay.
      thin: whether most rows of the metrics keep nothing but the scores of episodes.

    Raises:
      UserError: nothing is finished, two runs are of the same agent, game and seed, or the folder is there,
        or cannot be written.
    """
    root, planned = sources[0], len(sources) == 1 and (sources[0] / suite.PLAN).is_file()
    plan = suite.read_plan(root) if planned else None
    places = {run.directory: root / run.directory for run in plan.runs} if plan else _places(sources)
    done = {place: source for place, source in places.items() if _is_finished(source)}
    if not done:
        raise UserError(f"{', '.join(map(str, sources))}: no finished run, so nothing to pack")
    if target.exists():
        raise UserError(f"{target} is there already: name another --out")
    try:
        target.mkdir(parents=True)
        if plan:
            _copy_file(root / suite.PLAN, target / suite.PLAN)
        for place, source in done.items():
            _copy(source, target / place, place, weights, thin)
        manifest = {
            "suite": plan.suite if plan else target.name,
            "runs": len(done),
            "missing": [place for place in places if place not in done],
            "metrics": "thinned" if thin else "whole",
            **_origins(list(done.values())),
            "files": {
                str(path.relative_to(target)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in _below(target)
            },
        }
        files.write_atomically(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {files.one_line(error)}") from None
    return manifest


def run_directories(root: Path) -> Iterator[Path]:
    """What has a configuration or a score, at and below a folder, in order."""
    for folder, below, found in os.walk(root):
        if CONFIG in found or EVALUATION in found:
            yield Path(folder)
            below.clear()
        below[:] = sorted(set(below) - {WEIGHTS})


def _places(sources: Sequence[Path]) -> dict[str, Path]:
    """Where each run goes, whose suite is not known: AGENT/GAME/seedN.

    Raises:
      UserError: a source holds no runs, or was changed since it was packed, or a place would be another run's
        as well.
    """
    places: dict[str, Path] = {}
    for source in sources:
        if (source / MANIFEST).is_file():
            verify(source)
        found = list(run_directories(source))
        if not found:
            raise UserError(f"{source} holds no runs: name suites, packs, runs or folders of runs")
        for directory in found:
            config = runs.read_json(directory / CONFIG) or {}
            try:
                place = suite.run_directory(str(config["agent"]), str(config["game"]), int(config["seed"]))
                if len(Path(place).parts) != 3 or ".." in Path(place).parts or not place.isprintable():
                    raise ValueError(f"its place would be {place[:60]!r}")  # outside the pack, say
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{directory / CONFIG} is not that of a run: {error!r}") from None
            if place in places:
                raise UserError(f"{places[place]} and {directory} are both {place}: pack them apart")
            places[place] = directory
    return places


def _is_finished(source: Path) -> bool:
    """Whether it has been evaluated after all its steps."""
    train = (runs.read_json(source / CONFIG) or {}).get("train")
    steps = train.get("steps", 0) if isinstance(train, dict) else 0
    return foreign_json.is_number(steps) and runs.standing(source, steps).state == "finished"


def _copy(source: Path, copy: Path, place: str, weights: bool, thin: bool) -> None:
    copy.mkdir(parents=True)
    config = runs.read_json(source / CONFIG) or {}
    # Where it lay on the machine that trained it is nobody's business.
    files.write_atomically(copy / CONFIG, json.dumps({**config, "logdir": place}, indent=2) + "\n")
    _copy_file(source / EVALUATION, copy / EVALUATION)
    if (source / METRICS).is_file():
        if thin:
            text = "".join(json.dumps(row) + "\n" for row in thinned(list(runs.rows(source))))
            files.write_atomically(copy / METRICS, text)
        else:
            _copy_file(source / METRICS, copy / METRICS)
    if weights:
        _copy_weights(source, copy)


def thinned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics of which at most a hundred are whole, rounded; all keep what episodes scored.

    Thinning twice is thinning once.
    """

    def scores(row: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value for name, value in row.items() if name in _OF_EVERY_ROW or name.startswith("episode/")
        }

    whole = [at for at, row in enumerate(rows) if len(scores(row)) < len(row)]
    step = max(1, -(-len(whole) // _MOST_FULL_ROWS))
    kept = set(whole[::-step])  # the newest is among them
    return [
        {name: _rounded(value) for name, value in (row if at in kept else scores(row)).items()}
        for at, row in enumerate(rows)
        if at in kept or len(scores(row)) > 1
    ]


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _copy_weights(source: Path, copy: Path) -> None:
    """The newest checkpoint's state: parameters and optimisers, without the replay."""
    complete = sorted(path for path in (source / WEIGHTS).glob("*/state") if path.is_dir())
    if complete:
        newest = complete[-1]
        files.check_no_link(source / WEIGHTS, newest.parent)
        for path in files.regular_files(newest):
            target = copy / WEIGHTS / path.relative_to(source / WEIGHTS)
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_file(path, target)


def _copy_file(source: Path, target: Path) -> None:
    """What is packed is shown to others: no link may lead to something that was not meant."""
    with files.open_regular(source) as file, open(target, "xb") as copy:
        shutil.copyfileobj(file, copy)


def _origins(done: Sequence[Path]) -> dict[str, list[Any]]:
    """What the runs were made with: every commit, version, device and precision that there is."""
    found = [(runs.evaluation(source) or {}).get("protocol") for source in done]
    protocols = [each for each in found if isinstance(each, dict)]

    def distinct(name: str) -> list[Any]:
        return list(
            {json.dumps(each.get(name), sort_keys=True): each.get(name) for each in protocols}.values()
        )

    names = {"commits": "commit", "versions": "versions", "devices": "device", "precisions": "precision"}
    return {plural: distinct(name) for plural, name in names.items()}


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
        try:
            same = sha256(found[name]) == listed[name]["sha256"]
        except UserError:
            raise
        except (OSError, TypeError, KeyError) as error:
            raise UserError(f"{folder}/{name} cannot be checked: {files.one_line(error)}") from None
        if not same:
            raise UserError(f"{folder}/{name} was changed since it was packed")
