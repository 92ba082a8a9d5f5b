"""A short look at a throwaway environment, before a run trusts its kind."""

from typing import Any

import numpy as np

from twister_jax.envs.base import Env, Step
from twister_jax.errors import UserError
from twister_jax.files import one_line

_STEPS = 64


def probe(env: Env, name: str) -> None:
    """Plays some steps, across an episode's end if there is one, and checks what every run relies on.

    Raises:
      RuntimeError: images of another kind than the specification says, all images blank, resets that are not
        steps of their own, or an exception. The message says which.
    """
    try:
        _play(env, name)
    except (UserError, RuntimeError):
        raise
    except Exception as error:
        raise RuntimeError(f"{name} fails when played: {type(error).__name__}: {one_line(error)}") from error


def _play(env: Env, name: str) -> None:
    generator = np.random.default_rng(0)

    def action(count: int) -> Any:
        if env.spec.discrete:
            return count % env.spec.num_actions
        return env.spec.to_env(env.spec.random_actions(generator, 1))[0]

    step = env.reset()
    _require(step.is_first, name, "reset() did not return a reset step")
    seen = False
    ended = False
    for count in range(_STEPS):
        _check(step, env, name)
        # Some games show nothing for their first frames, so one picture among many is enough.
        seen = seen or step.image.min() < step.image.max()
        was_end = (step.terminal or step.episode is not None) and not step.is_first
        step = env.step(action(count))
        if was_end:
            ended = True
            _require(step.is_first, name, "the step after an episode's end is not a reset step")
        elif not ended:
            _require(not step.is_first, name, "a reset step came before the episode had ended")
    _require(seen, name, f"the first {_STEPS} images are blank")


def _check(step: Step, env: Env, name: str) -> None:
    shape, dtype = step.image.shape, step.image.dtype
    expected = env.spec.image_shape
    _require(
        shape == expected and dtype == np.uint8,
        name,
        f"images are {dtype} of shape {shape}, not uint8 of shape {expected}",
    )
    _require(np.isfinite(step.reward), name, f"a reward is {step.reward}")
    if step.is_first:
        _require(step.reward == 0, name, f"a reset step has reward {step.reward}")
        _require(not step.terminal, name, "a reset step is terminal")


def _require(condition: bool | np.bool_, name: str, problem: str) -> None:
    if not condition:
        raise RuntimeError(f"{name} does not behave as an environment should: {problem}")
