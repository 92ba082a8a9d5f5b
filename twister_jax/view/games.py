"""Games played by the evaluation's protocol and remembered, so that any of them can be shown again.

Of a game only its actions are kept, and a few numbers for each step: screens would fill the memory.
Environments repeat themselves exactly, so a second pass through the actions of one game shows it again.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax import envs
from twister_jax.envs.base import EnvStep, Episode
from twister_jax.envs.vector import SerialVectorEnv
from twister_jax.errors import UserError
from twister_jax.randomness import Purpose, generator_for, key_for
from twister_jax.replay.store import Transition
from twister_jax.training.evaluation import games_per_env, play
from twister_jax.training.load import checked
from twister_jax.training.progress import Progress
from twister_jax.view.policy import Policy


@dataclasses.dataclass(frozen=True)
class Game:
    """One full game, as steps of its environment.

    Attributes:
      episode: its score and length; `episode.env` says which environment played it.
      first, stop: its reset step, and the step after its last, counted from the environment's first reset.
    """

    episode: Episode
    first: int
    stop: int


class Played(NamedTuple):
    """What is remembered of every step."""

    action: np.ndarray | None
    """The vector [action] that led to it; None at the very first."""
    reward: float
    is_first: bool
    value: float | None
    """As in `Frame`."""


class Frame(NamedTuple):
    """A step of a game as people see it."""

    screen: np.ndarray
    """[height, width, 3], the game in its own size and colours."""
    image: np.ndarray
    """[64, 64, channel], what the agent sees."""
    action: Any
    """That the environment took to get here; None at the start."""
    reward: float
    score: float
    """So far."""
    value: float | None
    """What the critic expects from here on; None for agents without a world model to look into."""


class Games:
    """Every game of an evaluation, and the means to show one again.

    Args:
      policy: who plays.
      episodes: full games played.
      make_env: as `envs.make_vector_env`.
      progress: told how many games are played.

    Raises:
      UserError: the environments fail.
    """

    def __init__(
        self,
        policy: Policy,
        episodes: int,
        make_env: Any = envs.make_vector_env,
        progress: Progress | None = None,
    ):
        config = policy.config
        self._policy, self._make_env = policy, checked(make_env, policy.spec)
        self._per_env = games_per_env(episodes, config.evaluation.num_envs)
        self._seed = int(generator_for(config.seed, Purpose.EVALUATION_ENVIRONMENT).integers(2**31))
        self._steps: list[list[Played]] = [[] for _ in self._per_env]
        self._left = list(self._per_env)
        self.games: list[Game] = []
        self._watcher = _Watcher(policy, len(self._per_env)) if policy.agent.dream else None
        env = self._make()
        try:
            play(
                policy.agent, policy.state, env, self._per_env, config.seed, progress, on_step=self._remember
            )
        except RuntimeError as error:
            raise UserError(f"{config.game} cannot be watched: {error}") from error
        finally:
            env.close()

    def ranked(self) -> list[Game]:
        """All games, the best first."""
        return sorted(self.games, key=lambda game: -game.episode.score)

    def played(self, game: Game) -> list[Played]:
        """The steps of a game, as many as `show` has frames."""
        return self._steps[game.episode.env][game.first : game.stop]

    def show(self, game: Game) -> Iterator[Frame]:
        """Plays a game again.

        Raises:
          UserError: the environment did not repeat itself.
        """
        index, env, score = game.episode.env, self._make(), 0.0
        try:
            step = env.reset()
            for other in set(range(env.num_envs)) - {index}:
                env.retire(other)
            idle = np.zeros((env.num_envs, env.spec.num_actions), np.float32)
            for time, known in enumerate(self._steps[index][: game.stop]):
                if known.action is not None:
                    actions = idle.copy()
                    actions[index] = known.action
                    step = env.step(env.spec.to_env(actions))
                if time < game.first:
                    continue
                if float(step.reward[index]) != known.reward or bool(step.is_first[index]) != known.is_first:
                    raise UserError(
                        f"{self._policy.config.game} does not repeat itself: no game can be shown"
                    )
                score += known.reward
                taken = None if known.is_first or known.action is None else known.action[None]
                action = None if taken is None else env.spec.to_env(taken)[0]
                yield Frame(env.screen(index), step.image[index], action, known.reward, score, known.value)
        finally:
            env.close()

    def _make(self) -> SerialVectorEnv:
        config = self._policy.config
        try:
            return self._make_env(config.game, config.env, len(self._per_env), self._seed, evaluation=True)
        except RuntimeError as error:
            raise UserError(f"{config.game} cannot be watched: {error}") from error

    def _remember(self, actions: np.ndarray | None, step: EnvStep) -> None:
        values = self._watcher(actions, step) if self._watcher else None
        for index, steps in enumerate(self._steps):
            if not self._left[index]:
                continue
            steps.append(
                Played(
                    None if actions is None else actions[index],
                    float(step.reward[index]),
                    bool(step.is_first[index]),
                    None if values is None else float(values[index]),
                )
            )
        for episode in step.episodes:
            earlier = [game.stop for game in self.games if game.episode.env == episode.env]
            # A game that ended within the reset step of an episode ended before that step.
            stop = len(self._steps[episode.env]) - int(step.is_first[episode.env])
            self.games.append(Game(episode, max(earlier, default=0), stop))
            self._left[episode.env] -= 1


class _Watcher:
    """The critic's value of every step, for which the world model observes the game."""

    def __init__(self, policy: Policy, count: int):
        dream, state, seed = policy.agent.dream, policy.state, policy.config.seed
        assert dream is not None
        self._mind = jax.jit(lambda state: dream.begin(state, count))(state)
        self._idle = np.zeros((count, policy.spec.num_actions), np.float32)
        self._count = 0

        @jax.jit
        def look_on(state, mind, step, key):
            mind = dream.observe(state, mind, step, key)
            return mind, dream.look(state, mind).value

        self._look_on, self._state, self._seed = look_on, state, seed

    def __call__(self, actions: np.ndarray | None, step: EnvStep) -> np.ndarray:
        key = key_for(self._seed, Purpose.REPORT, self._count)
        actions = self._idle if actions is None else actions
        self._mind, value = self._look_on(self._state, self._mind, transition(actions, step), key)
        self._count += 1
        return np.asarray(value)


def transition(actions: np.ndarray, step: EnvStep) -> Transition:
    """A step as the replay would hold it."""
    clipped = np.where(step.is_first[:, None], 0.0, np.clip(actions, -1.0, 1.0))
    arrays = (step.image, clipped, step.reward, step.terminal, step.is_first)
    return Transition(*map(jnp.asarray, arrays))
