"""`python -m experiments COMMAND`: suites of runs, and what comes of them.

Bad input is answered by one line on the standard error stream and exit code 2.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from experiments import job as jobs
from experiments import suite
from experiments.launchers import LAUNCHERS, Options
from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean
from twister_jax.training.progress import print_anywhere, say

PROGRAM = "python -m experiments"
HELP = f"""usage: {PROGRAM} COMMAND [OPTIONS]

  suites     list the suites that are ready
  run        train a suite, or go on with it
  status     where every run of a suite stands
  aggregate  scores of many runs: aggregates with intervals, tables, CSV, JSON
  plot       figures, and one HTML page with all of it
  pack       what others need to check the numbers, with checksums

`{PROGRAM} COMMAND --help` lists every option.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    print_anywhere()
    try:
        try:
            if not arguments or arguments[0] in ("-h", "--help", "help"):
                print(HELP, end="")
                return 0 if arguments else 2
            name, *rest = arguments
            if name not in COMMANDS:
                near = did_you_mean(name, COMMANDS)
                raise UserError(f"unknown command {name!r}{near}; one of {', '.join(COMMANDS)}")
            files.check_working_directory()
            code = COMMANDS[name](rest)
        except SystemExit as done:  # --help
            code = int(done.code or 0)
        with contextlib.suppress(AttributeError, ValueError):  # closed
            sys.stdout.flush()
        return code
    except UserError as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"experiments: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of the standard output: all others are caught where files are read and written
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit fails again
        if isinstance(error, BrokenPipeError):  # as in `… | head`
            return 141
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"experiments: the output cannot be written: {error}", file=sys.stderr)
        return 1


def _parser(command: str, description: str) -> Parser:
    return Parser(prog=f"{PROGRAM} {command}", description=description, allow_abbrev=False)


def _split(words: Sequence[str]) -> list[str]:
    """What blanks or commas separate."""
    return [part for word in words for part in word.split(",") if part]


def _add_root(parser: Parser) -> None:
    parser.add_argument("--root", default="runs", help="where suites have their directories (default runs)")


# ------------------------------------------------------------------------------------------------ commands


def suites(arguments: list[str]) -> int:
    """`suites`: what there is."""
    _parser("suites", "Lists the suites that are ready.").parse_args(arguments)
    for name in suite.names():
        found = suite.load(name)
        count = len(found.sets) * len(found.games) * len(found.seeds)
        print(
            f"{name}: {len(found.sets)} sets x {len(found.games)} games x {len(found.seeds)} seeds "
            f"= {count} runs, preset {found.preset}"
        )
    return 0


def run(arguments: list[str]) -> int:
    """`run`: from a suite to finished runs."""
    parser = _parser("run", "Trains a suite in ROOT/SUITE, or goes on with it; finished runs are skipped.")
    add = parser.add_argument
    add("suite", metavar="SUITE", help=f"one of {', '.join(suite.names())}, or a .toml file")
    add("--games", nargs="+", default=(), help="only these")
    add("--seeds", nargs="+", default=(), help="these in place of the suite's")
    add("--sets", nargs="+", default=(), help="only these sets")
    _add_root(parser)
    add("--launcher", choices=LAUNCHERS, default="local", help="where runs are trained (default local)")
    add("--per-device", type=int, default=1, help="runs on a device at the same time (default 1)")
    add("--pack-seeds", type=int, default=1, help="seeds of a game trained in one program (default 1)")
    add("--attempts", type=int, default=3, help="how often a run that fails is tried (default 3)")
    add("--address", default="", help="ray: of a cluster; without it one is started on this machine")
    add("--cpus", type=int, default=0, help="ray, slurm: cores for a run")
    add("--slurm", nargs="+", default=(), metavar="NAME=VALUE", help="slurm: as in partition=gpu time=1440")
    add("--dry-run", action="store_true", help="slurm: write the script, do not submit it")
    given = parser.parse_args(arguments)
    for name in ("per_device", "pack_seeds", "attempts"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} = {getattr(given, name)}: must be at least 1")
    seeds = _split(given.seeds)
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        parser.error(f"--seeds {wrong[0]}: must be whole numbers from 0 on")
    chosen = suite.narrow(
        suite.load(given.suite), _split(given.games), [int(seed) for seed in seeds], _split(given.sets)
    )
    plan = suite.plan(chosen)
    directory = Path(given.root) / chosen.name
    suite.write_plan(directory, plan)
    left = jobs.unfinished(directory, plan.runs)
    done = len(plan.runs) - len(left)
    say(f"{chosen.name}: {len(plan.runs)} runs, {done} finished → {directory}")
    if not left:
        return 0
    options = Options(
        per_device=given.per_device,
        attempts=given.attempts,
        address=given.address,
        cpus=given.cpus,
        slurm=tuple(given.slurm),
        dry_run=given.dry_run,
    )
    return importlib.import_module(f"experiments.launchers.{given.launcher}").launch(
        directory, plan, suite.grouped(left, given.pack_seeds), options
    )


def job(arguments: list[str]) -> int:
    """`job`: one job of an array; scripts call it."""
    from experiments.launchers import slurm

    parser = _parser("job", "Trains one job of an array that --launcher slurm has written.")
    parser.add_argument("array", type=Path, help="the JSON file beside the script")
    parser.add_argument("index", type=int, help="of the job, from 0 on")
    given = parser.parse_args(arguments)
    return slurm.run_member(given.array, given.index)


def status(arguments: list[str]) -> int:
    """`status`: a table, once or again and again."""
    from experiments import status as table

    parser = _parser("status", "Where every run of a suite stands.")
    parser.add_argument("suite", metavar="SUITE", help="its name, or its directory")
    _add_root(parser)
    parser.add_argument("--every", type=float, metavar="SECONDS", help="show it again and again")
    given = parser.parse_args(arguments)
    if given.every is not None and not 0 < given.every < 1e6:
        parser.error(f"--every {given.every}: must be above 0 and below 1e6 seconds")
    directory = suite.find(given.suite, given.root)
    print(table.show(directory))
    while given.every:
        time.sleep(given.every)
        print("\x1b[2J\x1b[H" if sys.stdout.isatty() else "", table.show(directory), sep="", flush=True)
    return 0


def _score_options(command: str, description: str) -> Parser:
    from experiments import scores

    parser = _parser(command, description)
    parser.add_argument(
        "directories",
        nargs="+",
        metavar="[NAME=]DIRECTORY",
        help="of a suite, a pack, a folder of runs; NAME makes all of it one set",
    )
    known = ", ".join(scores.published_names())
    parser.add_argument("--against", nargs="+", default=(), metavar="NAME", help=f"published: {known}")
    parser.add_argument("--partial", action="store_true", help="leave out and count what is missing")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for what is written (default DIRECTORY/results, of a pack DIRECTORY-results)",
    )
    return parser


def _out(given: argparse.Namespace) -> Path:
    """Where results go: beside a pack, whose files are counted, and otherwise in it."""
    from experiments.pack import MANIFEST

    if given.out:
        return given.out
    directory = Path(given.directories[0].rpartition("=")[2])
    folder = directory / "results"
    if (directory / MANIFEST).is_file():
        folder = directory.resolve().with_name(f"{directory.resolve().name}-results")
    files.check_no_link(folder)  # the directory may come from a stranger
    return folder


def aggregate(arguments: list[str]) -> int:
    """`aggregate`: from runs to numbers."""
    from experiments import aggregate as numbers
    from experiments import scores

    parser = _score_options("aggregate", "Scores of many runs: aggregates with intervals, table, CSV, JSON.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything as JSON")
    given = parser.parse_args(arguments)
    against = [scores.published(name) for name in given.against]
    sets = scores.read_sets(given.directories, given.partial)
    comparisons = numbers.compare_all(sets, against)
    table = numbers.to_markdown(sets, against, comparisons)
    out = _out(given)
    numbers.write(out, {"scores.csv": numbers.to_csv(sets), "table.md": table})
    print(table)
    said = f"→ {out}/scores.csv, {out}/table.md"
    if given.json:
        text = json.dumps(numbers.to_json(sets, comparisons), indent=1) + "\n"
        numbers.write(given.json.parent, {given.json.name: text})
        said += f", {given.json}"
    print(said)
    return 0


def plot(arguments: list[str]) -> int:
    """`plot`: from runs to figures and a page."""
    from experiments import page, scores

    given = _score_options("plot", "Figures as SVG and PNG, and one HTML page with all.").parse_args(
        arguments
    )
    against = [scores.published(name) for name in given.against]
    sets = scores.read_sets(given.directories, given.partial)
    print(f"→ {page.write(sets, against, _out(given))}")
    return 0


def pack(arguments: list[str]) -> int:
    """`pack`: a folder that others can check."""
    from experiments import pack as packing

    parser = _parser("pack", "Copies configurations, metrics and scores of finished runs, with checksums.")
    parser.add_argument(
        "sources", nargs="+", metavar="SUITE", help="its name or directory; or runs, packs, folders of runs"
    )
    _add_root(parser)
    parser.add_argument("--out", type=Path, help="a new folder (default SUITE-pack)")
    parser.add_argument("--weights", action="store_true", help="the newest checkpoint's state as well")
    parser.add_argument("--thin", action="store_true", help="few rows of metrics whole, of the others scores")
    given = parser.parse_args(arguments)
    sources = [Path(source) for source in given.sources]
    if len(sources) == 1 and not sources[0].is_dir():
        sources = [suite.find(given.sources[0], given.root)]
    target = given.out or Path(f"{sources[0].absolute().name}-pack")
    manifest = packing.pack(sources, target, given.weights, given.thin)
    size = sum(each["bytes"] for each in manifest["files"].values())
    missing = f", {len(manifest['missing'])} missing" if manifest["missing"] else ""
    print(f"{manifest['runs']} runs{missing}, {size / 1e6:,.1f} MB → {target}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "suites": suites,
    "run": run,
    "job": job,
    "status": status,
    "aggregate": aggregate,
    "plot": plot,
    "pack": pack,
}


if __name__ == "__main__":
    sys.exit(main())
