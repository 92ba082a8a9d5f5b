"""Settings that all runs share, as frozen dataclasses.

The command line, `config.json` and a notebook use the same classes. An agent's own settings stand in its
package (`agents/NAME/config.py`), an environment suite's in its file (`envs/NAME.py`); `presets.make_config`
puts a run together. Nothing here imports JAX, so that the command line answers at once.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from twister_jax.fields import CHANGEABLE, NonNegative, NonNegativeInt, Positive, PositiveInt, Range, describe

Precision = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam with clipping by the global gradient norm."""

    learning_rate: Positive
    """Step size."""
    epsilon: Positive
    """Added to the root of the second moment."""
    clip_norm: Positive
    """Largest global gradient norm."""
    weight_decay: NonNegative = 0.0
    """L2 coefficient, added to the gradient before Adam."""


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """The environments. A suite adds settings of its own."""

    num_envs: Annotated[int, Range(1, 1024)] = 1
    """Environments stepped together while training."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The schedule of the loop, and what it writes."""

    steps: Annotated[int, Range(1, 10**9), CHANGEABLE] = 100_000
    """Agent steps of the whole run, the random ones at the start included."""
    prefill_steps: PositiveInt = 163
    """Random-action steps before the first update."""
    updates_per_step: Annotated[float, Range(0, 1_000, open_low=True)] = 1.0
    """Gradient updates per agent step after the prefill."""
    act_before_update: bool = True
    """Choose each action before the updates that are due, so that the environments run while the device
    learns. With no, every action is chosen by the newest parameters, as in the authors' code, and the device
    waits for the environments."""
    log_every: Annotated[PositiveInt, CHANGEABLE] = 100
    """Updates between rows of metrics.jsonl; each row is the mean over them."""
    report_every: Annotated[NonNegativeInt, CHANGEABLE] = 5_000
    """Updates between pictures of reconstructed and imagined frames; 0 writes none."""
    checkpoint_every: Annotated[PositiveInt, CHANGEABLE] = 5_000
    """Agent steps between checkpoints."""
    checkpoint_minutes: Annotated[Positive, CHANGEABLE] = 10.0
    """A checkpoint is also written when the last one is older than this."""
    keep_checkpoints: Annotated[PositiveInt, CHANGEABLE] = 3
    """Newest checkpoints kept."""
    max_bad_updates: Annotated[PositiveInt, CHANGEABLE] = 20
    """Consecutive updates with a non-finite loss or gradient after which the run stops."""
    tensorboard: Annotated[bool, CHANGEABLE] = True
    """Write TensorBoard events beside metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The devices of a run."""

    data: Annotated[PositiveInt, CHANGEABLE] = 1
    """Devices that share each batch, the environments and their streams of replay. With several processes
    always all of theirs."""
    coordinator: Annotated[str, CHANGEABLE] = ""
    """HOST:PORT at which process 0 waits for the others. SLURM, TPU pods and Open MPI need no flags."""
    processes: Annotated[int, Range(1, 10_000), CHANGEABLE] = 1
    """Processes that train together."""
    process: Annotated[int, Range(0, 9_999), CHANGEABLE] = 0
    """Which of them this is, from 0."""


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """The device-resident replay store."""

    capacity: PositiveInt = 1_000_000
    """Most stored steps; less is allocated when the run is shorter."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The final evaluation: full games, each counted once."""

    episodes: PositiveInt = 100
    """Full games played."""
    num_envs: Annotated[int, Range(1, 1024)] = 8
    """Games played side by side; how many each plays is fixed beforehand, so short games are not favoured."""
    sample_actions: bool = False
    """Sample the policy (True) or take its mode (False)."""


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """What one update of an agent depends on; every agent has a class of its own."""

    def problems(self, config: "Config") -> Iterator[str]:
        """What is wrong with fields that depend on one another, as `name = value: must …`."""
        yield from ()


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    game: str
    """What is played: a name, or SUITE:NAME."""
    agent: str
    """Which algorithm learns."""
    preset: str
    """Sizes and schedule to start from: paper (as published), cpu (smaller), debug (seconds), or auto."""
    env: EnvConfig
    train: TrainConfig
    replay: ReplayConfig
    evaluation: Annotated[EvaluationConfig, CHANGEABLE]
    parallel: ParallelConfig
    algorithm: AlgorithmConfig
    """Everything that belongs to the agent itself."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Decides every random draw of the run."""
    logdir: Annotated[str, CHANGEABLE] = ""
    """Run directory; empty means runs/AGENT-GAME-PRESET-seedSEED."""
    precision: Precision = "auto"
    """Number format of matrix products; auto: bfloat16 on GPU and TPU, float32 on CPU."""

    def changeable(self) -> list[str]:
        """Dotted names of the fields that may change when a run is resumed."""
        return [name for name, field in describe(self).items() if field.changeable]

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        return dataclasses.asdict(self)


def too_many_steps(counts: Mapping[str, int]) -> Iterator[str]:
    """A message if these settings together make an update larger than any machine can compute."""
    if math.prod(counts.values()) > 10**7:
        named = " x ".join(f"{name} ({count})" for name, count in counts.items())
        yield f"{named}: must be at most 10,000,000 steps together"


def too_few_steps(config: Config, needed: int, why: str) -> Iterator[str]:
    """Messages if the prefill or the replay gives a stream fewer than `needed` steps."""
    envs = config.env.num_envs
    from_each = f"{why} from each of env.num_envs = {envs}" if envs > 1 else why
    for name, value in (
        ("train.prefill_steps", config.train.prefill_steps),
        ("replay.capacity", config.replay.capacity),
    ):
        if value < needed * envs:
            yield f"{name} = {value}: must be at least {needed * envs}, for {from_each}"
