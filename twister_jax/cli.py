"""The command line: `python -m twister_jax train|evaluate|watch|dream|report|export|parity|doctor`.

Bad input is answered by one line on the standard error stream and exit code 2. JAX is imported only once
the input is known to be good.
"""

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twister_jax import agents, envs, fields, files, presets, processes
from twister_jax.config import Config
from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean, show
from twister_jax.options import (
    DoctorOptions,
    DreamOptions,
    EvaluateOptions,
    ExportOptions,
    ParityOptions,
    PlayOptions,
    ReportOptions,
    RunOptions,
    WatchOptions,
)
from twister_jax.runtime import start_jax
from twister_jax.training.progress import print_anywhere, say

PROGRAM = "python -m twister_jax"
HELP = f"""usage: {PROGRAM} COMMAND [OPTIONS]

  train      train an agent, or go on with a run that was interrupted
  evaluate   play full games with a run's newest checkpoint and write evaluation.json
  watch      play full games and write the best, the median and the worst as videos
  dream      what the world model foresees, as pictures, videos and errors against the horizon
  report     one HTML file about a run, or a comparison of several
  export     the policy as one file, for `load` or as ONNX
  parity     recompute a fixture with this program's functions and compare
  doctor     check that this machine can run it all

`{PROGRAM} COMMAND --help` lists every option with its default and meaning.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.raiseExceptions = False  # what cannot be printed is no reason to stop
    print_anywhere()
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("twister_jax").setLevel(logging.INFO)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            say(HELP.rstrip("\n"))
            return 0 if arguments else 2
        name, *rest = arguments
        if name not in COMMANDS:
            raise UserError(
                f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; one of {', '.join(COMMANDS)}"
            )
        files.check_working_directory()
        return COMMANDS[name](rest)
    except UserError as error:
        with contextlib.suppress(OSError, ValueError):
            line = " ".join(str(error).split())  # it may quote what somebody typed, or what is in a file
            print(f"twister_jax: {files.printable(line, len(line))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `… | head`
        return 141


def train(arguments: list[str]) -> int:
    """`train`: from flags to a run, or to one for each of several seeds."""
    seeds, arguments = take_seeds(arguments)
    parallel = first_reading(arguments)[0].parallel
    if processes.wanted(parallel) > 1 and not processes.supervised():
        return processes.supervise(parallel)
    others = processes.connect(parallel)
    config = read_flags(arguments)
    start_jax()
    envs.admit(config.game)
    import jax

    from twister_jax.training.progress import outlook
    from twister_jax.training.train import train as run
    from twister_jax.training.train import train_seeds

    if others.count > 1:
        config = fields.replace(config, {"parallel.data": jax.device_count()})
    configs = [presets.complete(each) for each in of_seeds(config, seeds)]
    if others.first:
        for each in configs:
            say(f"{each.agent} on {each.game}, preset {each.preset}, seed {each.seed} → {each.logdir}")
        say(presets.differences_from_paper(configs[0]))
        if line := outlook(configs[0]):
            say(line)
    with processes.ending_with_others(others):
        code = train_seeds(configs) if seeds is not None else run(configs[0], processes=others)
    if not others.first:
        return code
    if code == 0:
        for each in configs:
            _report_at_the_end(Path(each.logdir))
    return code


def _report_at_the_end(directory: Path) -> None:
    """Writes the report; a failure is printed, as training itself has succeeded."""
    from twister_jax.view.report import write

    try:
        write([directory], directory / "report.html")
        say(f"report → {directory / 'report.html'}")
    except UserError as error:
        say(f"no report: {error}")


def take_seeds(arguments: Sequence[str]) -> tuple[list[int] | None, list[str]]:
    """The seeds of `--seeds 0 1 2` (or `0,1,2`), and the other arguments.

    Raises:
      UserError: they are not different whole numbers, or `--seed` is there too.
    """
    given: list[str] | None = None
    rest: list[str] = []
    taking = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--seeds":
            given, taking = [*(given or []), *([value] if equals else [])], not equals
        elif taking and not argument.startswith("--"):
            assert given is not None
            given.append(argument)
        else:
            taking = False
            rest.append(argument)
    if given is None:
        return None, rest
    named = " ".join(given)
    seeds = [int(n) for n in named.replace(",", " ").split() if n.isascii() and n.isdigit()]
    if not seeds or len(seeds) != len(named.replace(",", " ").split()):
        raise UserError(f"--seeds {named}: must be whole numbers, as in --seeds 0 1 2")
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise UserError(f"--seeds {named}: {twice[0]} is there twice; every seed is trained once")
    if any(argument.partition("=")[0] == "--seed" for argument in rest):
        raise UserError("--seed and --seeds exclude each other")
    return seeds, rest


def of_seeds(config: Config, seeds: Sequence[int] | None) -> list[Config]:
    """A configuration for each seed, with a run directory of its own.

    Raises:
      UserError: one of them is out of range, or several devices are to share each update.
    """
    if seeds is None:
        return [config]
    if config.parallel.data > 1:
        raise UserError(
            f"parallel.data = {config.parallel.data}: must be 1 with --seeds; a seed needs one device"
        )
    configs = []
    for seed in seeds:
        logdir = f"{config.logdir}/seed{seed}" if config.logdir else ""
        configs.append(dataclasses.replace(config, seed=seed, logdir=logdir))
        presets.validate(configs[-1])
    return configs


def evaluate(arguments: list[str]) -> int:
    """`evaluate`: a stored run's newest checkpoint."""
    options = _parse(EvaluateOptions(), arguments, "evaluate", required="logdir")
    _check_run(options)
    start_jax()
    from twister_jax.training.evaluation import evaluate_directory

    overrides = {"evaluation.episodes": options.episodes} if options.episodes else {}
    return evaluate_directory(options.logdir, options.step or None, overrides)


def watch(arguments: list[str]) -> int:
    """`watch`: full games as videos."""
    options = _parse(WatchOptions(), arguments, "watch", required="logdir")
    policy = _load(options)
    from twister_jax.view.watch import watch as run

    files.check_no_link(folder := Path(options.logdir) / "videos")  # the directory may come from a stranger
    run(policy, folder, options.episodes, stem=f"watch-{policy.about['env_steps']:07d}")
    return 0


def dream(arguments: list[str]) -> int:
    """`dream`: what the world model foresees."""
    options = _parse(DreamOptions(), arguments, "dream", required="logdir")
    policy = _load(options)
    from twister_jax.view.dream import dream as run

    files.check_no_link(folder := Path(options.logdir) / "dreams")
    run(policy, folder, options.starts, options.horizon)
    return 0


def report(arguments: list[str]) -> int:
    """`report`: a run, or several, as one HTML file."""
    options = _parse(ReportOptions(), arguments, "report", required="logdir")
    directories = [Path(name) for name in options.logdir]
    for directory in directories:
        presets.read_config(directory)
    from twister_jax.view.report import write

    out = Path(options.out) if options.out else directories[0] / "report.html"
    write(directories, out)
    say(f"→ {out}")
    return 0


def export(arguments: list[str]) -> int:
    """`export`: the policy as one file."""
    options = _parse(ExportOptions(), arguments, "export", required="logdir")
    policy = _load(options)
    from twister_jax.view.export import export as run

    out = Path(options.out) if options.out else Path(options.logdir) / "policy.safetensors"
    say(run(policy, out, options.license))
    return 0


def _load(options: RunOptions) -> Any:
    """The policy of a run directory."""
    _check_run(options)
    start_jax()
    from twister_jax.view.policy import load

    return load(options.logdir, options.step or None)


def _check_run(options: RunOptions) -> None:
    """Refuses before JAX is imported; of what plays, a game whose code was not asked for."""
    stored = presets.read_config(Path(options.logdir)).game
    if not isinstance(options, PlayOptions):
        return
    if not options.game:
        envs.check_admitted(stored)
    elif (named := envs.full_name(options.game)) != stored:
        raise UserError(f"--game {named}: {options.logdir} is a run of {show(stored)}")
    else:
        envs.admit(stored)


def parity(arguments: list[str]) -> int:
    """`parity`: agreement with a fixture."""
    options = _parse(ParityOptions(), arguments, "parity", required="file")
    start_jax()
    from twister_jax.parity import main as run

    return run(Path(options.file))


def doctor(arguments: list[str]) -> int:
    """`doctor`: what is wrong with this machine, if anything."""
    _parse(DoctorOptions(), arguments, "doctor")
    from twister_jax.doctor import main as run

    return run()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "watch": watch,
    "dream": dream,
    "report": report,
    "export": export,
    "parity": parity,
    "doctor": doctor,
}


def _parse(
    options: fields.Settings, arguments: list[str], command: str, required: str = ""
) -> fields.Settings:
    parsed = fields.parse_flags(options, arguments, f"{PROGRAM} {command}", required)
    for problem in fields.out_of_range(parsed):
        raise UserError(problem)
    return parsed


def read_flags(arguments: list[str]) -> Config:
    """The configuration that `train`'s flags describe; agent, preset and game choose the defaults.

    Raises:
      UserError: what is wrong with which flag, and what would be right.
    """
    config, chosen = first_reading(arguments)
    if chosen["preset"] == presets.AUTO:
        chosen["preset"] = automatic_preset()
        config = fields.parse_flags(presets.make_config(**chosen), arguments, f"{PROGRAM} train")
    game = envs.full_name(chosen["game"])
    config = dataclasses.replace(config, preset=chosen["preset"], game=game)
    presets.validate(config)
    return config


def first_reading(arguments: list[str]) -> tuple[Config, dict[str, str]]:
    """The configuration with `paper` in place of preset `auto`; and agent, preset and game as given.

    Raises:
      UserError: as `read_flags`.
    """
    chosen = {"agent": agents.DEFAULT_AGENT, "preset": presets.AUTO, "game": envs.DEFAULT_GAME}
    for index, argument in enumerate(arguments):
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in chosen:
            chosen[name] = value if equals else "".join(arguments[index + 1 : index + 2])
    automatic = chosen["preset"] == presets.AUTO
    base = presets.make_config(chosen["agent"], "paper" if automatic else chosen["preset"], chosen["game"])
    # --help, and refusals before JAX is imported
    return fields.parse_flags(base, arguments, f"{PROGRAM} train"), chosen


def automatic_preset() -> str:
    """`paper` on an accelerator; without one `cpu`, with a message."""
    start_jax()
    import jax

    if jax.default_backend() != "cpu":
        return "paper"
    say("no accelerator: preset cpu (smaller model); PRESET=paper runs the published size")
    return "cpu"


def run() -> None:
    """The program. Ends the process at once: a compilation that still runs would hold up the end."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
