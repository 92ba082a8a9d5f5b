"""The registry of agents: a line each. What an agent brings besides its functions is an `AgentPackage`.

Importing this, or an agent's package, does not import JAX: the command line answers at once.
"""

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from twister_jax.config import AlgorithmConfig, Config
from twister_jax.errors import UserError
from twister_jax.fields import did_you_mean

if TYPE_CHECKING:
    from twister_jax.agents.base import Agent
    from twister_jax.envs.base import EnvSpec

AGENTS: dict[str, str] = {
    "twister": "twister_jax.agents.twister",
    "twm": "twister_jax.agents.twm",
}
"""Name -> package with a `PACKAGE`."""

DEFAULT_AGENT = "twister"


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What to expect of a run, as measured."""

    steps_per_second: float
    """Agent steps per second, the updates due for them included."""
    machine: str
    """The machine this was measured on."""
    learned: str
    """What the agent had learned at the end."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes and schedule to start from."""

    algorithm: AlgorithmConfig
    """The agent's own settings."""
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other values of settings that all runs share, by dotted name."""
    env: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of environments, by name; a suite that lacks one ignores it."""
    suites: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Suite or game -> values that the preset changes there, by dotted name."""
    outlook: Mapping[str, Outlook] = dataclasses.field(default_factory=dict)
    """Suite -> what to expect, for presets that take hours."""


@dataclasses.dataclass(frozen=True)
class AgentPackage:
    """What an agent brings.

    Its functions are found by their place: `agent.make_agent(config, spec)`; for agents with fixtures
    `parity.compare(sizes, fixture, dtype)` and `weights.state_of_published(weights, algorithm, spec)`.
    """

    title: str
    """As the paper writes it."""
    module: str
    """The package's dotted name."""
    presets: Mapping[str, Preset]
    """`paper` is as published."""
    fixture_prefix: str | None = None
    """A fixture with a weight `param/PREFIX…` is of this agent."""
    compiling_bytes: int = 500_000_000
    """Host memory that compiling its programs takes temporarily, as measured, on top of what a run keeps."""
    published_flops: float | None = None
    """Operations of one update of preset `paper`, as the published formulation computes it."""
    exports_onnx: bool = False
    """Whether there is an `onnx.policy_as_onnx(state, algorithm, spec, about)`."""

    def function(self, file: str, name: str) -> Callable[..., Any]:
        """One of the package's functions; imports JAX."""
        return getattr(importlib.import_module(f"{self.module}.{file}"), name)


def register(name: str, module: str) -> None:
    """Adds an agent: `module` is a package with a `PACKAGE`."""
    AGENTS[name] = module


def package(name: str) -> AgentPackage:
    """What the agent of this name brings.

    Raises:
      UserError: there is none.
    """
    if name not in AGENTS:
        raise UserError(f"unknown agent {name!r}{did_you_mean(name, AGENTS)}; one of {', '.join(AGENTS)}")
    return importlib.import_module(AGENTS[name]).PACKAGE


def package_of_fixture(weights: Collection[str]) -> AgentPackage | None:
    """The agent that weights of these published names belong to."""
    for each in map(package, AGENTS):
        if each.fixture_prefix is not None and any(n.startswith(each.fixture_prefix) for n in weights):
            return each
    return None


def make_agent(config: Config, spec: "EnvSpec") -> "Agent":
    """The agent that `config.agent` names, for environments of this kind.

    With precision float32 its functions multiply in float32 on accelerators too, whose default is coarser.

    Raises:
      UserError: the agent cannot play such environments.
    """
    from twister_jax.runtime import in_precision

    agent: Agent = package(config.agent).function("agent", "make_agent")(config, spec)
    names = ("act", "act_evaluate", "learn", "report")
    exact: dict[str, Any] = {name: in_precision(getattr(agent, name), config.precision) for name in names}
    dream = agent.dream and dataclasses.replace(
        agent.dream,
        **{
            name: in_precision(getattr(agent.dream, name), config.precision)
            for name in ("observe", "imagine", "look", "policy")
        },
    )
    phases = tuple(
        dataclasses.replace(phase, learn=in_precision(phase.learn, config.precision))
        for phase in agent.pretraining
    )
    return dataclasses.replace(agent, **exact, pretraining=phases, dream=dream)
