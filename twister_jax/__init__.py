"""Transformer world-model agents from pixels in JAX.

A notebook needs these names, and nothing else is public:

    import jax
    import twister_jax as tj

    config = tj.make_config(preset="debug")
    env = tj.make_vector_env(config.game, config.env, num_envs=1, seed=0)
    agent = tj.make_agent(config, env.spec)
    state = jax.jit(agent.init)(tj.key_for(config.seed, tj.Purpose.INIT))
    update = jax.jit(agent.update, donate_argnums=(0, 1))

Importing the package does not import JAX; the first use of a name does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twister_jax.agents import make_agent
    from twister_jax.agents.base import Agent, Observation
    from twister_jax.config import Config
    from twister_jax.envs import make_vector_env
    from twister_jax.errors import UserError
    from twister_jax.presets import make_config, validate
    from twister_jax.randomness import Purpose, key_for
    from twister_jax.replay.store import Replay, Transition
    from twister_jax.training.load import load_run
    from twister_jax.view.dream_env import dream_env
    from twister_jax.view.policy import Policy, load

__version__ = "0.2.0"

_HOMES = {
    "Agent": "agents.base",
    "Config": "config",
    "Observation": "agents.base",
    "Policy": "view.policy",
    "Purpose": "randomness",
    "Replay": "replay.store",
    "Transition": "replay.store",
    "UserError": "errors",
    "dream_env": "view.dream_env",
    "key_for": "randomness",
    "load": "view.policy",
    "load_run": "training.load",
    "make_agent": "agents",
    "make_config": "presets",
    "make_vector_env": "envs",
    "validate": "presets",
}

__all__ = [
    "Agent",
    "Config",
    "Observation",
    "Policy",
    "Purpose",
    "Replay",
    "Transition",
    "UserError",
    "dream_env",
    "key_for",
    "load",
    "load_run",
    "make_agent",
    "make_config",
    "make_vector_env",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
