"""`python -m benchmarks`: one table on the standard output and, with `--json FILE`, everything as JSON.

Bad input is answered by one line on the standard error stream and exit code 2; a section that fails is
reported and the others go on, exit code 1.
"""

import contextlib
import dataclasses
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from benchmarks import options as command_line
from benchmarks import targets
from benchmarks.options import Options
from twister_jax import files, presets
from twister_jax.config import Config
from twister_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the flags ask for; returns the exit code."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        try:
            files.check_working_directory()
            options = command_line.parse(sys.argv[1:] if arguments is None else arguments)
            _prepare(options)
            code = measure(options, command_line.make_config(options))
        except SystemExit as done:  # --help
            code = int(done.code or 0)
        with contextlib.suppress(AttributeError, ValueError):  # closed
            sys.stdout.flush()
        return code
    except UserError as error:
        with contextlib.suppress(OSError, ValueError):
            print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of the standard output: sections' own are caught below
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit fails again
        if isinstance(error, BrokenPipeError):
            return 141  # as shells have it: 128 + SIGPIPE
        with contextlib.suppress(OSError, ValueError):
            print(f"benchmarks: the table cannot be written: {error}", file=sys.stderr)
        return 1


def _prepare(options: Options) -> None:
    """Sets what JAX has to find when it is imported."""
    if options.targets:
        targets.prepare()
    flags, name = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count"
    if options.sections == ("scaling",) and name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {name}=8".strip()


def measure(options: Options, config: Config) -> int:
    """Section by section, in the order of `SECTIONS`."""
    from twister_jax import runtime

    runtime.start_jax()

    from benchmarks import machine
    from benchmarks.bench import Bench
    from benchmarks.report import Report

    config = presets.complete(config)
    settings = {**dataclasses.asdict(options), "config": config.to_dict()}
    described = machine.describe(config.precision)
    report = Report(described, settings, options.json)
    print(machine.line(described))
    print(f"{config.agent}, preset {config.preset}; {presets.differences_from_paper(config)}")
    report.head()

    bench = Bench(options, config, report)
    for name in command_line.SECTIONS:
        if name not in options.sections:
            continue
        if bench.out_of_time:
            report.fail(name, "--minutes are over")
        else:
            try:
                importlib.import_module(f"benchmarks.{name}").run(bench)
            except Exception as error:
                # Where time on a machine is short, the sections that work are worth more than a traceback.
                said = " ".join(str(error).split())[:300]
                report.fail(name, said if isinstance(error, UserError) else f"{type(error).__name__}: {said}")
                logging.getLogger(__name__).debug("section %s", name, exc_info=True)
                bench.forget()
        report.write()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
