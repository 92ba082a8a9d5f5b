"""Options of all commands but `train`, whose options are the fields of `config.Config`."""

import dataclasses
from typing import Annotated

from twister_jax.fields import NonNegativeInt, PositiveInt, Range


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What all commands that load a run take."""

    logdir: str = ""
    """Run directory (required)."""
    step: NonNegativeInt = 0
    """Environment steps behind the checkpoint; 0 means the newest."""


@dataclasses.dataclass(frozen=True)
class PlayOptions(RunOptions):
    """What all commands that play a run's game take."""

    game: str = ""
    """The run's game once more. Needed where it is SUITE:MODULE:ID alone: it allows MODULE's code to run."""


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(PlayOptions):
    """Plays full games with a checkpoint of a run, under the settings it was trained with."""

    episodes: NonNegativeInt = 0
    """Full games played; 0 means as many as the run's configuration says."""


@dataclasses.dataclass(frozen=True)
class WatchOptions(PlayOptions):
    """Plays full games by the evaluation's protocol; writes MP4s and a contact sheet into LOGDIR/videos."""

    episodes: PositiveInt = 10
    """Full games played, of which the best, the median and the worst are shown."""


@dataclasses.dataclass(frozen=True)
class DreamOptions(PlayOptions):
    """Shows what the world model foresees, and how far it can be trusted; writes into LOGDIR/dreams."""

    starts: Annotated[int, Range(4, 10_000)] = 64
    """Windows of real play that errors are averaged over."""
    horizon: Annotated[int, Range(1, 1_000)] = 32
    """Steps foreseen."""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Writes one HTML file about a run, finished or not; about several, a comparison."""

    logdir: tuple[str, ...] = ()
    """Run directories (required; `report RUN RUN` does too)."""
    out: str = ""
    """The file to write; empty means report.html in the (first) run directory."""


@dataclasses.dataclass(frozen=True)
class ExportOptions(RunOptions):
    """Writes the policy, with its settings, scores and provenance, as one file that holds no code."""

    out: str = ""
    """The file to write, .safetensors or .onnx; empty means policy.safetensors in the run directory."""
    license: str = "Apache-2.0"
    """Of the weights, as the file will say."""


@dataclasses.dataclass(frozen=True)
class ParityOptions:
    """Recomputes a fixture's quantities and prints a line for each; exit code 1 if any is off."""

    file: str = ""
    """The fixture, an .npz file (required; `parity FILE.npz` does too)."""


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Checks versions, the device, one emulator step, one compiled call, and that files can be written."""
