"""Any environment of gymnasium that has a picture: `gym:CartPole-v1`, or one's own, `gym:package:Mine-v0`.

The picture is an observation of uint8 pixels, or one entry of a dictionary of observations, or what the
environment renders. Nothing is ever unpickled: an environment is saved exactly if it offers
`get_state() -> dict` and `set_state(dict)`, of values that JSON can hold, and begins a new episode if not.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from twister_jax.config import EnvConfig
from twister_jax.envs import check_imported
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec, Episode, Step, Suite
from twister_jax.envs.renderer import choose_renderer
from twister_jax.envs.spaces import find_picture, is_picture_shape, understand_actions
from twister_jax.errors import MissingExtraError, UserError
from twister_jax.fields import PositiveInt, did_you_mean
from twister_jax.files import one_line

log = logging.getLogger(__name__)

_EXAMINED_STEPS, _EXAMINED_EPISODE = 64, 16


@dataclasses.dataclass(frozen=True)
class GymConfig(EnvConfig):
    """An environment of gymnasium."""

    image_key: str = ""
    """Entry of a dictionary of observations that is the picture; empty: the only one, or else rendering."""
    time_limit: PositiveInt = 10_000
    """Steps after which an episode is cut, without being terminal; its own limit may be less."""
    grayscale: bool = False
    """One grey channel in place of RGB."""


class GymEnv:
    """One environment of gymnasium, its pictures resized to 64x64 by area.

    Args:
      name: as `gymnasium.make` takes it.
      seed: given to its first reset.
      image_key: see `GymConfig`.
      time_limit: see `GymConfig`.
      grayscale: see `GymConfig`.
      exact: whether its `get_state` and `set_state` are to be trusted.

    Attributes:
      picture: where its pictures come from, in words.
      actions: what its actions are, in words.
      time_limit: steps after which an episode is cut, its own limit considered.

    Raises:
      UserError: it cannot be made, has no picture, or has actions of another kind than those supported.
    """

    def __init__(
        self, name: str, seed: int, *, image_key: str, time_limit: int, grayscale: bool, exact: bool = False
    ):
        self._game = f"gym:{name}"
        self._env = make_gymnasium(name)
        self._read, self.picture = find_picture(self._env, image_key, self._game)
        if self._read is None:
            self._env.close()
            self._env = make_gymnasium(name, render_mode="rgb_array")
        num_actions, discrete, self._convert, self.actions = understand_actions(
            self._env.action_space, self._game
        )
        self.time_limit = min(time_limit, _own_time_limit(name))
        self._exact = exact
        self._seed: int | None = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._mode = "L" if grayscale else "RGB"
        self._shape: tuple[int, ...] | None = None
        self._over, self._score, self._length = True, 0.0, 0  # the first step resets
        self.spec = EnvSpec(
            image_shape=(IMAGE_SIZE, IMAGE_SIZE, 1 if grayscale else 3),
            num_actions=num_actions,
            discrete=discrete,
            action_names=self._action_names(num_actions),
        )

    def reset(self) -> Step:
        """See `Env`."""
        observation, _ = self._env.reset(seed=self._seed)
        self._seed = None
        self._over, self._score, self._length = False, 0.0, 0
        return Step(self._image(observation), 0.0, False, True, None)

    def step(self, action: Any) -> Step:
        """See `Env`.

        Raises:
          UserError: a reward is not finite, or pictures change their shape.
        """
        if self._over:
            return self.reset()
        observation, reward, terminated, truncated, _ = self._env.step(self._convert(action))
        reward, terminal = float(reward), bool(terminated)
        if not math.isfinite(reward):
            raise UserError(f"{self._game} gave a reward of {reward}: rewards must be finite numbers")
        self._score += reward
        self._length += 1
        self._over = terminal or bool(truncated) or self._length >= self.time_limit
        episode = Episode(0, self._score, self._length, truncated=not terminal) if self._over else None
        return Step(self._image(observation), reward, terminal, False, episode)

    @property
    def saveable(self) -> bool:
        """Whether it offers to be saved, behind no wrapper that would have to be saved too."""
        import gymnasium

        env = self._env
        while isinstance(env, gymnasium.wrappers.OrderEnforcing):
            env = env.env
        return env is env.unwrapped and hasattr(env, "get_state") and hasattr(env, "set_state")

    def get_state(self) -> dict[str, Any] | None:
        """See `Env`."""
        if not self._exact:
            return None
        state = self._env.unwrapped.get_state()
        return {"env": state, "over": self._over, "score": self._score, "length": self._length}

    def set_state(self, state: dict[str, Any]) -> None:
        """See `Env`."""
        self._env.reset()  # gymnasium's order of calls
        self._env.unwrapped.set_state(state["env"])
        self._seed = None
        self._over, self._score, self._length = state["over"], state["score"], state["length"]

    def close(self) -> None:
        """Lets it go."""
        self._env.close()

    def screen(self) -> UInt8[np.ndarray, "height width 3"]:
        """See `Screen`: the environment's picture as it gave it."""
        return np.array(self._picture.convert("RGB"))

    def _image(self, observation: Any) -> UInt8[np.ndarray, "64 64 channel"]:
        pixels = np.asarray(self._env.render() if self._read is None else self._read(observation))
        if self._shape is None:
            if pixels.dtype != np.uint8 or not is_picture_shape(pixels.shape):
                raise UserError(
                    f"{self._game} shows {pixels.dtype} of shape {pixels.shape}: "
                    f"a picture is uint8, [height, width, 3] or [height, width]"
                )
            self._shape = pixels.shape
        if pixels.shape != self._shape or pixels.dtype != np.uint8:
            raise UserError(
                f"{self._game} changed its pictures from uint8 of shape {self._shape} to {pixels.dtype} of "
                f"shape {pixels.shape}: they must stay the same"
            )
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        self._picture = Image.fromarray(pixels)
        resized = self._picture.convert(self._mode).resize((IMAGE_SIZE,) * 2, Image.Resampling.BOX)
        return np.array(resized).reshape(self.spec.image_shape)

    def _action_names(self, count: int) -> tuple[str, ...]:
        meanings = getattr(self._env.unwrapped, "get_action_meanings", None)
        names = tuple(map(str, meanings())) if callable(meanings) else ()
        return names if len(names) == count else tuple(map(str, range(count)))


def make_gymnasium(name: str, **options: Any) -> Any:
    """`gymnasium.make` without the wrappers that would have to be saved too.

    Raises:
      UserError: it is not registered, nobody imported its module, or its constructor fails.
    """
    if importlib.util.find_spec("gymnasium") is None:
        raise MissingExtraError("gym", f"gym:{name}")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # or pygame asks for a screen that it does not need
    import gymnasium

    registered_environments()
    module, colon, identifier = name.rpartition(":")
    check_imported(module, f"gym:{name}")
    if "mujoco" in str(getattr(gymnasium.registry.get(identifier), "entry_point", "")):
        choose_renderer()
    try:
        return gymnasium.make(identifier, disable_env_checker=True, max_episode_steps=-1, **options)
    except gymnasium.error.UnregisteredEnv as error:
        near = did_you_mean(identifier, registered_environments())
        where = f"importing {module} registers no such environment" if colon else "it is not registered"
        raise UserError(f"gym:{name}{near}: {where}") from error
    except Exception as error:
        raise UserError(f"gym:{name} cannot be made: {type(error).__name__}: {one_line(error)}") from error


def registered_environments() -> tuple[str, ...]:
    """What gymnasium knows now by name; nothing where it is not installed."""
    if importlib.util.find_spec("gymnasium") is None:
        return ()
    from gymnasium.envs.registration import registry

    with contextlib.suppress(ImportError):  # the extra installs it, and it registers itself when imported
        importlib.import_module("minigrid")
    return tuple(registry)


def _own_time_limit(name: str) -> float:
    from gymnasium.envs.registration import registry

    spec = registry.get(name.rpartition(":")[2])
    return getattr(spec, "max_episode_steps", None) or math.inf


@dataclasses.dataclass(frozen=True)
class Examination:
    """What a look at an environment found."""

    exact: bool
    """Whether the environment can be saved, and continues exactly once restored."""
    picture: str
    """Where its pictures come from."""


@functools.cache
def examine(name: str, image_key: str, grayscale: bool) -> Examination:
    """Plays two copies of an environment before anything is compiled, and says what it found.

    Raises:
      UserError: it fails, or does what no environment may do; see `GymEnv`.
    """

    def make(seed: int, exact: bool) -> GymEnv:
        limit = _EXAMINED_EPISODE
        return GymEnv(name, seed, image_key=image_key, time_limit=limit, grayscale=grayscale, exact=exact)

    game, rng = f"gym:{name}", np.random.default_rng(0)
    one, other = make(0, exact=True), make(0, exact=True)
    try:
        actions = [one.spec.to_env(one.spec.random_actions(rng, 1))[0] for _ in range(_EXAMINED_STEPS)]
        played = _play(one, actions)
        follows = _same(played, _play(other, actions))
        saving = _saving(one, make(1, exact=True), actions)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{game} fails when played: {type(error).__name__}: {one_line(error)}") from error
    finally:
        one.close()
        other.close()
    rewards = [step.reward for step in played if not step.is_first]
    own = _own_time_limit(name)
    log.info(
        "%s: %s %s → %s; %s; %s",
        game,
        one.picture,
        "x".join(map(str, one._shape or ())),
        "x".join(map(str, one.spec.image_shape)),
        one.actions,
        "no registered time limit" if own == math.inf else f"episodes of at most {own:,} steps",
    )
    log.info(
        "%s: rewards from %g to %g in %d random steps; %s; %s",
        game,
        min(rewards),
        max(rewards),
        len(actions),
        "follows its seed" if follows else "does not follow its seed, so no two runs are alike",
        saving or "saved exactly",
    )
    return Examination(exact=not saving, picture=one.picture)


def _play(env: GymEnv, actions: list[Any]) -> list[Step]:
    return [env.reset(), *(env.step(action) for action in actions), env.reset()]


def _same(ours: list[Step], theirs: list[Step]) -> bool:
    return all(np.array_equal(a.image, b.image) and a[1:] == b[1:] for a, b in zip(ours, theirs, strict=True))


def _saving(env: GymEnv, other: GymEnv, actions: list[Any]) -> str:
    """Why an environment cannot be saved in the middle of an episode, or nothing if it can."""
    consequence = "a resumed run begins a new episode"
    if not env.saveable:
        other.close()
        return f"cannot be saved, so {consequence}"
    half = _EXAMINED_EPISODE // 2
    try:
        _play(env, [])
        for action in actions[:half]:
            env.step(action)
        other.set_state(json.loads(json.dumps(env.get_state())))
        following = ([*(each.step(a) for a in actions), each.reset()] for each in (env, other))
        return "" if _same(*following) else f"its set_state does not restore it, so {consequence}"
    except Exception as error:
        return f"cannot be saved ({type(error).__name__}: {one_line(error)}), so {consequence}"
    finally:
        other.close()


class GymSuite(Suite):
    """Everything that gymnasium can make and that has a picture."""

    name = "gym"
    description = "gym:ID or gym:MODULE:ID, an environment of gymnasium (gym:CartPole-v1)"
    prefixed = True
    settings = GymConfig()
    presets: ClassVar = {"debug": {"env.time_limit": 100}}

    def names(self) -> tuple[str, ...]:
        """See `Suite`."""
        return registered_environments()

    def resolve(self, name: str) -> str | None:
        """See `Suite`. Without a version, the newest is meant."""
        name = name.strip()
        known = self.names()
        if ":" in name or (name and not known):  # found out when it is made
            return name
        spellings = {each.lower().rpartition("-v")[0]: each for each in known}  # the newest comes last
        return (spellings | {each.lower(): each for each in known}).get(name.lower())

    def code(self, name: str) -> str:
        """See `Suite`."""
        module = name.rpartition(":")[0]
        if module and importlib.util.find_spec("gymnasium") is None:
            raise MissingExtraError("gym", f"gym:{name}")
        return module

    def make(self, name: str, settings: GymConfig, seed: int, *, evaluation: bool = False) -> GymEnv:
        """See `Suite`."""
        return GymEnv(
            name,
            seed,
            image_key=settings.image_key,
            time_limit=settings.time_limit,
            grayscale=settings.grayscale,
            exact=examine(name, settings.image_key, settings.grayscale).exact,
        )

    def for_probe(self, settings: GymConfig) -> GymConfig:
        """See `Suite`."""
        return dataclasses.replace(settings, time_limit=min(settings.time_limit, _EXAMINED_EPISODE))

    def protocol(self, name: str, settings: GymConfig) -> dict[str, Any]:
        """See `Suite`."""
        found = examine(name, settings.image_key, settings.grayscale)
        return {
            "frames": f"64x64 {'grey' if settings.grayscale else 'RGB'}, by area from its {found.picture}",
            "frame_skip": 1,
            "time_limit": min(settings.time_limit, _own_time_limit(name)),
            "resumption": "exact" if found.exact else "with a new episode",
            "gymnasium": importlib.metadata.version("gymnasium"),
        }

    def check(self) -> str:
        """See `Suite`."""
        known = registered_environments()
        if not known:
            return str(MissingExtraError("gym", "gymnasium"))
        return f"gymnasium {importlib.metadata.version('gymnasium')} knows {len(known)} environments"


SUITE = GymSuite()
