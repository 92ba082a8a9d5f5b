"""The command line: `python -m twister_jax train|evaluate|parity|doctor`.

Bad input is answered by one line on the standard error stream and exit code 2. JAX is imported only once
the input is known to be good.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twister_jax import config as configs
from twister_jax.allocator import keep_freed_memory
from twister_jax.config import Config
from twister_jax.errors import UserError

PROGRAM = "python -m twister_jax"
HELP = f"""usage: {PROGRAM} COMMAND [OPTIONS]

  train      train an agent, or go on with a run that was interrupted
  evaluate   play full games with a run's newest checkpoint and write evaluation.json
  parity     recompute a fixture with this program's functions and compare
  doctor     check that this machine can run it all

`{PROGRAM} COMMAND --help` lists every option with its default and meaning.
"""


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Plays full games with the newest checkpoint of a run, under the settings it was trained with."""

    logdir: str = ""
    """Run directory (required)."""
    episodes: int = 0
    """Full games played; 0 means as many as the run's configuration says."""


@dataclasses.dataclass(frozen=True)
class ParityOptions:
    """Recomputes a fixture's quantities and prints a line for each; exit code 1 if any is off."""

    file: str = ""
    """The fixture, an .npz file (required; `parity FILE.npz` does too)."""


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Checks versions, the device, one emulator step, one compiled call, and that files can be written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(HELP, end="")
            return 0 if arguments else 2
        name, *rest = arguments
        if name not in COMMANDS:
            near = configs.did_you_mean(name, COMMANDS)
            raise UserError(f"unknown command {name!r}{near}; one of {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except UserError as error:
        print(f"twister_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `… | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 141


def train(arguments: list[str]) -> int:
    """`train`: from flags to a run."""
    config = read_config(arguments)
    start_jax()
    import jax

    from twister_jax.agents import make_agent
    from twister_jax.envs import make_vector_env
    from twister_jax.training.loop import train as run

    config = configs.complete(config, jax.default_backend())
    print(f"{config.agent} on {config.game}, preset {config.preset}, seed {config.seed} → {config.logdir}")
    print(configs.differences_from_paper(config), flush=True)
    return run(config, make_agent, make_vector_env)


def evaluate(arguments: list[str]) -> int:
    """`evaluate`: a stored run's newest checkpoint."""
    options = parse(EvaluateOptions(), arguments, "evaluate")
    required("logdir", options.logdir, "evaluate --logdir DIR")
    if options.episodes < 0:
        raise UserError(f"episodes = {options.episodes}: must be at least 1, or 0 for the run's own number")
    path = Path(options.logdir) / "config.json"
    try:
        config = configs.from_dict(json.loads(path.read_text()), str(path))
    except FileNotFoundError:
        raise UserError(f"{options.logdir} is not a run directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    config = configs.replace(config, {"logdir": options.logdir})
    if options.episodes:
        config = configs.replace(config, {"evaluation.episodes": options.episodes})
    configs.validate(config)
    start_jax()
    from twister_jax.agents import make_agent
    from twister_jax.envs import make_vector_env
    from twister_jax.training.evaluation import evaluate_directory

    return evaluate_directory(config, make_agent, make_vector_env)


def parity(arguments: list[str]) -> int:
    """`parity`: agreement with a fixture."""
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        arguments = ["--file", *arguments]
    options = parse(ParityOptions(), arguments, "parity")
    required("file", options.file, "parity FILE.npz")
    start_jax()
    from twister_jax.parity import main as run

    return run(Path(options.file))


def doctor(arguments: list[str]) -> int:
    """`doctor`: what is wrong with this machine, if anything."""
    parse(DoctorOptions(), arguments, "doctor")
    from twister_jax.doctor import main as run

    return run()


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "parity": parity,
    "doctor": doctor,
}


# -------------------------------------------------------------------------------------- configuration


def read_config(arguments: list[str]) -> Config:
    """The configuration that flags describe; `--agent`, `--preset` and `--game` choose the defaults.

    Raises:
      UserError: what is wrong with which flag, and what would be right.
    """
    from twister_jax.envs.games import resolve_game

    first = {"agent": "twister", "preset": "auto", "game": "Breakout"}
    for name, values in split_flags(arguments):
        if name in first and len(values) == 1:
            first[name] = values[0]
    agent, preset = first["agent"], first["preset"]
    if preset not in (*configs.PRESETS, "auto"):
        near = configs.did_you_mean(preset, (*configs.PRESETS, "auto"))
        raise UserError(f"unknown preset {preset!r}{near}; one of auto, {', '.join(configs.PRESETS)}")
    game = resolve_game(first["game"])
    base = configs.make_config(agent, "paper" if preset == "auto" else preset, game)
    base = configs.replace(base, {"preset": preset})
    config = parse(base, arguments, "train")  # answers --help and refuses before JAX is imported
    if preset == "auto":
        preset = automatic_preset()
        config = parse(configs.make_config(agent, preset, game), arguments, "train")
    config = configs.replace(config, {"preset": preset, "game": game})
    configs.validate(config)
    return config


def automatic_preset() -> str:
    """`paper` on an accelerator; without one `cpu`, which is said."""
    start_jax()
    import jax

    if jax.default_backend() != "cpu":
        return "paper"
    print("no accelerator: preset cpu (smaller model); PRESET=paper runs the published size")
    return "cpu"


def start_jax() -> None:
    """Keeps freed memory, and compiled programs in `$TWISTER_JAX_CACHE` or ~/.cache/twister_jax/xla.

    Raises:
      UserError: JAX finds no device it can use.
    """
    keep_freed_memory()
    import jax

    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        raise UserError(f"JAX cannot start: {error}; run `{PROGRAM} doctor`") from error
    keep_compiled_programs(backend)


def keep_compiled_programs(backend: str) -> None:
    """Keeps them in `cache_directory`; where that cannot be written, every start compiles anew."""
    import jax

    cache = cache_directory(backend)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(cache, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        # XLA's own caches (autotuning, on a GPU) would put this path into every key: no program in a copied
        # cache would be found.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def cache_directory(backend: str) -> Path:
    """Where compiled programs are kept."""
    chosen = os.environ.get("TWISTER_JAX_CACHE")
    cache = Path(chosen) if chosen else Path("~/.cache/twister_jax/xla").expanduser()
    # What was compiled for one processor may not run on another one that shares the home directory.
    return cache / f"{backend}-{processor()}"


def processor() -> str:
    """A short name for what this processor can do."""
    import hashlib
    import platform

    able = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "flags", "Features")):
                able += line
            elif not line:
                break
    return hashlib.sha256(able.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------- parsing


def split_flags(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`--a-b.c 1 2 --d=3` as [("a_b.c", ["1", "2"]), ("d", ["3"])]; what comes before a flag is named ""."""
    flags: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        else:
            if not flags:
                flags.append(("", []))
            flags[-1][1].append(argument)
    return flags


def parse(default: Any, arguments: list[str], command: str) -> Any:
    """`default` changed by flags, by tyro; what is wrong with a flag is said in one line.

    Raises:
      UserError: an unknown flag or a bad value.
      SystemExit: after --help.
    """
    import tyro

    arguments = checked(default, arguments, command)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                type(default),
                default=default,
                args=arguments,
                prog=f"{PROGRAM} {command}",
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{one_line(said.getvalue())}; see {PROGRAM} {command} --help") from None


def required(name: str, value: str, usage: str) -> None:
    """Refuses an empty value."""
    if not value:
        raise UserError(f"--{name} is missing: {PROGRAM} {usage}")


def checked(default: Any, arguments: list[str], command: str) -> list[str]:
    """The arguments as tyro reads them; refuses those with unknown names or values of the wrong type."""
    if {"-h", "--help"} & set(arguments):
        return ["--help"]
    kinds = dict(configs.flat_types(default))
    clean: list[str] = []
    for name, values in split_flags(arguments):
        if name not in kinds:
            shown = f"unknown argument {values[0]!r}" if not name else f"unknown option --{name}"
            raise UserError(f"{shown}{configs.did_you_mean(name, kinds)}; see {PROGRAM} {command} --help")
        of = typing.get_args(kinds[name]) if typing.get_origin(kinds[name]) is tuple else (kinds[name],)
        if of[-1] is Ellipsis:
            of = of[:1] * max(1, len(values))
        if len(values) != len(of):
            given = " ".join(values) or "nothing"
            count = "one value" if len(of) == 1 else f"{len(of)} values"
            raise UserError(f"--{name} takes {count}, not {given}; see {PROGRAM} {command} --help")
        clean += [f"--{name}", *(normalized(name, value, k) for value, k in zip(values, of, strict=True))]
    return clean


def normalized(name: str, value: str, kind: Any) -> str:
    """A value as tyro takes it: `1e5` is a whole number too, and `true` a truth value."""
    if kind is bool:
        words = {"true": "True", "yes": "True", "1": "True", "false": "False", "no": "False", "0": "False"}
        if value.lower() not in words:
            raise UserError(f"{name} = {value}: must be True or False")
        return words[value.lower()]
    if kind is int:
        try:
            number = float(value.replace(",", ""))
            if number.is_integer():
                return str(int(number))
        except (ValueError, OverflowError):
            pass
        raise UserError(f"{name} = {value}: must be a whole number")
    if kind is float:
        try:
            float(value)
        except ValueError:
            raise UserError(f"{name} = {value}: must be a number") from None
    if typing.get_origin(kind) is typing.Literal:
        configs.convert(name, value, kind)
    return value


def one_line(box: str) -> str:
    """The first paragraph of one of tyro's boxes."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    text: list[str] = []
    for line in lines:
        if set(line) <= {"─"} or line.startswith("─"):
            if text:
                break
            continue
        text.append(line)
    return " ".join(text).rstrip(".")


def exit_with(code: int) -> None:
    """Ends the process at once: a compilation that still runs would hold up the end, or make it abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_with(main())
