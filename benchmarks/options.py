"""The command line of the benchmarks, and the configuration that it describes."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from twister_jax import config as configs
from twister_jax.config import Config
from twister_jax.errors import UserError

SECTIONS = (
    "peak",
    "update",
    "launches",
    "breakdown",
    "convolutions",
    "checkpoints",
    "acting",
    "loop",
    "growth",
)
DEFAULT_SECTIONS = tuple(name for name in SECTIONS if name not in ("launches", "growth"))
PROGRAM = "python -m benchmarks"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and how long it may take."""

    agent: str
    preset: str
    precision: str
    game: str
    sections: tuple[str, ...]
    repeats: int
    quick: bool
    budget: float
    """Most seconds one measurement, or one update in `growth`, is meant to take."""
    minutes: float
    """After this many no new measurement begins."""
    loop_steps: int
    sizes: dict[str, int]
    """Fields of the algorithm that were given other values."""
    json: Path | None
    profile: Path | None


_DESCRIPTION = "How fast training is on this machine, and how close to its matrix products: one table."


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {PROGRAM} --help")


def parse(arguments: Sequence[str]) -> Options:
    """What the flags say.

    Raises:
      UserError: an unknown flag or section, a bad value, or a file that cannot be written.
      SystemExit: after --help.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"unknown option {unknown[0]}{configs.did_you_mean(unknown[0], known)}")
    for name in given.only or ():
        if name not in SECTIONS:
            near = configs.did_you_mean(name, SECTIONS)
            parser.error(f"unknown section {name!r}{near}; one of {', '.join(SECTIONS)}")
    if given.all and given.only:
        parser.error("--all and --only exclude each other")
    for flag in ("repeats", "budget", "minutes", "loop_steps"):
        if not getattr(given, flag) > 0:
            parser.error(f"--{flag.replace('_', '-')} = {getattr(given, flag)}: must be above 0")
    if given.json is not None and (given.json.is_dir() or not given.json.absolute().parent.is_dir()):
        parser.error(f"--json {given.json}: not a file in an existing directory")
    if given.profile is not None and given.profile.exists() and not given.profile.is_dir():
        parser.error(f"--profile {given.profile}: not a directory")
    sections = SECTIONS if given.all else tuple(given.only or DEFAULT_SECTIONS)
    sizes = {
        "batch_size": given.batch_size,
        "batch_length": given.batch_length,
        "imagination_horizon": given.horizon,
    }
    return Options(
        agent=given.agent,
        preset=given.preset,
        precision=given.precision,
        game=given.game,
        sections=sections,
        repeats=min(given.repeats, 3) if given.quick else given.repeats,
        quick=given.quick,
        budget=given.budget,
        minutes=given.minutes,
        loop_steps=given.loop_steps,
        sizes={name: size for name, size in sizes.items() if size is not None},
        json=given.json,
        profile=given.profile,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--agent", default="twister", help="twister or twm (default twister)")
    add("--preset", default="auto", help="paper, cpu, debug, or auto: paper on an accelerator, else cpu")
    add("--precision", default="auto", help="of matrix products: float32, bfloat16 or auto")
    add("--game", default="Pong", help="game of the sections acting and loop (default Pong)")
    add("--only", nargs="+", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    add("--all", action="store_true", help="all sections; without it all but launches and growth")
    add("--batch-size", type=int, help="windows of an update, in place of the preset's")
    add("--batch-length", type=int, help="steps of a window, in place of the preset's")
    add("--horizon", type=int, help="imagined steps, in place of the preset's")
    add("--repeats", type=int, default=10, help="samples to a median (default 10; of loop 8, 16, ...)")
    add("--quick", action="store_true", help="three short samples, few sizes: does it run at all?")
    add("--budget", type=float, default=60.0, help="seconds one measurement may take (default 60)")
    add("--minutes", type=float, default=1e6, help="after so many no new measurement begins")
    add("--loop-steps", type=int, default=50, help="agent steps of loop, whatever the budget (default 50)")
    add("--json", type=Path, metavar="FILE", help="everything as JSON, rewritten after every section")
    add(
        "--profile",
        type=Path,
        metavar="DIR",
        help="a profiler trace, and the top operations of its last 3 updates",
    )
    return parser


def make_config(options: Options) -> Config:
    """The run that is measured: a preset with other sizes, and a replay long enough for them.

    Raises:
      UserError: what cannot work, in the words of the training command.
    """
    from twister_jax.__main__ import automatic_preset
    from twister_jax.envs.games import resolve_game

    if options.preset == "auto":
        configs.make_config(options.agent)  # refuses an unknown agent before JAX starts
    preset = automatic_preset() if options.preset == "auto" else options.preset
    config = configs.make_config(
        options.agent,
        preset,
        game=resolve_game(options.game),
        precision=options.precision,
        **{f"algorithm.{name}": size for name, size in options.sizes.items()},
    )
    config = with_room(config)
    configs.validate(config)
    return config


def resized(config: Config, **sizes: Any) -> Config:
    """The same run with other sizes of an update."""
    return with_room(configs.replace(config, {f"algorithm.{name}": size for name, size in sizes.items()}))


def with_room(config: Config) -> Config:
    """Prefill and length enough for the windows."""
    prefill = max(config.train.prefill_steps, (config.algorithm.batch_length + 2) * config.env.num_envs)
    steps = max(config.train.steps, 2 * prefill)
    return configs.replace(config, {"train.prefill_steps": prefill, "train.steps": steps})
