"""From a configuration to its agent."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

from twister_jax.agent import Agent
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec


def make_agent(config: Config, spec: EnvSpec) -> Agent:
    """The agent that `config.agent` names, for environments of this kind.

    With precision float32 its functions multiply in float32 on accelerators too, whose default is coarser.
    """
    agent = importlib.import_module(f"twister_jax.{config.agent}.agent").make_agent(config, spec)
    if config.precision != "float32" or jax.default_backend() == "cpu":
        return agent
    exact = {name: _exactly(getattr(agent, name)) for name in ("act", "act_evaluate", "learn", "report")}
    phases = tuple(dataclasses.replace(phase, update=_exactly(phase.update)) for phase in agent.pretraining)
    return dataclasses.replace(agent, **exact, pretraining=phases)


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def exact(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return exact
