"""A third agent and a third environment suite, as somebody else would add them.

The agent keeps the contract and learns nothing worth having, in milliseconds. The environment has continuous
actions. `python -m tests.third train …` is the project's own command line, which knows both.
"""

import dataclasses
from collections.abc import Iterator

from twister_jax import agents, envs
from twister_jax.agents import AgentPackage, Preset
from twister_jax.config import AlgorithmConfig, Config
from twister_jax.fields import NonNegativeInt, PositiveInt

AGENT = "minimal"
SUITE = "slider"


@dataclasses.dataclass(frozen=True)
class MinimalConfig(AlgorithmConfig):
    """An agent for tests."""

    batch_size: PositiveInt = 4
    """Replayed windows in one update."""
    batch_length: PositiveInt = 8
    """Steps of a replayed window."""
    warm_up: NonNegativeInt = 30
    """Updates of the first pre-training phase."""
    second: NonNegativeInt = 20
    """Updates of the second pre-training phase."""
    work: NonNegativeInt = 0
    """Products of matrices per update, to take time."""
    bad_from: NonNegativeInt = 0
    """First update with a non-finite loss; 0 for none."""
    bad_until: NonNegativeInt = 10**9
    """First update after it that is sound again."""
    reads_reward: bool = False
    """Whether acting reads rewards."""

    def problems(self, config: Config) -> Iterator[str]:
        """See `AlgorithmConfig`."""
        if self.bad_until < self.bad_from:
            yield f"algorithm.bad_until = {self.bad_until}: must not be below algorithm.bad_from"


SHARED = {
    "train.steps": 120,
    "train.prefill_steps": 20,
    "train.updates_per_step": 0.7,
    "train.log_every": 7,
    "train.report_every": 40,
    "train.checkpoint_every": 25,
    "evaluation.episodes": 5,
    "evaluation.num_envs": 2,
}

PACKAGE = AgentPackage(
    title="Minimal",
    module=__name__,
    presets={
        "paper": Preset(MinimalConfig(), SHARED),
        "cpu": Preset(MinimalConfig(), SHARED),
        "debug": Preset(MinimalConfig(), SHARED),
    },
    published_flops=1e6,
)


def register() -> None:
    """What it takes to add them."""
    agents.register(AGENT, "tests.third")
    envs.register(SUITE, "tests.third.slider")
