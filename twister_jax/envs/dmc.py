"""Continuous control from pixels: 20 tasks of DeepMind Control (Tassa et al. 2018, arXiv:1801.00690).

As in the paper of the published agent: 64x64 RGB drawn directly, two simulator steps per agent step, four
environments, episodes of 1,000 simulator steps that never end earlier.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
from typing import Annotated, Any, ClassVar, cast

import numpy as np
from jaxtyping import UInt8

from twister_jax.config import EnvConfig
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec, Episode, Step, Suite
from twister_jax.envs.renderer import choose_renderer
from twister_jax.errors import MissingExtraError
from twister_jax.fields import Range

TASKS = {
    f"{domain}_{task}": (domain, task)
    for domain, tasks in {
        "acrobot": ("swingup",),
        "ball_in_cup": ("catch",),
        "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse"),
        "cheetah": ("run",),
        "finger": ("spin", "turn_easy", "turn_hard"),
        "hopper": ("hop", "stand"),
        "pendulum": ("swingup",),
        "quadruped": ("run", "walk"),
        "reacher": ("easy", "hard"),
        "walker": ("run", "stand", "walk"),
    }.items()
    for task in tasks
}
"""Name -> domain and task, as dm_control has them."""
BEST_SCORE = 1_000.0
"""The reward of a simulator step is at most 1."""
_PLACES = ("geom_pos", "site_pos")  # tasks put their targets into the model itself
_PROBE_STEPS = 16


@dataclasses.dataclass(frozen=True)
class DmcConfig(EnvConfig):
    """The DeepMind Control Suite from pixels."""

    num_envs: Annotated[int, Range(1, 1024)] = 4
    """Environments stepped together while training."""
    action_repeat: Annotated[int, Range(1, 100)] = 2
    """Simulator steps per agent step; the reward is their sum, the picture is taken after the last."""
    episode_steps: Annotated[int, Range(1, 1_000)] = 1_000
    """Simulator steps after which an episode is cut, without being terminal."""


class DmcEnv:
    """One task.

    Args:
      name: of `TASKS`.
      seed: decides where episodes start.
      action_repeat: see `DmcConfig`.
      episode_steps: see `DmcConfig`.

    Raises:
      UserError: dm_control is not installed, or cannot draw here.
    """

    def __init__(self, name: str, seed: int, *, action_repeat: int = 2, episode_steps: int = 1_000):
        if importlib.util.find_spec("dm_control") is None:
            raise MissingExtraError("dmc", f"dmc:{name}")
        choose_renderer()
        from dm_control import suite

        domain, task = TASKS[name]
        self._random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
        self._env = suite.load(domain, task, task_kwargs={"random": self._random})
        self._env._step_limit = min(self._env._step_limit, episode_steps)
        self._camera = 2 if domain == "quadruped" else 0  # its others lose the animal from sight
        self._action_repeat = action_repeat
        self._score, self._length = 0.0, 0
        model = self._env.physics.model
        self.spec = EnvSpec(
            image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
            num_actions=model.nu,
            discrete=False,
            action_names=tuple(model.id2name(index, "actuator") for index in range(model.nu)),
        )

    def reset(self) -> Step:
        """See `Env`."""
        self._env.reset()
        self._score, self._length = 0.0, 0
        return Step(self._image(), 0.0, False, True, None)

    def step(self, action: np.ndarray) -> Step:
        """See `Env`."""
        if self._env._reset_next_step:
            return self.reset()
        reward, ended = 0.0, False
        for _ in range(self._action_repeat):
            simulated = self._env.step(action)
            reward += simulated.reward
            ended = simulated.last()
            if ended:
                break
        self._score += reward
        self._length += 1
        episode = Episode(0, self._score, self._length, truncated=True) if ended else None
        return Step(self._image(), reward, False, False, episode)

    def get_state(self) -> dict[str, Any]:
        """See `Env`. dm_control's own `physics.get_state` leaves out the solver's warm start, for one."""
        import mujoco

        model, data = self._pointers()
        physics = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        kind, numbers, *position = cast(tuple[Any, ...], self._random.get_state())
        return {
            "physics": physics.tolist(),
            "places": {name: getattr(model, name).tolist() for name in _PLACES},
            "random": [kind, numbers.tolist(), *position],
            "step_count": self._env._step_count,
            "reset_next_step": self._env._reset_next_step,
            "score": self._score,
            "length": self._length,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """See `Env`."""
        import mujoco

        self._env.reset()  # what a task sets at every start alike
        model, data = self._pointers()
        for name in _PLACES:
            getattr(model, name)[:] = np.reshape(state["places"][name], (-1, 3))
        physics = np.array(state["physics"])
        mujoco.mj_setState(model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(model, data)
        # Once more: the pass forward, which filled in what follows from the state, also warmed up the solver.
        mujoco.mj_setState(model, data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        self._random.set_state(state["random"])
        self._env._step_count = state["step_count"]
        self._env._reset_next_step = state["reset_next_step"]
        self._score, self._length = float(state["score"]), int(state["length"])

    def close(self) -> None:
        """Gives the drawing context back."""
        self._env.close()

    def _pointers(self) -> tuple[Any, Any]:
        physics = self._env.physics
        return physics.model.ptr, physics.data.ptr

    def screen(self) -> UInt8[np.ndarray, "240 320 3"]:
        """See `Screen`."""
        return self._env.physics.render(240, 320, camera_id=self._camera).copy()

    def _image(self) -> UInt8[np.ndarray, "64 64 3"]:
        return self._env.physics.render(IMAGE_SIZE, IMAGE_SIZE, camera_id=self._camera).copy()


class DmcSuite(Suite):
    """20 tasks."""

    name = "dmc"
    description = "dmc:TASK of the DeepMind Control Suite (dmc:walker_walk, …)"
    prefixed = True
    settings = DmcConfig()
    presets: ClassVar = {
        # Random until there are 100 windows of 64 steps in all: 87 times 4.
        "paper": {
            "train.steps": 500_000,
            "train.prefill_steps": 348,
            "train.updates_per_step": 0.5,
            "evaluation.episodes": 10,
            "evaluation.num_envs": 5,
        },
        "cpu": {
            "train.steps": 20_000,
            "train.prefill_steps": 1_000,
            "train.updates_per_step": 0.5,
            "evaluation.episodes": 10,
            "evaluation.num_envs": 5,
        },
        "debug": {"env.episode_steps": 60},
    }

    def names(self) -> tuple[str, ...]:
        """See `Suite`."""
        return tuple(TASKS)

    def resolve(self, name: str) -> str | None:
        """See `Suite`."""
        spelled = name.strip().lower().replace("-", "_").replace(" ", "_")
        return spelled if spelled in TASKS else None

    def make(self, name: str, settings: DmcConfig, seed: int, *, evaluation: bool = False) -> DmcEnv:
        """See `Suite`."""
        return DmcEnv(name, seed, action_repeat=settings.action_repeat, episode_steps=settings.episode_steps)

    def for_probe(self, settings: DmcConfig) -> DmcConfig:
        """See `Suite`."""
        steps = min(settings.episode_steps, _PROBE_STEPS * settings.action_repeat)
        return dataclasses.replace(settings, episode_steps=steps)

    def identity(self, name: str, settings: DmcConfig) -> dict[str, Any]:
        """See `Suite`."""
        return {**_versions(), **super().identity(name, settings)}

    def protocol(self, name: str, settings: DmcConfig) -> dict[str, Any]:
        """See `Suite`."""
        return {
            "frames": "64x64 RGB, drawn at this size; no other observation",
            "frame_skip": settings.action_repeat,
            "episode": f"{settings.episode_steps} simulator steps, never terminal",
            "action_range": "clipped to [-1, 1], not rescaled",
            "best_score": BEST_SCORE * settings.episode_steps / 1_000,
            "renderer": os.environ.get("MUJOCO_GL", "not chosen yet"),
            **_versions(),
        }

    def check(self) -> str:
        """See `Suite`."""
        if importlib.util.find_spec("dm_control") is None:
            return str(MissingExtraError("dmc", "the DeepMind Control Suite"))
        return f"MuJoCo draws with {choose_renderer()}"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("dm_control", "mujoco")}


SUITE = DmcSuite()
