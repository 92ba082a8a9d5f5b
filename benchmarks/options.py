"""The command line of the benchmarks, and the configuration that it describes."""

import argparse
import contextlib
import dataclasses
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks import targets
from twister_jax import agents, cli, envs, presets
from twister_jax.config import Config
from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean, replace

SECTIONS = (
    "peak",
    "update",
    "compile",
    "breakdown",
    "convolutions",
    "checkpoints",
    "acting",
    "loop",
    "growth",
    "scaling",
)
DEFAULT_SECTIONS = tuple(name for name in SECTIONS if name not in ("compile", "growth", "scaling"))


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
    targets: tuple[str, ...]
    """Machines that `compile` compiles for."""
    envs: int | None
    sizes: dict[str, int]
    """Fields of the agent's own settings that were given other values."""
    json: Path | None
    profile: Path | None


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
        parser.error(f"unknown option {unknown[0]}{did_you_mean(unknown[0], known)}")
    for name in given.only or ():
        if name not in SECTIONS:
            near = did_you_mean(name, SECTIONS)
            parser.error(f"unknown section {name!r}{near}; one of {', '.join(SECTIONS)}")
    if given.all and given.only:
        parser.error("--all and --only exclude each other")
    sections = SECTIONS if given.all else tuple(given.only or DEFAULT_SECTIONS)
    for flag in ("repeats", "budget", "minutes", "loop_steps"):
        if not getattr(given, flag) > 0:
            parser.error(f"--{flag.replace('_', '-')} = {getattr(given, flag)}: must be above 0")
    for name in given.target:
        targets.parse(name)
    if given.target and "compile" not in sections:
        parser.error("--target is of the section compile: add --only compile")
    if given.json is not None and not _may_be_written(given.json):
        parser.error(f"--json {given.json}: not a regular file, or in no existing directory")
    if given.profile is not None and given.profile.exists() and not given.profile.is_dir():
        parser.error(f"--profile {given.profile}: not a directory")
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
        sections=sections if given.profile is None else (*sections, "breakdown"),
        repeats=min(given.repeats, 3) if given.quick else given.repeats,
        quick=given.quick,
        budget=given.budget,
        minutes=given.minutes,
        loop_steps=given.loop_steps,
        targets=tuple(given.target),
        envs=given.envs,
        sizes={name: size for name, size in sizes.items() if size is not None},
        json=given.json,
        profile=given.profile,
    )


def _may_be_written(path: Path) -> bool:
    """Whether it is a regular file, or can be made: not what a link, a device or a pipe leads to."""
    try:
        with contextlib.suppress(FileNotFoundError):
            return stat.S_ISREG(path.lstat().st_mode)
        return path.absolute().parent.is_dir()
    except (OSError, ValueError):
        return False


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m benchmarks",
        description="How fast training is on this machine, and how close to its matrix products: one table.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--agent", default=agents.DEFAULT_AGENT, help=f"{' or '.join(agents.AGENTS)} (default %(default)s)")
    add("--preset", default=presets.AUTO, help="paper, cpu, debug; auto: paper on an accelerator, else cpu")
    add("--precision", default="auto", help="of matrix products: float32, bfloat16 or auto")
    add("--game", default=envs.DEFAULT_GAME, help="what is played (default %(default)s)")
    add("--only", nargs="+", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    add("--all", action="store_true", help="all sections; without it all but compile, growth, scaling")
    add("--batch-size", type=int, help="windows of an update, in place of the preset's")
    add("--batch-length", type=int, help="steps of a window, in place of the preset's")
    add("--horizon", type=int, help="imagined steps, in place of the preset's")
    add("--envs", type=int, help="environments, each with its stream of replay, in place of the preset's")
    add(
        "--target",
        nargs="+",
        default=[],
        metavar="MACHINE",
        help="what compile compiles for, there or not: v5e, v5e:2x4, v6e:2x2, v5p:2x2x1, H100, H200:8, ...",
    )
    add("--repeats", type=int, default=10, help="samples to a median (default 10; of loop 8, 16, ...)")
    add("--quick", action="store_true", help="three short samples, few sizes: does it run at all?")
    add("--budget", type=float, default=60.0, help="seconds one measurement may take (default 60)")
    add("--minutes", type=float, default=1e6, help="after so many no new measurement begins")
    add("--loop-steps", type=int, default=50, help="agent steps of loop, whatever the budget (default 50)")
    add("--json", type=Path, metavar="FILE", help="everything as JSON, rewritten after every section")
    add("--profile", type=Path, metavar="DIR", help="keep breakdown's trace, and list its top operations")
    return parser


def make_config(options: Options) -> Config:
    """The run that is measured: a preset with other sizes, and a replay long enough for them.

    Raises:
      UserError: what cannot work, in the words of the training command.
    """
    agents.package(options.agent)  # refuses an unknown one before JAX starts
    preset = options.preset
    if preset == presets.AUTO:  # machines that are compiled for are accelerators
        preset = "paper" if options.targets else cli.automatic_preset()
        if preset == "cpu" and options.sections == ("scaling",):
            preset = "debug"  # on virtual devices times mean little, and many programs are compiled
    envs.admit(options.game)
    config = presets.make_config(options.agent, preset, options.game, precision=options.precision)
    if options.envs is not None:
        config = replace(config, {"env.num_envs": options.envs})
    config = resized(config, options.sizes)
    presets.validate(config)
    return config


def resized(config: Config, sizes: Mapping[str, int]) -> Config:
    """The same run with other sizes of an update, and with prefill and length enough for its windows.

    Raises:
      UserError: the agent has no such size.
    """
    config = replace(config, {f"algorithm.{name}": size for name, size in sizes.items()})
    windows = (getattr(config.algorithm, "batch_length", 0) + 2) * config.env.num_envs
    prefill = max(config.train.prefill_steps, windows)
    steps = max(config.train.steps, 2 * prefill)
    return replace(config, {"train.prefill_steps": prefill, "train.steps": steps})
