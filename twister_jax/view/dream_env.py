"""A world model with a start state is an environment: it keeps the project's own contract."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from twister_jax.agents.base import Dream
from twister_jax.agents.open_loop import CONTEXT
from twister_jax.envs.base import Episode, Step
from twister_jax.envs.vector import SerialVectorEnv
from twister_jax.errors import UserError
from twister_jax.replay.store import Transition
from twister_jax.view.policy import Policy, load
from twister_jax.view.recording import record

STARTS = 8
"""Windows of real play that are recorded to dream on from."""
LONGEST = 500
"""Steps after which a dream is cut; what is learned in windows of a few dozen steps drifts long before."""


class DreamEnv:
    """An `Env` in which the world model takes the game's place.

    `reset` shows the model a window of real steps and returns what it makes of the last; `step` returns
    what it foresees. Rewards are those it predicts, as its agent learns them, and the episode ends where the
    model holds the end for more likely than not.

    Args:
      policy: whose world model dreams.
      starts: windows of real steps [window, time, ...] to go on from.
      seed: decides which start a game has, and every latent.

    Raises:
      UserError: the agent has no world model to dream with, or every start is an episode's last step.
    """

    def __init__(self, policy: Policy, starts: Transition, seed: int):
        self.spec = policy.spec
        self._starts = jax.tree.map(lambda x: x[~np.asarray(starts.terminal)[:, -1]], starts)
        if not len(self._starts.reward):
            raise UserError("every start state is an episode's last: there is nothing to dream on from")
        self._state, self._seed = policy.state, seed
        self._see, self._foresee = _compiled(dream_of(policy))
        self._games, self._actions = 0, list[Any]()
        self._mind: Any = None
        self._over, self._score = True, 0.0
        self._image = np.zeros(self.spec.image_shape, np.uint8)

    def reset(self) -> Step:
        """See `Env`."""
        self._games, self._actions, self._over, self._score = self._games + 1, [], False, 0.0
        key = jax.random.fold_in(jax.random.key(self._seed), self._games)
        start = int(np.random.default_rng([self._seed, self._games]).integers(len(self._starts.reward)))
        window = jax.tree.map(lambda x: jnp.asarray(x[start]), self._starts)
        self._mind, image, self._key = self._see(self._state, window, key)
        return Step(self._to_uint8(image), 0.0, False, True, None)

    def step(self, action: Any) -> Step:
        """See `Env`."""
        if self._over:
            return self.reset()
        self._actions.append(action if self.spec.discrete else np.asarray(action, float).tolist())
        vector = jnp.asarray(self._vector(action), jnp.float32)
        key = jax.random.fold_in(self._key, len(self._actions))
        self._mind, glimpse = self._foresee(self._state, self._mind, vector, key)
        reward, terminal = float(glimpse.reward[0]), bool(glimpse.continues[0] < 0.5)
        self._score += reward
        cut = not terminal and len(self._actions) == LONGEST
        self._over = terminal or cut
        episode = Episode(0, self._score, len(self._actions), truncated=cut) if self._over else None
        return Step(self._to_uint8(glimpse.image), reward, terminal, False, episode)

    def get_state(self) -> dict[str, Any]:
        """See `Env`: which game it is, and the actions so far."""
        return {"seed": self._seed, "games": self._games, "actions": self._actions, "over": self._over}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `Env`: dreams it all again."""
        self._seed, self._games = state["seed"], max(0, state["games"] - 1)
        self._over = True
        if state["games"]:
            self.reset()
            for action in state["actions"]:
                self.step(action)

    def _vector(self, action: Any) -> Any:
        return np.eye(self.spec.num_actions)[[action]] if self.spec.discrete else np.asarray(action)[None]

    def _to_uint8(self, image: Any) -> UInt8[np.ndarray, "height width channel"]:
        pixels = np.clip(np.asarray(image)[0], 0.0, 1.0) * 255.0
        return np.rint(pixels).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _compiled(dream: Dream) -> tuple[Any, Any]:
    """The compiled functions of a dream, shared by all environments that use it."""

    @jax.jit
    def see(state, window, key):
        def step(mind, inputs):
            here, key = inputs
            return dream.observe(state, mind, jax.tree.map(lambda x: x[None], here), key), None

        key_seen, key_next = jax.random.split(key)
        window = window._replace(is_first=window.is_first.at[0].set(True))
        keys = jax.random.split(key_seen, len(window.reward))
        mind, _ = jax.lax.scan(step, dream.begin(state, 1), (window, keys))
        return mind, dream.look(state, mind).image, key_next

    @jax.jit
    def foresee(state, mind, action, key):
        mind = dream.imagine(state, mind, action, key)
        return mind, dream.look(state, mind)

    return see, foresee


def dream_of(policy: Policy) -> Dream:
    """The world model behind a policy.

    Raises:
      UserError: its agent has none that can be looked into.
    """
    if policy.agent.dream is None:
        raise UserError(f"agent {policy.config.agent} has no world model to dream with (Agent.dream)")
    return policy.agent.dream


def dream_env(policy: Policy | str | Path, starts: Transition | None = None, *, seed: int = 0) -> DreamEnv:
    """The world model of a policy as an environment.

    Args:
      policy: a policy, or what `load` takes.
      starts: windows of real steps [window, time, ...]; by default some are recorded in the game.
      seed: decides which starts are recorded and taken, and every latent.

    Raises:
      UserError: nothing can be loaded, the game cannot be played here, or the agent has no world model.
    """
    if not isinstance(policy, Policy):
        policy = load(policy)
    dream_of(policy)
    return DreamEnv(policy, record(policy, STARTS, CONTEXT, seed) if starts is None else starts, seed)


def make_vector_env(policy: Policy, starts: Transition) -> Any:
    """Stands in for `envs.make_vector_env`: dreams of the policy's game, stepped together."""

    def make(
        game: str, settings: Any, num_envs: int, seed: int, *, evaluation: bool = False
    ) -> SerialVectorEnv:
        identity = {"game": f"dream of {game}", "evaluation": evaluation}
        return SerialVectorEnv(lambda seed: DreamEnv(policy, starts, seed % 2**32), num_envs, seed, identity)

    return make
