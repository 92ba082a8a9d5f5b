"""A suite: a small file that says which runs there are; and the plan that it becomes in its directory.

```toml
preset = "paper"                      # of every run
games = ["Pong", "Boxing"]
seeds = [0, 1, 2, 3, 4]
overrides = { precision = "float32" } # fields of every run, by dotted name
score_range = [-1, 1]                 # what counts as 0 and 1 in games without human scores
register = "my_package:register"      # called first, where agents or suites are your own

[sets.NAME]                           # at least one: runs whose scores belong together
agent = "..."
overrides = { "train.steps" = 1000 }  # of this set, on top
```
"""

import dataclasses
import importlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twister_jax import files, foreign_json, presets
from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean

SUITES = Path(__file__).parent / "suites"
PLAN = "suite.json"
_MOST_BYTES, _MOST_BYTES_OF_A_SUITE = 1 << 26, 1 << 16  # of a plan, of what people write
_SET_NAME = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Set:
    """Runs whose scores belong together: an agent under settings."""

    agent: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Games × seeds × sets; the fields are those of the file above."""

    name: str
    preset: str
    games: tuple[str, ...]
    seeds: tuple[int, ...]
    sets: Mapping[str, Set]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    score_range: tuple[float, float] | None = None
    register: str = ""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a suite.

    Attributes:
      directory: of the run, below the suite's.
      set: name of its set.
      agent, preset, game, seed, overrides: what `train` is told.
      steps: agent steps that it will have.
    """

    directory: str
    set: str
    agent: str
    preset: str
    game: str
    seed: int
    steps: int
    overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a suite's directory is to hold, as suite.json has it."""

    suite: str
    runs: tuple[PlannedRun, ...]
    score_range: tuple[float, float] | None = None
    register: str = ""


# ------------------------------------------------------------------------------------------------ reading


def names() -> list[str]:
    """The suites that are ready."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def load(name: str) -> Suite:
    """A suite by name, or by the path of a file of one's own.

    Raises:
      UserError: there is none, or the file says something else than a suite.
    """
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    if not path.is_file():
        near = did_you_mean(name, names())
        raise UserError(f"unknown suite {name!r}{near}; one of {', '.join(names())}, or a .toml file")
    try:
        data = files.read(path.resolve(), _MOST_BYTES_OF_A_SUITE)
        return _parse(path.stem, tomllib.loads(data.decode("utf-8")))
    except (OSError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is not a suite: {files.one_line(error)}") from None


def _parse(name: str, data: dict[str, Any]) -> Suite:
    known = {field.name for field in dataclasses.fields(Suite)} - {"name"}
    for key in data:
        if key not in known:
            raise ValueError(f"unknown field {key}{did_you_mean(key, known)}")
    for key, kind in (("preset", str), ("games", list), ("seeds", list), ("sets", dict)):
        if not data.get(key) or not isinstance(data[key], kind):
            raise ValueError(f"{key} is missing, empty or no {kind.__name__}")
    if not all(type(seed) is int and 0 <= seed < 2**32 for seed in data["seeds"]):
        raise ValueError("seeds are whole numbers from 0 to 4294967295")
    for name_of_set, each in data["sets"].items():
        if not _SET_NAME.fullmatch(name_of_set):  # it is a directory
            raise ValueError(f"set {name_of_set[:60]!r}: must be letters, digits and . _ + - after the first")
        if not isinstance(each, dict) or not isinstance(each.get("agent", ""), str):
            raise ValueError(f"set {name_of_set} names no agent")
        if not isinstance(each.get("overrides", {}), dict):
            raise ValueError(f"overrides of set {name_of_set} are no dict")
    for key, kind in (("overrides", dict), ("register", str)):
        if not isinstance(data.get(key, kind()), kind):
            raise ValueError(f"{key} is no {kind.__name__}")
    score_range = data.get("score_range")
    if score_range is not None and not -1e15 < float(score_range[0]) < float(score_range[1]) < 1e15:
        raise ValueError(f"score_range = {score_range}: must be [LOW, HIGH]")
    return Suite(
        name=name,
        preset=data["preset"],
        games=tuple(map(str, data["games"])),
        seeds=tuple(dict.fromkeys(data["seeds"])),
        sets={each: Set(**values) for each, values in data["sets"].items()},
        overrides=data.get("overrides", {}),
        score_range=None if score_range is None else (float(score_range[0]), float(score_range[1])),
        register=data.get("register", ""),
    )


def narrow(
    suite: Suite, games: Sequence[str] = (), seeds: Sequence[int] = (), sets: Sequence[str] = ()
) -> Suite:
    """The requested part of a suite; an empty argument selects everything.

    Raises:
      UserError: the suite has no such game or set. Seeds are anybody's choice.
    """
    spelled = {game.lower().replace("_", ""): game for game in suite.games}
    chosen = []
    for game in games:
        if game.lower().replace("_", "") not in spelled:
            near = did_you_mean(game, suite.games)
            raise UserError(f"{suite.name} has no game {game!r}{near}; it has {', '.join(suite.games)}")
        chosen.append(spelled[game.lower().replace("_", "")])
    for name in sets:
        if name not in suite.sets:
            near = did_you_mean(name, suite.sets)
            raise UserError(f"{suite.name} has no set {name!r}{near}; it has {', '.join(suite.sets)}")
    return dataclasses.replace(
        suite,
        games=tuple(dict.fromkeys(chosen)) or suite.games,
        seeds=tuple(dict.fromkeys(seeds)) or suite.seeds,
        sets={name: suite.sets[name] for name in sets} or suite.sets,
    )


# ----------------------------------------------------------------------------------------------- planning


def register(what: str) -> None:
    """Calls a suite's `MODULE:FUNCTION`, which adds its own agents and environments.

    Raises:
      UserError: there is no such function.
    """
    if not what:
        return
    module, _, function = what.partition(":")
    try:
        getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"register = {what!r}: {files.one_line(error)}; it must be MODULE:FUNCTION") from None


def run_directory(name: str, game: str, seed: int) -> str:
    """Of a run of the set `name`, below its suite's."""
    return f"{name}/{game.replace(':', '-').replace('/', '-')}/seed{seed}"


def plan(suite: Suite) -> Plan:
    """Every run of a suite, validated as the training command does.

    Raises:
      UserError: an agent, a game, a preset or a field that does not exist, or cannot work.
    """
    register(suite.register)
    runs = []
    for name, chosen in suite.sets.items():
        overrides = {**suite.overrides, **chosen.overrides}
        for game in suite.games:
            try:
                config = presets.make_config(chosen.agent, suite.preset, game, **overrides)
                presets.validate(config)
            except UserError as error:
                raise UserError(f"{suite.name}, set {name}, {game}: {error}") from None
            runs += [
                PlannedRun(
                    directory=run_directory(name, config.game, seed),
                    set=name,
                    agent=chosen.agent,
                    preset=suite.preset,
                    game=config.game,
                    seed=seed,
                    steps=config.train.steps,
                    overrides=overrides,
                )
                for seed in suite.seeds
            ]
    return Plan(suite.name, tuple(runs), suite.score_range, suite.register)


def write_plan(directory: Path, new: Plan) -> None:
    """Writes suite.json; runs that it already had stay planned.

    Raises:
      UserError: it cannot be written, or is another suite's.
    """
    known: dict[str, PlannedRun] = {}
    if (directory / PLAN).exists():
        before = read_plan(directory)
        if before.suite != new.suite:
            raise UserError(f"{directory} belongs to the suite {before.suite}: name another --root")
        known = {run.directory: run for run in before.runs}
    known |= {run.directory: run for run in new.runs}
    whole = dataclasses.replace(new, runs=tuple(known.values()))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files.write_atomically(directory / PLAN, json.dumps(dataclasses.asdict(whole), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{directory / PLAN} cannot be written: {files.one_line(error)}") from None


def read_plan(directory: Path) -> Plan:
    """What `write_plan` wrote.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = directory / PLAN
    try:
        data = foreign_json.parse(files.read(path, _MOST_BYTES))
        limits = data.pop("score_range")
        runs = tuple(PlannedRun(**run) for run in data.pop("runs"))
        found = Plan(runs=runs, score_range=limits and (float(limits[0]), float(limits[1])), **data)
        _check_types(found)
    except FileNotFoundError:
        raise UserError(f"{directory} is not a suite's directory: it has no {PLAN}") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {files.one_line(error)}") from None
    except OverflowError:
        raise UserError(f"{path} cannot be read: it is not one that this program wrote") from None
    linked: dict[Path, None] = {}
    for run in found.runs:  # it may come from a stranger
        inside = Path(run.directory)
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(f"{path} names {run.directory}, which lies outside")
        linked |= dict.fromkeys(directory / each for each in (*inside.parents, inside)[::-1] if each.parts)
    files.check_no_link(*linked)
    return found


def _check_types(plan: Plan) -> None:
    """Raises `ValueError` where a field has another type than this program writes."""
    texts = [plan.suite, plan.register]
    counts = []
    for run in plan.runs:
        texts += [run.directory, run.set, run.agent, run.preset, run.game]
        counts += [run.seed, run.steps]
        if not isinstance(run.overrides, dict):
            raise ValueError(f"overrides = {str(run.overrides)[:40]!r}")
    for text in texts:
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(f"{str(text)[:40]!r} in place of a name")
    for count in counts:
        if type(count) is not int or not 0 <= count < 2**53:
            raise ValueError(f"{str(count)[:40]!r} in place of a count")
    if plan.score_range is not None and not (-1e15 < plan.score_range[0] < plan.score_range[1] < 1e15):
        raise ValueError(f"score_range = {plan.score_range}")


def find(name: str, root: str) -> Path:
    """The directory of a suite: a path to it, or its name below `root`.

    Raises:
      UserError: there is none.
    """
    candidates = [Path(name), Path(root) / Path(name).stem]
    for candidate in candidates:
        if (candidate / PLAN).is_file():
            return candidate
    raise UserError(f"no suite has been started in {candidates[1]}: `python -m experiments run {name}`")


def grouped(runs: Iterable[PlannedRun], size: int) -> list[tuple[PlannedRun, ...]]:
    """Runs that differ by their seeds alone, `size` and `size` together.

    The first of every game and set come before the second of any, which then find their programs compiled;
    and early on there is a score of everything.
    """
    together: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        together.setdefault((run.set, run.game), []).append(run)
    parts = [[tuple(same[at : at + size]) for at in range(0, len(same), size)] for same in together.values()]
    return [part for turn in itertools.zip_longest(*parts) for part in turn if part]
