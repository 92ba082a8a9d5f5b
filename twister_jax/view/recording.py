"""Windows of real play, as starts for dreams."""

from typing import Any

import jax
import numpy as np

from twister_jax import envs
from twister_jax.envs.base import EnvStep
from twister_jax.errors import UserError
from twister_jax.randomness import Purpose, generator_for
from twister_jax.replay.store import Transition
from twister_jax.training.evaluation import play
from twister_jax.training.load import checked
from twister_jax.view.games import transition
from twister_jax.view.policy import Policy

SIDE_BY_SIDE = 8


class _EnoughError(Exception):
    """All windows are recorded."""


def record(
    policy: Policy, count: int, length: int, seed: int = 0, make_env: Any = envs.make_vector_env
) -> Transition:
    """Records windows [count, length, ...] of games that the policy plays by the evaluation's protocol.

    They come from several environments and begin anywhere in a game.

    Raises:
      UserError: the environments fail.
    """
    config, spec = policy.config, policy.spec
    num_envs = min(SIDE_BY_SIDE, count)
    per_env = -(-count // num_envs)
    each = (per_env + 1) * length
    generator = generator_for(config.seed, Purpose.EVALUATION_ENVIRONMENT, 1 + seed)
    env_seed = int(generator.integers(2**31))
    starts = np.arange(per_env) * length + generator.integers(length, size=(num_envs, per_env))
    steps: list[Transition] = []

    def collect(actions: np.ndarray | None, step: EnvStep) -> None:
        idle = np.zeros((num_envs, spec.num_actions), np.float32)
        steps.append(jax.tree.map(np.asarray, transition(idle if actions is None else actions, step)))
        if len(steps) == each:
            raise _EnoughError

    try:
        env = checked(make_env, spec)(config.game, config.env, num_envs, env_seed, evaluation=True)
        try:
            play(policy.agent, policy.state, env, [each] * num_envs, config.seed, on_step=collect)
        except _EnoughError:
            pass
        finally:
            env.close()
    except RuntimeError as error:
        raise UserError(f"{config.game} cannot be recorded: {error}") from error

    def windows(*over_time: np.ndarray) -> np.ndarray:
        streams = np.stack(over_time, axis=1)  # [env, time, ...]
        cut = [streams[env, at : at + length] for at_each in starts.T for env, at in enumerate(at_each)]
        return np.stack(cut[:count])

    return jax.tree.map(windows, *steps)
