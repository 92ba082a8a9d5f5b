"""`python -m twister_jax train`: a run from its first step, or its newest checkpoint, to the evaluation."""

from pathlib import Path

from twister_jax import agents, envs
from twister_jax.config import Config
from twister_jax.fields import describe
from twister_jax.training import loop
from twister_jax.training.progress import Progress
from twister_jax.training.run import Run
from twister_jax.training.rundir import RunDirectory
from twister_jax.training.signals import Interrupted, Signals
from twister_jax.training.state import MakeAgent, MakeEnv


def train(
    config: Config, make_agent: MakeAgent = agents.make_agent, make_env: MakeEnv = envs.make_vector_env
) -> int:
    """Trains, evaluates, and leaves everything in the run directory; goes on where an earlier call stopped.

    Returns:
      The exit code: 0, or 128 + the number of the signal that ended the run.

    Raises:
      UserError: the directory, the memory or the settings do not allow the run.
      run.DivergedError: see `train.max_bad_updates`.
    """
    progress = Progress()
    changeable = [name for name, field in describe(config).items() if field.changeable]
    with RunDirectory(Path(config.logdir)) as directory, Signals() as signals:
        directory.check_config(config.to_dict(), changeable)
        run = Run(config, make_agent, make_env, progress, signals)
        try:
            loop.learn_everything(run)
            progress.close()
            run.evaluate()
        except Interrupted:
            saved = run.save()
            progress.say(
                f"{signals.name}: {'saved' if saved else 'not saved'}; the same command goes on from there"
            )
            return signals.exit_code
        finally:
            progress.close()
            run.finish_saving()
            run.env.close()
    return 0
