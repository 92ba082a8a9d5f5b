"""`python -m benchmarks`: one table on the standard output and, with `--json FILE`, everything as JSON.

Bad input is answered by one line on the standard error stream and exit code 2; a section that fails is
reported and the others go on, exit code 1.
"""

import dataclasses
import importlib
import logging
import sys
from collections.abc import Sequence

from benchmarks import options as command_line
from benchmarks.options import Options
from twister_jax import config as configs
from twister_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the flags ask for; returns the exit code."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        options = command_line.parse(sys.argv[1:] if arguments is None else arguments)
        config = command_line.make_config(options)
        return measure(options, config)
    except UserError as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def measure(options: Options, config: configs.Config) -> int:
    """Section by section, in the order of `SECTIONS`; the profile follows the update."""
    from twister_jax.__main__ import start_jax

    start_jax()
    import jax

    from benchmarks import machine
    from benchmarks.bench import Bench
    from benchmarks.report import Report

    config = configs.complete(config, jax.default_backend())
    settings = {**dataclasses.asdict(options), "config": configs.to_dict(config)}
    described = machine.describe(config.precision)
    report = Report(described, settings, options.json)
    print(machine.line(described))
    print(f"{config.agent}, preset {config.preset}; {configs.differences_from_paper(config)}")
    report.head()

    bench = Bench(options, config, report)
    sections = [name for name in command_line.SECTIONS if name in options.sections]
    if options.profile is not None:
        sections.insert(sections.index("update") + 1 if "update" in sections else 0, "profiling")
    for name in sections:
        if bench.out_of_time:
            report.fail(name, "--minutes are over")
        else:
            try:
                importlib.import_module(f"benchmarks.{name}").run(bench)
            except Exception as error:
                # Where time on a machine is short, the sections that work are worth more than a traceback.
                report.fail(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                logging.getLogger(__name__).debug("section %s", name, exc_info=True)
                bench.forget()
        report.write()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
