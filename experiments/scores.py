"""Scores of many runs, read from their directories and kept apart by set; and those that were published."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import pack, runs, suite
from experiments.statistics import Scores
from twister_jax.config import TrainConfig
from twister_jax.errors import UserError
from twister_jax.fields import describe, did_you_mean
from twister_jax.files import one_line
from twister_jax.foreign_json import is_number

PUBLISHED = Path(__file__).parent / "published.json"

# What may differ between runs whose scores belong together.
_OF_A_GAME = {"random_score", "human_score", "best_score"}
_REFERENCES = {"random_score", "human_score"}
_NUMBERS = {"frame_skip", *_REFERENCES}
_OF_A_RUN = {"games_cut_by_time_limit", "game_lengths", "notes", "device", "versions", "commit"}
_LOGGING = {name for name, field in describe(TrainConfig()).items() if field.changeable} - {"steps"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
      directory: where it lies; None for a published score.
      score: mean of its evaluation games.
      env_steps: agent steps behind it; 0 where not known.
    """

    directory: Path | None
    game: str
    seed: int
    score: float
    env_steps: int = 0


@dataclasses.dataclass(frozen=True)
class ScoreSet:
    """Runs whose scores belong together.

    Attributes:
      name: of the set.
      runs: by game, each game's by seed.
      references: game -> (what counts as 0, what counts as 1).
      protocol: how the games were played, without what differs from run to run.
      frame_skip: emulator frames per agent step.
      missing: runs that should be there and are not.
      per_seed: whether every seed's score is known; otherwise there is a mean per game.
    """

    name: str
    runs: Mapping[str, tuple[Run, ...]]
    references: Mapping[str, tuple[float, float]]
    protocol: Mapping[str, Any]
    frame_skip: int = 1
    missing: tuple[str, ...] = ()
    per_seed: bool = True

    @property
    def count(self) -> int:
        """Runs in it."""
        return sum(map(len, self.runs.values()))

    def raw(self, game: str) -> np.ndarray:
        """Scores [seed] of a game."""
        return np.array([run.score for run in self.runs[game]])

    def normalize(self, game: str, scores: Any) -> Any:
        """Scores of a game so that its references are 0 and 1."""
        low, high = self.references[game]
        return (scores - low) / (high - low)

    def normalized(self, games: Iterable[str] | None = None) -> Scores:
        """Normalised scores, one array [seed] per game, of all games or of these."""
        return [self.normalize(game, self.raw(game)) for game in (self.runs if games is None else games)]


def common_games(ours: ScoreSet, theirs: ScoreSet) -> list[str]:
    """Games that both have."""
    return [game for game in ours.runs if game in theirs.runs]


# -------------------------------------------------------------------------------------------- published


@functools.cache
def _published() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def published_names() -> tuple[str, ...]:
    """Sets of published scores."""
    return tuple(_published()["sets"])


def published(name: str) -> ScoreSet:
    """Published scores of an agent; games without a score are left out.

    Raises:
      UserError: none of this name are known.
    """
    sets = _published()["sets"]
    if name not in sets:
        near = did_you_mean(name, sets)
        raise UserError(f"no published scores of {name!r}{near}; there are those of {', '.join(sets)}")
    data, references = sets[name], _published()["references"]
    scored = {game: scores for game, scores in sorted(data["scores"].items()) if scores}
    return ScoreSet(
        name=f"{name} (published)",
        runs={
            game: tuple(Run(None, game, seed, float(score)) for seed, score in enumerate(scores))
            for game, scores in scored.items()
        },
        references={game: (low, high) for game, (low, high) in references.items()},
        protocol={name: data[name] for name in ("paper", "url", "scores_are")},
        missing=tuple(game for game, scores in data["scores"].items() if not scores),
        per_seed=data["per_seed"],
    )


# ------------------------------------------------------------------------------------------- directories


@dataclasses.dataclass(frozen=True)
class _Found:
    """A run directory, with what is expected to be in it."""

    directory: Path
    set: str
    label: str
    score_range: tuple[float, float] | None = None


def read_sets(words: Sequence[str], partial: bool = False) -> list[ScoreSet]:
    """The sets of runs in some directories.

    Args:
      words: directories of suites, packs, folders of runs, or runs; as `NAME=DIRECTORY`, all of it is one set
        of that name. A folder that no suite has made has one set per agent.
      partial: whether missing runs are left out and counted, where otherwise they are refused.

    Raises:
      UserError: there are no runs, some are missing, some do not belong together, or a game has no reference
        scores.
    """
    evaluated: dict[str, list[tuple[_Found, dict[str, Any]]]] = {}
    missing: dict[str, list[str]] = {}
    for word in words:
        name, equals, directory = word.rpartition("=")
        found = list(_find(Path(directory), name if equals else ""))
        if not found:
            raise UserError(
                f"{directory} holds no runs: name a suite's directory, a pack or a folder of runs"
            )
        for each in found:
            result = _finished(each.directory)
            if result is None:
                missing.setdefault(each.set or _agent(each.directory), []).append(each.label)
            else:
                evaluated.setdefault(each.set or str(result["agent"]), []).append((each, result))
    sets = [_collect(name, pairs, missing.get(name, [])) for name, pairs in evaluated.items()]
    gaps = [f"{name}: {label}" for name in missing for label in missing[name] if name not in evaluated]
    gaps += [f"{each.name}: {label}" for each in sets for label in each.missing]
    listed = ", ".join(gaps[:4]) + (f" and {len(gaps) - 4} more" if len(gaps) > 4 else "")
    if not sets:
        raise UserError(f"no run is finished: {listed}")
    if gaps and not partial:
        total = len(gaps) + sum(each.count for each in sets)
        raise UserError(
            f"{len(gaps)} of {total} runs are missing or unfinished ({listed}): "
            "run the suite again, or count without them by --partial"
        )
    return sets


def _find(root: Path, name: str) -> Iterator[_Found]:
    """Run directories at and below `root`: what plans name, and what has a configuration or a score."""
    for folder, below, found in os.walk(root):
        directory = Path(folder)
        if pack.MANIFEST in found:
            pack.verify(directory)
        if suite.PLAN in found:
            plan = suite.read_plan(directory)
            for run in plan.runs:
                label = f"{run.game} seed {run.seed}"
                yield _Found(directory / run.directory, name or run.set, label, plan.score_range)
            below.clear()
        elif pack.CONFIG in found or pack.EVALUATION in found:
            yield _Found(directory, name, str(directory))
            below.clear()
        below[:] = sorted(set(below) - {pack.WEIGHTS})  # which have manifests of their own


def _agent(directory: Path) -> str:
    return str((runs.read_json(directory / "config.json") or {}).get("agent", "unknown"))


def _finished(directory: Path) -> dict[str, Any] | None:
    """evaluation.json of a run that has all its steps, with its comparable settings under `config`.

    Raises:
      UserError: it is not the record of an evaluation.
    """
    result = runs.evaluation(directory)
    if result is None:
        return None
    config = runs.read_json(directory / "config.json") or {}
    try:
        _check_types(result)
        if result["env_steps"] < config.get("train", {}).get("steps", 0):
            return None
        train = {name: value for name, value in config.get("train", {}).items() if name not in _LOGGING}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}/evaluation.json is not that of a run: {one_line(error)}") from None
    config = {name: value for name, value in config.items() if name not in ("game", "seed", "logdir")}
    return {**result, "config": {**config, "train": train} if config else {}}


def _check_types(result: Mapping[str, Any]) -> None:
    """Raises `KeyError` or `ValueError` unless the record of an evaluation has all that is read of it."""
    protocol = result["protocol"]
    if not isinstance(protocol, dict):
        raise ValueError("protocol is no object")
    for name in ("game", "agent"):
        if not isinstance(result[name], str) or not result[name].isprintable():
            raise ValueError(f"{name} = {str(result[name])[:40]!r}")
    for name in ("seed", "env_steps"):
        if not is_number(result[name], int) or result[name] < 0:
            raise ValueError(f"{name} = {str(result[name])[:40]!r}")
    numbers = {name: protocol[name] for name in _NUMBERS if protocol.get(name) is not None}
    for name, value in {"mean": result["mean"], **numbers}.items():
        if not is_number(value):
            raise ValueError(f"{name} = {str(value)[:40]!r}")
    if numbers.get("frame_skip", 1) < 1:
        raise ValueError(f"frame_skip = {numbers['frame_skip']}")
    if len(numbers.keys() & _REFERENCES) == 2 and len({numbers[name] for name in _REFERENCES}) == 1:
        raise ValueError("random_score and human_score are equal")


def _collect(name: str, pairs: Sequence[tuple[_Found, dict[str, Any]]], unfinished: list[str]) -> ScoreSet:
    _check_protocols(name, pairs)
    games: dict[str, dict[int, Run]] = {}
    references: dict[str, tuple[float, float]] = {}
    for found, result in pairs:
        game, seed = result["game"], int(result["seed"])
        references[game] = references.get(game) or _references(found, result)
        known = games.setdefault(game, {}).setdefault(
            seed, Run(found.directory, game, seed, float(result["mean"]), result["env_steps"])
        )
        if known.directory != found.directory:
            raise UserError(
                f"{known.directory} and {found.directory} are both {game} seed {seed} of the set {name}: "
                "leave one out, or name them apart as NAME=DIRECTORY"
            )
    seeds = sorted({seed for runs_of_game in games.values() for seed in runs_of_game})
    uneven = [
        label
        for game, runs_of_game in games.items()
        for seed in seeds
        if seed not in runs_of_game and (label := f"{game} seed {seed}") not in unfinished
    ]
    protocol = _shared([_of_set(result["protocol"]) for _, result in pairs])
    return ScoreSet(
        name=name,
        runs={game: tuple(games[game][seed] for seed in sorted(games[game])) for game in sorted(games)},
        references=references,
        protocol=protocol,
        frame_skip=int(protocol.get("frame_skip", 1)),
        missing=(*unfinished, *uneven),
    )


def _references(found: _Found, result: dict[str, Any]) -> tuple[float, float]:
    protocol = result["protocol"]
    if protocol.get("random_score") is not None and protocol.get("human_score") is not None:
        return float(protocol["random_score"]), float(protocol["human_score"])
    if found.score_range is None:
        raise UserError(
            f"{result['game']} has no reference scores, so it cannot be normalised: "
            "give its suite file a score_range = [LOW, HIGH]"
        )
    return found.score_range


# --------------------------------------------------------------------------------------------- protocols


def _of_set(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol record without what each run or game has of its own."""
    return {name: value for name, value in protocol.items() if name not in _OF_A_RUN | _OF_A_GAME}


def _shared(protocols: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all agree on."""
    first = protocols[0]
    return {
        name: value for name, value in first.items() if all(each.get(name) == value for each in protocols)
    }


def _check_protocols(name: str, pairs: Sequence[tuple[_Found, dict[str, Any]]]) -> None:
    """Refuses scores that do not belong together.

    Runs of a game must agree in everything; games of one environment suite, whose records may have fields of
    their own, in their settings, games and steps.

    Raises:
      UserError: which runs differ, and in what.
    """
    seen: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for found, result in pairs:
        protocol, config = result["protocol"], result["config"]
        settings = {
            "config": config or protocol.get("settings"),
            "agent": result["agent"],
            "games": result.get("episodes"),
            "env_steps": result["env_steps"],
        }
        of_game = {**settings, "protocol": _of_set(protocol)}
        for key, mine in (
            (("game", result["game"]), of_game),
            (("suite", str(protocol.get("suite"))), settings),
        ):
            other, theirs = seen.setdefault(key, (found.directory, mine))
            if mine != theirs:
                field, here, there = _difference(mine, theirs)
                raise UserError(
                    f"the set {name} mixes protocols: {field} is {there} in {other} and {here} in "
                    f"{found.directory}; name them apart as NAME=DIRECTORY"
                )


def _difference(mine: Any, theirs: Any, name: str = "") -> tuple[str, str, str]:
    """The first field that differs, and its two values."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in (*mine, *theirs):
            if mine.get(key) != theirs.get(key):
                return _difference(mine.get(key), theirs.get(key), f"{name}.{key}" if name else str(key))
    return name, str(mine)[:60], str(theirs)[:60]


def differing_protocols(ours: ScoreSet, theirs: ScoreSet) -> list[str]:
    """Fields in which two sets were not evaluated alike, `settings` left out, which repeat them."""
    names = [name for name in ours.protocol if name in theirs.protocol and name != "settings"]
    return [name for name in names if ours.protocol[name] != theirs.protocol[name]]
