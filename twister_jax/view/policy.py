"""A trained policy in three lines: `policy = load(path)`, `policy.carry()`, `policy.act(carry, image)`.

What is loaded is a run directory, a file that `export` wrote, or the authors' published weights. No
environment is made but for the latter, whose files do not say how many actions there are.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax import agents, envs
from twister_jax.agents.base import Agent, Carry, Observation, State
from twister_jax.agents.fixtures import BROKEN, published_weights
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec
from twister_jax.errors import UserError
from twister_jax.fields import show
from twister_jax.files import one_line
from twister_jax.presets import complete
from twister_jax.randomness import Purpose, key_for
from twister_jax.runtime import start_jax
from twister_jax.training import state_files
from twister_jax.training.load import load_run
from twister_jax.view import weights_file


class Memory(NamedTuple):
    """What a policy carries from one step to the next; empty before the first."""

    carry: Carry | None
    envs: int
    steps: int


@dataclasses.dataclass(frozen=True, repr=False)
class Policy:
    """What a run learned, ready to act and to dream.

    Attributes:
      config: as it was trained.
      spec: the images it takes and the actions it gives.
      agent: its functions.
      state: what it learned.
      about: where it comes from and what it scored, as far as is known.
    """

    config: Config
    spec: EnvSpec
    agent: Agent
    state: State
    about: Mapping[str, Any]

    def __repr__(self) -> str:
        steps = self.about.get("env_steps")
        trained = f", {steps:,} steps" if isinstance(steps, int) else ""
        return f"Policy({self.config.agent!r} on {self.config.game!r}{trained})"

    def carry(self) -> Memory:
        """The memory of a policy, for one environment or for many, in front of its first image."""
        return Memory(None, 0, 0)

    def act(
        self, carry: Memory, image: np.ndarray, is_first: Any = None, reward: Any = None
    ) -> tuple[Any, Memory]:
        """Chooses an action as the evaluation protocol does.

        Args:
          carry: from `carry`, or from the call before.
          image: one image, or a batch of as many environments as in the call before; uint8 as `spec` says.
          is_first: which images begin an episode (a bool, or one for each environment). By default those
            of the first call, and no others.
          reward: of the game, that came with each image; only for agents with `reads_reward`.

        Returns:
          An action as the environment takes it, and what to carry on: an index, or values [action] in
          [−1, 1]; of a batch, an array with a leading axis. Draws follow from the run's seed and the number
          of calls.

        Raises:
          UserError: the image is not of the shape or type that the policy was trained on, or the batch is
            not as large as before, or a reward is missing.
        """
        image = np.asarray(image)
        shape = self.spec.image_shape
        if image.dtype != np.uint8 or image.shape[-3:] != shape or image.ndim > 4:
            raise UserError(
                f"the policy takes uint8 images of shape {shape}, or a batch of them; "
                f"this is {image.dtype} of shape {image.shape}"
            )
        images = image.reshape(-1, *shape)
        if carry.envs not in (0, len(images)):
            raise UserError(
                f"the carry is of {carry.envs} environments, and the batch of {len(images)} images"
            )
        known = carry.carry if carry.envs else self._init_carry(len(images))
        first = np.broadcast_to(np.asarray(not carry.envs if is_first is None else is_first), len(images))
        observation = Observation(jnp.asarray(images), jnp.asarray(first, bool))
        if self.agent.reads_reward:
            if reward is None and not first.all():
                raise UserError("this policy reads rewards too: act(carry, image, reward=...)")
            rewards = np.broadcast_to(np.asarray(0.0 if reward is None else reward, np.float32), len(images))
            observation = observation._replace(reward=jnp.asarray(rewards))
        key = key_for(self.config.seed, Purpose.EVALUATE, carry.steps)
        vectors, known = self._act(self.state, known, observation, key)
        actions = self.spec.to_env(np.asarray(vectors))
        return actions if image.ndim == 4 else actions[0], Memory(known, len(images), carry.steps + 1)

    def action_name(self, action: Any) -> str:
        """For people: the discrete action's name, or the continuous values."""
        if not self.spec.discrete:
            return " ".join(f"{value:+.2f}" for value in np.atleast_1d(action))
        names = self.spec.action_names
        return names[int(action)] if int(action) < len(names) else str(int(action))

    @functools.cached_property
    def _act(self) -> Any:
        return jax.jit(self.agent.act_evaluate)

    def _init_carry(self, count: int) -> Carry:
        return jax.jit(lambda state: self.agent.init_carry(state, count))(self.state)


def load(
    path: str | Path,
    step: int | None = None,
    *,
    config: Config | None = None,
    spec: EnvSpec | None = None,
) -> Policy:
    """The policy that a run directory or a file holds.

    Args:
      path: a run directory; a .safetensors file that `export` wrote; or, with `config`, published weights
        under the authors' names (.safetensors or .npz).
      step: of the checkpoint in a run directory; None means the newest usable one.
      config: the settings that published weights were trained with; all else says so itself.
      spec: of published weights' environment; None asks the environment of `config.game`.

    Raises:
      UserError: there is no such thing, it is damaged, or it holds something else. The message says which.
    """
    start_jax()
    path = Path(path)
    if not os.path.exists(path):  # of pathlib, a name that is too long raises
        raise UserError(f"{path}: there is no such run directory or file")
    if path.is_dir():
        return from_run(path, step)
    if step is not None:
        raise UserError(f"{path} is a file: only a run directory has checkpoints of several steps")
    arrays, about = weights_file.read(path)
    if about is not None:
        return _from_export(path, arrays, about)
    return _from_published(path, arrays, config, spec)


def from_run(directory: Path, step: int | None = None, **overrides: Any) -> Policy:
    """The policy of a run directory; see `training.load.load_run` for the arguments."""
    loaded = load_run(directory, step, **overrides)
    counters = loaded.counters
    about = {"env_steps": counters.env_steps, "updates": counters.updates, "notes": list(counters.notes)}
    return Policy(loaded.config, loaded.spec, loaded.agent, loaded.state, about)


def _from_export(path: Path, arrays: Mapping[str, np.ndarray], about: dict[str, Any]) -> Policy:
    config, spec = weights_file.settings(path, about)
    try:
        agent = agents.make_agent(config, spec)
        like = jax.eval_shape(agent.init, key_for(0, Purpose.INIT))
    except BROKEN as error:
        raise UserError(f"{path} has settings of which no agent can be made: {one_line(error)}") from None
    return Policy(config, spec, agent, weights_file.fill(path, like, arrays), about)


def _from_published(
    path: Path, arrays: Mapping[str, np.ndarray], config: Config | None, spec: EnvSpec | None
) -> Policy:
    # A fixture of ours names the weights among its other arrays.
    named = [name.removeprefix("param/") for name in arrays if name.startswith("param/")] or list(arrays)
    package = agents.package_of_fixture(named)
    if package is None:
        raise UserError(
            f"{path} is neither a policy that `export` wrote nor an agent's published weights: "
            f"its first array is {show(next(iter(arrays), 'missing'))}"
        )
    if config is None:
        raise UserError(
            f"{path} holds published weights of {package.title} and does not say their sizes: "
            "load(path, config=make_config(...))"
        )
    if agents.package(config.agent) is not package:
        raise UserError(f"{path} holds weights of {package.title}, and the config is of {config.agent}")
    config = complete(config)
    if spec is None:
        suite, name = envs.resolve(config.game)
        spec = suite.make(name, config.env, config.seed, evaluation=True).spec
    try:
        weights = published_weights(dict(arrays)) or dict(arrays)
        state = package.function("weights", "state_of_published")(weights, config.algorithm, spec)
    except BROKEN as error:
        raise UserError(f"{path} has weights that do not fit the settings: {one_line(error)}") from None
    weights_file.check_finite(path, state_files.named_leaves(state))
    return Policy(config, spec, agents.make_agent(config, spec), state, {"source": path.name})
