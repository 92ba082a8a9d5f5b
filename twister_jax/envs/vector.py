"""Several environments stepped together, surviving an emulator's failure, saved and restored exactly."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import numpy as np
from jaxtyping import UInt8

from twister_jax import foreign_json
from twister_jax.envs.base import Env, EnvSpec, EnvStep, Screen, Step

log = logging.getLogger(__name__)

STATE_FORMAT = 2
_FORGIVEN_AFTER = 300  # steps without a failure after which an environment's earlier ones no longer count


@dataclasses.dataclass
class _Health:
    """An environment's failures: in all, lately, and steps since the last one."""

    rebuilds: int = 0
    failures: int = 0
    steps: int = 0


class SerialVectorEnv:
    """Environments stepped one after another in the calling thread.

    ALE keeps Python's lock while it emulates (measured with ale-py 0.12: two threads take as long as one
    thread doing both), so threads would gain nothing.

    An exception out of an environment costs that environment its episode, and not the run: it is logged,
    the environment is built anew and answers with a reset step. The lost episode is not reported.

    Args:
      make_env: builds an environment from a seed.
      num_envs: how many.
      seed: the environments' seeds derive from it, their index, and how often they were rebuilt.
      identity: what must agree between a saved state and the environments that take it up: at least
        `game`; values as JSON keeps them.
      first, total: the environments are those from number `first` on of `total`; by default all of them.
      max_failures: failures of one environment in a row that are tolerated, "in a row" being with fewer
        than 300 completed steps in between.

    Raises:
      RuntimeError: from `reset` and `step`, when an environment failed more often than that.
    """

    spec: EnvSpec
    num_envs: int

    def __init__(
        self,
        make_env: Callable[[int], Env],
        num_envs: int,
        seed: int,
        identity: dict[str, Any],
        *,
        max_failures: int = 5,
        first: int = 0,
        total: int | None = None,
    ):
        self.num_envs = num_envs
        self._part = slice(first, first + num_envs)
        self._make_env = make_env
        self._seed = seed
        self._header = {"format": STATE_FORMAT, "num_envs": total or num_envs, **identity}
        self._game = identity["game"]
        self._max_failures = max_failures
        self._health = [_Health() for _ in range(num_envs)]
        self._envs = [self._build(index) for index in range(num_envs)]
        self._last: list[Step] = []
        self._retired: dict[int, Step] = {}
        self.spec = self._envs[0].spec

    def reset(self) -> EnvStep:
        """Starts a new game everywhere; unfinished ones are not reported."""
        self._retired.clear()
        self._last = [self._guarded(i, methodcaller("reset")) for i in range(self.num_envs)]
        return _together(self._last)

    def step(self, actions: np.ndarray) -> EnvStep:
        """Takes one step in every environment; see `VectorEnv`.

        Raises:
          ValueError: an action out of range, or of another kind or shape than the specification says.
        """
        self._last = [
            self._retired.get(i) or self._guarded(i, methodcaller("step", action))
            for i, action in enumerate(self._checked(actions))
        ]
        return _together(self._last)

    def retire(self, env: int) -> None:
        """See `VectorEnv`."""
        self._retired[env] = self._nothing(self._last[env].image)

    def screen(self, env: int) -> UInt8[np.ndarray, "height width 3"]:
        """What people see of an environment that has been reset: its own screen where it has one."""
        shown = self._envs[env]
        if isinstance(shown, Screen):
            return shown.screen()
        image = self._last[env].image
        return np.broadcast_to(image, (*image.shape[:2], 3))

    def get_state(self) -> bytes:
        """See `VectorEnv`."""
        state = {
            "header": self._header,
            "health": [dataclasses.asdict(health) for health in self._health],
            "envs": [env.get_state() for env in self._envs],
            "retired": sorted(self._retired),
        }
        return json.dumps(state).encode()

    def set_state(self, state: bytes) -> int:
        """See `VectorEnv`. Takes as long as emulating the games that were going on, and what led to them.

        Raises:
          ValueError: the bytes are no saved state, or of environments that differ from these.
        """
        try:
            loaded = foreign_json.parse(state)
            header, health, envs = loaded["header"], loaded["health"], loaded["envs"]
            names = sorted(header.keys() | self._header.keys())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a saved environment state: {error!r}") from error
        for name in names:
            theirs, ours = header.get(name), self._header.get(name)
            if theirs != ours:
                raise ValueError(
                    f"the saved environment state has {name}={theirs!r}, these environments have {ours!r}"
                )
        try:
            if not len(health) == len(envs) == header["num_envs"]:
                raise ValueError(f"{len(envs)} of {header['num_envs']} environments")
            envs = envs[self._part]
            self._health = [_Health(**each) for each in health[self._part]]
            for index, (env, each) in enumerate(zip(self._envs, envs, strict=True)):
                if each is None:
                    self._rebuild(index)  # with other seeds: its first episodes were played already
                else:
                    env.set_state(each)
            self._last = []
            self._retired = {
                int(i): self._nothing(np.zeros(self.spec.image_shape, np.uint8))
                for i in loaded.get("retired", [])
            }
        except Exception as error:
            raise ValueError(f"the saved environment state is damaged: {error!r}") from error
        return envs.count(None)

    @staticmethod
    def _nothing(image: np.ndarray) -> Step:
        return Step(image, reward=0.0, terminal=False, is_first=False, episode=None)

    def close(self) -> None:
        """Lets the emulators go."""
        for env in self._envs:
            close(env)
        self._envs = []

    def _checked(self, actions: np.ndarray) -> list[Any]:
        actions, spec = np.asarray(actions), self.spec
        if spec.discrete:
            if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
                raise ValueError(
                    f"expected {self.num_envs} integer actions, got {actions.dtype} of shape {actions.shape}"
                )
            if actions.min() < 0 or actions.max() >= spec.num_actions:
                raise ValueError(f"actions must be in 0..{spec.num_actions - 1}, got {actions.tolist()}")
            return actions.tolist()
        shape = (self.num_envs, spec.num_actions)
        if actions.shape != shape or not np.issubdtype(actions.dtype, np.floating):
            raise ValueError(
                f"expected actions of shape {shape} in [-1, 1], got {actions.dtype} of shape {actions.shape}"
            )
        if not np.all(np.abs(actions) <= 1):
            raise ValueError(f"actions must be in [-1, 1], got {actions.tolist()}")
        return list(actions)

    def _build(self, index: int) -> Env:
        place = self._part.start + index
        entropy = np.random.SeedSequence((self._seed, place, self._health[index].rebuilds))
        return self._make_env(int(entropy.generate_state(1, np.uint64)[0]))

    def _rebuild(self, index: int) -> None:
        self._health[index].rebuilds += 1
        close(self._envs[index])
        self._envs[index] = self._build(index)

    def _guarded(self, index: int, call: Callable[[Env], Step]) -> Step:
        try:
            step = call(self._envs[index])
        except Exception as error:
            return self._recover(index, error)
        health = self._health[index]
        health.steps += 1
        if health.steps >= _FORGIVEN_AFTER:
            health.failures = 0
        return step

    def _recover(self, index: int, error: Exception) -> Step:
        """Rebuilds an environment, until one can be reset or it has failed too often."""
        health = self._health[index]
        while True:
            health.failures += 1
            health.steps = 0
            if health.failures > self._max_failures:
                raise RuntimeError(
                    f"environment {index} ({self._game}) failed {health.failures} times in a row; "
                    f"the last time with {error!r}"
                ) from error
            log.warning(
                "environment %d (%s) failed with %r: its episode is lost, building it anew",
                index,
                self._game,
                error,
            )
            try:
                self._rebuild(index)
                return self._envs[index].reset()
            except Exception as again:
                error = again


def close(env: Env) -> None:
    """Gives back what an environment holds, if it says how."""
    with contextlib.suppress(Exception):  # it may be broken already
        getattr(env, "close", lambda: None)()


def join_states(parts: Sequence[bytes]) -> bytes:
    """What `get_state` of all environments would have given, from those of parts of them, in order."""
    states = [json.loads(part) for part in parts]
    whole = {
        name: [each for state in states for each in state[name]] for name in ("health", "envs", "retired")
    }
    return json.dumps(states[0] | whole).encode()


def _together(steps: list[Step]) -> EnvStep:
    """New arrays every time: a device may still be reading the last ones when the next step is taken."""
    return EnvStep(
        image=np.stack([step.image for step in steps]),
        reward=np.array([step.reward for step in steps], np.float32),
        terminal=np.array([step.terminal for step in steps]),
        is_first=np.array([step.is_first for step in steps]),
        episodes=tuple(
            step.episode._replace(env=i) for i, step in enumerate(steps) if step.episode is not None
        ),
    )
