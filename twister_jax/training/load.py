"""Loading a run: one function for evaluation, pictures, notebooks and tests."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from twister_jax import agents, presets
from twister_jax.agents.base import Agent, State
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec, VectorEnv
from twister_jax.errors import UserError
from twister_jax.fields import MOST_WIDE, replace, show
from twister_jax.files import one_line
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.rundir import check_same_run
from twister_jax.training.state import Counters, MakeAgent, RunState

AnyEnv = TypeVar("AnyEnv", bound=VectorEnv)

_LARGEST_PICTURE = 1 << 24  # bytes
_LONGEST_NAME = 200  # characters of an action's


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run as one of its checkpoints holds it, without replay and environments.

    Attributes:
      config: as the run was trained, its `logdir` being where it was found.
      spec: what its environments give and take.
      agent: its functions.
      state: what it learned.
      counters: where it stood.
    """

    config: Config
    spec: EnvSpec
    agent: Agent
    state: State
    counters: Counters


def load_run(
    directory: str | Path,
    step: int | None = None,
    make_agent: MakeAgent = agents.make_agent,
    **overrides: Any,
) -> LoadedRun:
    """What a run directory holds; nothing in it is changed, and no environment is made.

    Args:
      directory: of the run.
      step: environment steps behind the checkpoint; None means the newest usable one.
      make_agent: as `agents.make_agent`.
      **overrides: other settings by dotted name, as in `**{"evaluation.episodes": 5}`.

    Raises:
      UserError: it is no run directory, has no such checkpoint, or an override cannot work.
    """
    stored = presets.read_config(Path(directory))
    config = replace(stored, {"logdir": str(directory), **overrides})
    presets.validate(config)
    checkpoints = Path(directory) / "checkpoints"
    found: dict[str, Any] = {}

    def state_like(host: dict[str, Any]) -> RunState:
        check_same_run(checkpoints, host.get("config"), stored.to_dict(), stored.changeable())
        found["spec"] = spec_of(host.get("spec"), directory)
        found["agent"] = make_agent(config, found["spec"])
        return RunState.shapes(found["agent"], found["spec"], config.env.num_envs)

    state, host = Checkpointer(checkpoints).load_state(state_like, step)
    try:
        counters = Counters.from_host(host["counters"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        said = one_line(error)
        raise UserError(f"{directory} does not say where the run stood ({said}): it is damaged") from None
    return LoadedRun(config, found["spec"], found["agent"], state.agent, counters)


def spec_of(stored: Any, directory: str | Path) -> EnvSpec:
    """A specification as JSON kept it.

    Raises:
      UserError: it is something else.
    """
    try:
        spec = EnvSpec(
            image_shape=tuple(stored["image_shape"]),
            num_actions=stored["num_actions"],
            discrete=stored["discrete"],
            action_names=tuple(stored["action_names"]),
        )
        sizes, names = (*spec.image_shape, spec.num_actions), spec.action_names
        sound = len(spec.image_shape) == 3 and all(type(n) is int and 0 < n <= MOST_WIDE for n in sizes)
        sound = sound and math.prod(spec.image_shape) <= _LARGEST_PICTURE
        sound &= type(spec.discrete) is bool and len(names) <= MOST_WIDE
        sound &= all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in names)
        sound &= "".join(names).isprintable()
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{directory} does not say what its environments were like: it is damaged")
    return spec


def checked(make_env: Callable[..., AnyEnv], spec: EnvSpec) -> Callable[..., AnyEnv]:
    """`make_env` for what was trained in such environments; raises `UserError` where it makes others."""

    def make(game: str, *args: Any, **options: Any) -> AnyEnv:
        env = make_env(game, *args, **options)
        for name in ("image_shape", "num_actions", "discrete"):
            ours, theirs = getattr(env.spec, name), getattr(spec, name)
            if ours != theirs:
                env.close()
                raise UserError(
                    f"{game} has {name} = {show(ours)} here, and what plays was trained with {show(theirs)}: "
                    "it is damaged, or the game is another one by now"
                )
        return env

    return make
