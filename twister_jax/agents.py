"""From a configuration to its agent."""

import importlib

from twister_jax.agent import Agent
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec


def make_agent(config: Config, spec: EnvSpec) -> Agent:
    """The agent that `config.agent` names, for environments of this kind."""
    return importlib.import_module(f"twister_jax.{config.agent}.agent").make_agent(config, spec)
