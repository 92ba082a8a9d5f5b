"""`python -m twister_jax train`: a run from its first step, or its newest checkpoint, to the evaluation."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from twister_jax import agents, envs, files
from twister_jax.config import Config
from twister_jax.errors import UserError
from twister_jax.processes import ALONE, Processes
from twister_jax.training import loop
from twister_jax.training.lock import LostError
from twister_jax.training.parts import NoDirectory, Part, Silent
from twister_jax.training.progress import Progress
from twister_jax.training.rescue import rescue
from twister_jax.training.run import Run
from twister_jax.training.rundir import RunDirectory
from twister_jax.training.signals import Interrupted, Signals
from twister_jax.training.state import MakeAgent, MakeEnv


def train(
    config: Config,
    make_agent: MakeAgent = agents.make_agent,
    make_env: MakeEnv = envs.make_vector_env,
    processes: Processes = ALONE,
) -> int:
    """Trains, evaluates, and leaves everything in the run directory; goes on where an earlier call stopped.

    Returns:
      The exit code: 0, or 128 + the number of the signal that ended the run, or 1 where the run directory
      does not hold what was trained.

    Raises:
      UserError: the directory, the memory or the settings do not allow the run.
      run.DivergedError: see `train.max_bad_updates`.
    """
    first, path = processes.first, Path(config.logdir)
    progress = Progress() if first else Silent()
    with RunDirectory(path) if first else NoDirectory(path) as directory, Signals() as signals:
        directory.check_config(config.to_dict(), config.changeable())
        whole = (config, make_agent, make_env, progress, signals, directory)
        run = Run(*whole) if processes.count == 1 else Part(processes, *whole)
        try:
            return _learn_and_evaluate(run)
        except LostError:
            rescue(run)
            raise
        finally:
            progress.close()
            run.finish_saving()
            run.env.close()


def train_seeds(
    configs: Sequence[Config],
    make_agent: MakeAgent = agents.make_agent,
    make_env: MakeEnv = envs.make_vector_env,
) -> int:
    """Trains runs that differ in their seed alone in one program; each leaves what it would leave alone.

    A seed that cannot go on stops with a message, and the others go on.

    Returns:
      The exit code: 0, or 128 + the number of the signal that ended the runs, or 1 where one of them stopped
      or its directory does not hold what was trained.

    Raises:
      UserError: a directory, the memory or the settings do not allow the runs.
    """
    from twister_jax.training.group import Group, Member, stop

    progress = Progress()
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        members = []
        for config in configs:
            files.check_no_link(Path(config.logdir))  # all of them may lie in a stranger's directory
            directory = stack.enter_context(RunDirectory(Path(config.logdir)))
            directory.check_config(config.to_dict(), config.changeable())
            member = Member(config, make_agent, make_env, progress, signals, directory)
            stack.callback(member.env.close)
            stack.callback(member.finish_saving)
            members.append(member)
        stack.callback(progress.close)
        unfinished = [member for member in members if not member.finished]
        group = Group(unfinished) if unfinished else None
        bad: set[int] = set()
        try:
            if group:
                group.learn_everything()
                bad |= group.failed.keys() | group.unsaved
            progress.close()
            for member in members:
                if group and member.config.seed in group.failed:
                    continue
                try:
                    member.evaluate()
                except UserError as error:
                    stop(member, error)
                    bad.add(member.config.seed)
        except Interrupted:
            if group:
                for member in list(group.live):
                    group.guard(member, _save_for_later, member)
            return signals.exit_code
        return 1 if bad else 0


def _learn_and_evaluate(run: Run) -> int:
    """Returns the exit code."""
    try:
        loop.learn_everything(run)
        run.progress.close()
        kept = run.save_somewhere()
        run.evaluate()
        return 0 if kept == run.directory else 1
    except Interrupted:
        _save_for_later(run)
        return run.signals.exit_code


def _save_for_later(run: Run) -> None:
    say, signals = run.progress.say, run.signals
    kept = run.save_somewhere()
    if kept is None:
        say(f"{signals.name}: not saved; the same command goes on from the newest checkpoint there is")
    else:
        command = "the same command" if kept == run.directory else f"the same command with LOGDIR={kept}"
        say(f"{signals.name}: saved; {command} goes on from there")
