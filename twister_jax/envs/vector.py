"""Several environments stepped together, surviving an emulator's failure, saved and restored exactly."""

import dataclasses
import json
import logging
from collections.abc import Callable
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import ale_py
import numpy as np
from jaxtyping import Int

from twister_jax.envs.atari import AtariEnv
from twister_jax.envs.base import EnvSpec, EnvStep, VectorEnv
from twister_jax.envs.catch import CatchEnv
from twister_jax.envs.games import CATCH, resolve_game
from twister_jax.envs.probe import probe
from twister_jax.envs.single import SingleEnv, SingleStep

if TYPE_CHECKING:
    from twister_jax.config import EnvConfig

log = logging.getLogger(__name__)

STATE_FORMAT = 1
_FORGIVEN_AFTER = 300  # steps without a failure after which an environment's earlier ones no longer count
_PROBE_STEPS = 16


def make_vector_env(game: str, config: "EnvConfig", num_envs: int, seed: int) -> VectorEnv:
    """Environments of one game, after a probe on a throwaway one.

    Catch heeds only `grayscale`: its episodes are nine steps long and have no lives.

    Args:
      game: any spelling `resolve_game` knows.
      config: the protocol. `num_envs` is taken from the argument, so that evaluation can differ.
      num_envs: how many to step together.
      seed: decides everything random in all of them.

    Raises:
      UserError: unknown game.
      RuntimeError: the probe found images blank or resets not as `VectorEnv` promises.
    """
    game = resolve_game(game)
    identity: dict[str, Any] = {"game": game}
    if game == CATCH:
        identity["grayscale"] = config.grayscale

        def make(seed: int) -> SingleEnv:
            return CatchEnv(seed, grayscale=config.grayscale)

        probe(make(seed), game)
    else:
        settings = {name: getattr(config, name) for name in _ATARI_SETTINGS}
        identity |= {"ale_py": ale_py.__version__, **settings}

        def make(seed: int) -> SingleEnv:
            return AtariEnv(game, seed, **settings)

        # A short time limit makes the probe see an episode's end.
        short = settings | {"time_limit_frames": _PROBE_STEPS * config.frame_skip}
        probe(AtariEnv(game, seed, **short), game)
    return SerialVectorEnv(make, num_envs, seed, identity)


_ATARI_SETTINGS = (
    "frame_skip",
    "noop_max",
    "sticky_actions",
    "grayscale",
    "life_loss_ends_episode",
    "fire_start",
    "time_limit_frames",
)


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
      max_failures: failures of one environment in a row that are tolerated, "in a row" being with fewer
        than 300 completed steps in between.

    Raises:
      RuntimeError: from `reset` and `step`, when an environment failed more often than that.
    """

    spec: EnvSpec
    num_envs: int

    def __init__(
        self,
        make_env: Callable[[int], SingleEnv],
        num_envs: int,
        seed: int,
        identity: dict[str, Any],
        *,
        max_failures: int = 5,
    ):
        self.num_envs = num_envs
        self._make_env = make_env
        self._seed = seed
        self._header = {"format": STATE_FORMAT, "num_envs": num_envs, **identity}
        self._game = identity["game"]
        self._max_failures = max_failures
        self._health = [_Health() for _ in range(num_envs)]
        self._envs = [self._build(index) for index in range(num_envs)]
        self._last: list[SingleStep] = []
        self._retired: dict[int, SingleStep] = {}
        self.spec = self._envs[0].spec

    def reset(self) -> EnvStep:
        """Starts a new game everywhere; unfinished ones are not reported."""
        self._retired.clear()
        self._last = [self._guarded(i, methodcaller("reset")) for i in range(self.num_envs)]
        return _together(self._last)

    def step(self, actions: Int[np.ndarray, " env"]) -> EnvStep:
        """Takes one step in every environment; see `VectorEnv`.

        Raises:
          ValueError: an action out of range, or not one integer per environment.
        """
        self._last = [
            self._retired.get(i) or self._guarded(i, methodcaller("step", action))
            for i, action in enumerate(self._checked(actions))
        ]
        return _together(self._last)

    def retire(self, env: int) -> None:
        """See `VectorEnv`."""
        image = self._last[env].image
        self._retired[env] = SingleStep(image, reward=0.0, terminal=False, is_first=False, episode=None)

    def get_state(self) -> bytes:
        """See `VectorEnv`."""
        state = {
            "header": self._header,
            "health": [dataclasses.asdict(health) for health in self._health],
            "envs": [env.get_state() for env in self._envs],
        }
        return json.dumps(state).encode()

    def set_state(self, state: bytes) -> None:
        """See `VectorEnv`. Takes as long as emulating the games that were going on, and what led to them.

        Raises:
          ValueError: the bytes are no saved state, or of environments that differ from these.
        """
        try:
            loaded = json.loads(state)
            header, health, envs = loaded["header"], loaded["health"], loaded["envs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a saved environment state: {error!r}") from error
        for name in sorted(header.keys() | self._header.keys()):
            theirs, ours = header.get(name), self._header.get(name)
            if theirs != ours:
                raise ValueError(
                    f"the saved environment state has {name}={theirs!r}, these environments have {ours!r}"
                )
        try:
            for env, each in zip(self._envs, envs, strict=True):
                env.set_state(each)
            self._health = [_Health(**each) for each in health]
            self._retired, self._last = {}, []
        except Exception as error:
            raise ValueError(f"the saved environment state is damaged: {error!r}") from error

    def close(self) -> None:
        """Lets the emulators go."""
        self._envs = []

    def _checked(self, actions: Int[np.ndarray, " env"]) -> list[int]:
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"expected {self.num_envs} integer actions, got {actions.dtype} of shape {actions.shape}"
            )
        if actions.min() < 0 or actions.max() >= self.spec.num_actions:
            raise ValueError(f"actions must be in 0..{self.spec.num_actions - 1}, got {actions.tolist()}")
        return actions.tolist()

    def _build(self, index: int) -> SingleEnv:
        entropy = np.random.SeedSequence((self._seed, index, self._health[index].rebuilds))
        return self._make_env(int(entropy.generate_state(1, np.uint64)[0]))

    def _guarded(self, index: int, call: Callable[[SingleEnv], SingleStep]) -> SingleStep:
        try:
            step = call(self._envs[index])
        except Exception as error:
            return self._recover(index, error)
        health = self._health[index]
        health.steps += 1
        if health.steps >= _FORGIVEN_AFTER:
            health.failures = 0
        return step

    def _recover(self, index: int, error: Exception) -> SingleStep:
        """Builds an environment anew, until one can be reset or the patience ends."""
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
            health.rebuilds += 1
            try:
                self._envs[index] = self._build(index)
                return self._envs[index].reset()
            except Exception as again:
                error = again


def _together(steps: list[SingleStep]) -> EnvStep:
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
