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
    names = ("act", "act_evaluate", "learn", "report")
    exact = {name: in_precision(getattr(agent, name), config.precision) for name in names}
    phases = tuple(
        dataclasses.replace(phase, update=in_precision(phase.update, config.precision))
        for phase in agent.pretraining
    )
    return dataclasses.replace(agent, **exact, pretraining=phases)


def product_precision(precision: str) -> str | None:
    """What `jax.default_matmul_precision` has to be for a run of this precision; None leaves it alone."""
    return "highest" if precision == "float32" and jax.default_backend() != "cpu" else None


def in_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """`function`, multiplying as a run of this precision does."""
    products = product_precision(precision)
    if products is None:
        return function

    @functools.wraps(function)
    def exact(*args: Any) -> Any:
        with jax.default_matmul_precision(products):
            return function(*args)

    return exact
