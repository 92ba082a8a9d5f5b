"""From names to a whole configuration: presets, `config.json`, validation, and what differs from the paper.

Nothing here imports JAX, so that the command line answers at once.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from twister_jax import agents, envs, fields, files, foreign_json
from twister_jax.config import Config, EvaluationConfig, ParallelConfig, Precision, ReplayConfig, TrainConfig
from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean, show
from twister_jax.files import UnsafePathError

MOST_UPDATES = 2**31 - 1
"""Optimisers and health count in 32 bits."""

_WHERE = ("parallel.coordinator", "parallel.processes", "parallel.process")

AUTO = "auto"
"""Chooses a preset by the machine's devices."""


def make_config(
    agent: str = agents.DEFAULT_AGENT,
    preset: str = "paper",
    game: str = envs.DEFAULT_GAME,
    **overrides: Any,
) -> Config:
    """An agent's preset with some fields replaced.

    Args:
      agent: a name in `agents.AGENTS`.
      preset: one of the agent's: `paper` (as published), `cpu`, `debug`.
      game: `NAME` or `SUITE:NAME`, however spelled.
      **overrides: new values by dotted name, as in `make_config(**{"train.steps": 500})`.

    Raises:
      UserError: an unknown agent, preset, game or field.
    """
    package = agents.package(agent)
    if preset not in package.presets:
        near = did_you_mean(preset, package.presets)
        raise UserError(f"unknown preset {preset!r}{near}; one of {', '.join(package.presets)}")
    chosen = package.presets[preset]
    suite, _ = envs.resolve(game)
    config = Config(
        game=envs.full_name(game),
        agent=agent,
        preset=preset,
        env=suite.settings,
        train=TrainConfig(),
        replay=ReplayConfig(),
        evaluation=EvaluationConfig(),
        parallel=ParallelConfig(),
        algorithm=chosen.algorithm,
    )
    of_suite = {field.name for field in dataclasses.fields(suite.settings)}
    of_env = {f"env.{name}": value for name, value in chosen.env.items() if name in of_suite}
    of_agent = (chosen.suites.get(suite.name, {}), chosen.suites.get(config.game, {}))
    for settings in (chosen.shared, suite.presets.get(preset, {}), of_env, *of_agent):
        config = fields.replace(config, settings)
    return fields.replace(config, overrides)


def complete(config: Config) -> Config:
    """Fills in what the user left open: precision, by the kind of device, and the run directory."""
    from twister_jax.runtime import resolve_precision

    game = config.game.replace(":", "-").replace("/", "-")
    logdir = config.logdir or f"runs/{config.agent}-{game}-{config.preset}-seed{config.seed}"
    precision = cast(Precision, resolve_precision(config.precision))
    return dataclasses.replace(config, precision=precision, logdir=logdir)


def different_from_paper(config: Config) -> list[str]:
    """Settings that differ from the published ones, which are given in brackets."""
    published = dataclasses.replace(make_config(config.agent, "paper", config.game), precision="float32")
    return [
        f"{name} {show(new)} ({show(old)})"
        for name, (new, old) in fields.differences(config, published).items()
        if name not in ("game", "agent", "preset", "seed", "logdir", *_WHERE)
        and (name, new) != ("precision", AUTO)
    ]


def differences_from_paper(config: Config) -> str:
    """The same as one line for people."""
    changed = different_from_paper(config)
    return "differs from paper: " + ", ".join(changed) if changed else "settings: as published (paper)"


# ------------------------------------------------------------------------------------------- config.json


def from_dict(data: Any, source: str = "config.json") -> Config:
    """The configuration that `Config.to_dict` gave.

    Raises:
      UserError: a field is unknown, missing or of the wrong type; the message names it and `source`.
    """
    names = ("agent", "preset", "game")
    if not isinstance(data, dict) or not all(isinstance(data.get(name), str) for name in names):
        raise UserError(f"{source}: not a configuration of twister_jax")
    try:
        like = make_config(data["agent"], "paper", data["game"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return fields.from_nested(like, data, source)


def read_config(directory: Path) -> Config:
    """The configuration of a run directory.

    Raises:
      UserError: it is no run directory, or its config.json is not of this version.
    """
    path = Path(directory) / "config.json"
    try:
        data = foreign_json.parse(files.read(path, 1 << 20).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} is not a run directory: it has no config.json") from None
    except UnsafePathError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {files.one_line(error)}") from None
    return from_dict(data, str(path))


# -------------------------------------------------------------------------------------------- validation


def validate(config: Config) -> None:
    """Refuses a configuration that cannot work.

    Raises:
      UserError: what is wrong with each field, and how to fix it.
    """
    problems = list(fields.out_of_range(config))
    if not problems:  # what follows compares fields, and would only repeat it
        problems = list(_contradictions(config))
    if problems:
        raise UserError("; ".join(problems))


def _contradictions(config: Config) -> Iterator[str]:
    train = config.train
    if train.prefill_steps >= train.steps:
        yield (
            f"train.steps = {train.steps}: must exceed train.prefill_steps = {train.prefill_steps}, "
            f"or nothing is learned"
        )
    most = round((train.steps - train.prefill_steps) * train.updates_per_step)
    if most > MOST_UPDATES:
        yield (
            f"train.steps = {train.steps}, train.updates_per_step = {show(train.updates_per_step)}: are "
            f"{most:,} updates, of which {MOST_UPDATES:,} can be counted"
        )
    expected = type(agents.package(config.agent).presets["paper"].algorithm)
    if not isinstance(config.algorithm, expected):
        yield f"agent = {config.agent}: its settings are those of another agent; start from make_config"
    else:
        yield from config.algorithm.problems(config)


def stored_steps(config: Config) -> int:
    """Steps that the replay has room for; resets are stored too, and short games have many."""
    return min(config.replay.capacity, math.ceil(1.08 * config.train.steps) + 1_000)
