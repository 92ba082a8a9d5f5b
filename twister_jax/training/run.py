"""A run: where it stands, what it reports, and how it is saved.

`start` is how it begins or resumes, `loop` is what it repeats.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from twister_jax.agents.base import Health, Pretraining
from twister_jax.config import Config
from twister_jax.envs.base import EnvStep, VectorEnv
from twister_jax.errors import UserError
from twister_jax.parallel import Devices
from twister_jax.randomness import Purpose, generator_for, key_for
from twister_jax.replay import store
from twister_jax.replay.store import Replay, Transition
from twister_jax.training import evaluation
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.logs import Averages, Log
from twister_jax.training.memory import check_memory
from twister_jax.training.programs import Programs
from twister_jax.training.progress import Pace, Progress, line_of
from twister_jax.training.provenance import numerics
from twister_jax.training.rescue import rescue
from twister_jax.training.rundir import RunDirectory
from twister_jax.training.save import Snapshot
from twister_jax.training.signals import Signals
from twister_jax.training.start import compile_programs, start_or_resume
from twister_jax.training.state import Counters, MakeAgent, MakeEnv, RunState, observe, updates_due


class DivergedError(UserError):
    """Too many updates in a row were not finite."""

    exit_code = 1


LOSS_SHARE = 0.01
"""A kill loses at most `train.checkpoint_minutes` of work, or this share of the run's time if more."""


class Run:
    """A run between two iterations.

    Attributes:
      state, replay, counters: what it is; see `training.state`.
      stored: steps that each stream of the replay has been given.
      averages: metrics since the last row, by the kind of update.
      programs: the compiled functions that the loop calls.
    """

    alone = True
    """Whether all devices there are could be this run's."""
    state: RunState
    replay: Replay
    counters: Counters
    stored: int
    averages: dict[str, Averages]
    programs: Programs
    log: Log

    def __init__(
        self,
        config: Config,
        make_agent: MakeAgent,
        make_env: MakeEnv,
        progress: Progress,
        signals: Signals,
        home: RunDirectory | None = None,
    ):
        self.config, self.progress, self.signals = config, progress, signals
        self.directory = Path(config.logdir)
        self.home = home or RunDirectory(self.directory)
        self.make_env = make_env
        seed = int(generator_for(config.seed, Purpose.ENVIRONMENT).integers(2**31))
        try:
            self.env = self.make_training_env(seed)
        except RuntimeError as error:
            raise UserError(f"cannot start {config.game}: {error}") from error
        self.agent = make_agent(config, self.env.spec)
        self.devices = Devices.choose(config.parallel.data, config.env.num_envs, self.agent.shared_sizes)
        self.checkpointer = Checkpointer(
            self.directory / "checkpoints", config.train.keep_checkpoints, self.home.check_held
        )
        self.averages = {}
        self.saved_at: tuple[int, int] | None = None
        self._saving_steps = 0
        start_or_resume(self)
        self._started = time.monotonic() - self.counters.wall_seconds
        self._tried_at, self._tried_steps = self.seconds, self.counters.env_steps
        self._pace = Pace()
        self._shown: dict[str, Any] = {}
        self._fits = False

    # ------------------------------------------------------------------------------------ how it begins

    def make_training_env(self, seed: int) -> VectorEnv:
        """The environments that it learns from."""
        return self.make_env(self.config.game, self.config.env, self.config.env.num_envs, seed)

    def restore(self, shapes: RunState, replay: Replay) -> Snapshot | None:
        return self.checkpointer.restore(shapes, replay)

    def open_log(self, **resumed: Any) -> None:
        self.log = Log(self.directory, self.progress, self.config.train.tensorboard, **resumed)

    # ----------------------------------------------------------------------------------- where it stands

    @property
    def finished(self) -> bool:
        """Whether nothing is left but to evaluate."""
        return not self.steps_left and self.counters.updates >= self.updates_due

    @property
    def steps_left(self) -> int:
        """Agent steps to be taken."""
        return max(0, self.config.train.steps - self.counters.env_steps)

    @property
    def filling(self) -> bool:
        """Whether random steps are still wanted."""
        too_few = self.stored < self.agent.min_replay_steps
        if self.counters.filled_at is None:
            return too_few or self.counters.env_steps < self.config.train.prefill_steps
        return too_few and self.phase is not None  # stored steps were lost before pretraining was over

    @property
    def refilling(self) -> bool:
        """Whether the replay, of which steps were lost, is too short to learn from."""
        return self.counters.filled_at is not None and self.stored < self.agent.min_replay_steps

    @property
    def phase(self) -> tuple[Pretraining, int] | None:
        """The pretraining phase that is not finished, and how many updates it has had."""
        done = self.counters.pretraining_updates
        for phase in self.agent.pretraining:
            if done < phase.updates:
                return phase, done
            done -= phase.updates
        return None

    @property
    def updates_due(self) -> int:
        """Updates that should have been made by now."""
        counters, rate = self.counters, self.config.train.updates_per_step
        if self.refilling:
            return counters.updates
        return updates_due(counters.env_steps, counters.filled_at, rate)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that the run has taken, summed over restarts."""
        return time.monotonic() - self._started

    # --------------------------------------------------------------------------------- what the loop calls

    def compile(self, shapes: RunState, replay: Replay) -> None:
        """Starts compiling what the loop calls, for state and replay of these shapes."""
        self.programs = compile_programs(self, shapes, replay)

    def program(self, name: str) -> Any:
        """A compiled function.

        Raises:
          Interrupted: it was not there yet, and a signal came first.
          UserError: what the updates need does not fit into memory.
        """
        if not self.programs.compiled(name):
            self.progress.update(self.progress_line())
            self._pace = Pace()
        program = self.programs[name]
        if not self._fits:
            # Before anything runs: what the process keeps after an update would count as memory in use.
            updates = ("update", *(phase.name for phase in self.agent.pretraining))
            scratch = {kind: self.programs.scratch_bytes(kind) for kind in updates}
            largest = max(scratch, key=scratch.__getitem__)
            check_memory({f"running {largest}": scratch[largest]}, jax.local_devices()[0])
            self._fits = True
        return program

    def random_actions(self) -> np.ndarray:
        """Actions [env, num_actions] of the prefill's present step, of the environments of all processes."""
        generator = generator_for(self.config.seed, Purpose.PREFILL, self.counters.iterations)
        return self.env.spec.random_actions(generator, self.config.env.num_envs)

    def put_action(self, action: np.ndarray) -> jax.Array:
        """Actions of all environments, copied to the devices that act for them."""
        return self.devices.put(action, self.devices.by_env(action))

    def step_env(self, action: Any) -> EnvStep:
        """Waits for the action, and steps every environment.

        Raises:
          UserError: one of them failed too often.
        """
        try:
            return self.env.step(self.env.spec.to_env(np.asarray(action)))
        except RuntimeError as error:
            raise UserError(f"{error}; the last checkpoint is kept") from error

    def count(self, step: EnvStep) -> None:
        """Counts what the environments returned, when it is stored."""
        episodes = [(float(episode.score), int(episode.length)) for episode in step.episodes]
        self.add_steps(int((~step.is_first).sum()), episodes)

    def add_steps(self, steps: int, episodes: list[tuple[float, int]]) -> None:
        """Counts agent steps, and episodes (score, length) that ended with them."""
        self.counters.add(steps, episodes)
        if self.refilling:  # what cannot be learned now is not made up for later
            self.counters.postpone(steps)

    def store(self, action: Any, step: EnvStep) -> None:
        """Puts a step into the replay, and what it shows before the actor."""
        self.stored += 1
        observation = observe(self.agent, step, self.devices)  # the frames travel once
        outcome = (step.reward, step.terminal)
        reward, terminal = self.devices.put(outcome, self.devices.by_env(outcome))
        transition = Transition(observation.image, action, reward, terminal, observation.is_first)
        self.replay = self._insert(self.replay, transition)
        self.state = dataclasses.replace(self.state, observation=observation)

    def housekeep(self) -> None:
        """Pictures, checkpoints, the progress line, and the question whether to stop."""
        train, counters = self.config.train, self.counters
        due = train.report_every and counters.updates // train.report_every > counters.reported
        if due and not self.refilling:
            report = self.program("report")
            counters.reported = counters.updates // train.report_every
            key = key_for(self.config.seed, Purpose.REPORT, counters.updates)
            self.home.check_held()
            seen = self.devices.local((self.state.agent, self.replay))
            self.log.pictures(counters.env_steps, report(*seen, key))
        # A loss costs at most this share of what the run took, and what is written grows with its logarithm.
        seconds = max(60 * train.checkpoint_minutes, LOSS_SHARE * self.seconds)
        if (
            counters.env_steps // train.checkpoint_every > self._tried_steps // train.checkpoint_every
            or self.seconds - self._tried_at > seconds
        ):
            self.save(wait=False)
        if self.progress.due():
            self.progress.update(self.progress_line())
        self.signals.check()

    # --------------------------------------------------------------------------------------- what it reports

    def write_row(self, kind: str, phase: dict[str, Any] | None = None) -> None:
        """Waits for the device, writes a row of metrics.jsonl, and stops a run that diverged."""
        self.home.check_held()
        counters = self.counters
        prefix = f"pretraining/{kind}/" if phase else ""
        values: dict[str, Any] = {prefix + name: value for name, value in self.take_means(kind).items()}
        health = self.health()
        values |= {"health/skipped": int(health.skipped), "health/longest": int(health.longest)}
        if counters.episodes:
            values["episode/score"] = float(np.mean([score for score, _ in counters.episodes]))
            values["episode/length"] = float(np.mean([length for _, length in counters.episodes]))
            values["episode/count"] = len(counters.episodes)
            counters.episodes = []
        self._shown = values
        where = {
            "env_steps": counters.env_steps,
            "updates": counters.updates,
            "wall_seconds": round(self.seconds, 3),
        }
        self.log.row({**where, **(phase or {}), **values})
        plotted = {**values, f"{prefix}steps_per_second": self.pace(), "updates": counters.updates}
        if phase:
            self.log.plot_pretraining(counters.pretraining_updates, plotted)
        else:
            self.log.plot(counters.env_steps, plotted)
        self.check_health()

    def take_means(self, kind: str) -> dict[str, float | None]:
        """The averages since the last row, which begin anew."""
        means = self.averages[kind].means()
        self.averages[kind] = Averages.empty(self.averages[kind].total)
        return means

    def health(self) -> Health:
        """Which updates were skipped."""
        return self.agent.health(self.state.agent)

    def check_health(self) -> None:
        """Stops a run that diverged, before it is saved: what is on disk stays good.

        Raises:
          DivergedError: see `train.max_bad_updates`.
        """
        health = self.health()
        if int(health.longest) >= self.config.train.max_bad_updates:
            raise DivergedError(
                f"training diverged: {int(health.longest)} updates in a row were not finite, first in "
                f"{health.first_bad_name}; the last good checkpoint is kept in "
                f"{self.checkpointer.directory}; a lower learning rate or another seed may help"
            )

    def pace(self) -> float:
        """Agent steps (in pretraining: updates) per second, over the last half minute or so."""
        return self._pace.at(self.seconds, self.counters.position)

    def progress_line(self) -> str:
        """Where it stands, for people."""
        return line_of(self, self._shown)

    # ---------------------------------------------------------------------------------------- how it is saved

    def save(self, *, wait: bool = True) -> bool:
        """Writes a checkpoint, unless the newest one stands where the run stands; says whether there is one.

        Without `wait` the run goes on as soon as everything is copied off the device, and the disk is written
        meanwhile. A disk that refuses is reported and asked again when the next checkpoint is due.
        """
        counters = self.counters
        self._tried_at, self._tried_steps = self.seconds, counters.env_steps
        self.finish_saving()
        if self.saved_at == (counters.position, counters.updates):
            return True
        self.check_health()
        self.home.make_again(self.config.to_dict())
        self.log.file.flush()
        self._saving_steps = counters.env_steps
        try:
            self.checkpointer.save(counters.position, self.snapshot(), wait=wait)
        except OSError as error:
            self._not_saved(error)
            return False
        self.saved_at = (counters.position, counters.updates)
        return True

    def save_somewhere(self) -> Path | None:
        """Saves the run as it stands, and where its directory refuses, in another one; says which, and where.

        Returns:
          The directory that holds it; None where nothing could be written anywhere.
        """
        return self.directory if self.save() else rescue(self)

    def snapshot(self) -> Snapshot:
        """All that a checkpoint holds, as the run stands."""
        counters = self.counters
        counters.wall_seconds = self.seconds
        host = {
            "counters": dataclasses.asdict(counters),
            "averages": {kind: averages.to_host() for kind, averages in self.averages.items()},
            "metrics_offset": self.log.file.offset,
            "metrics_pending": self.log.file.pending,
            "spec": dataclasses.asdict(self.env.spec),
            "config": self.config.to_dict(),
            "numerics": numerics(self.config.precision),
        }
        return Snapshot(self.state, self.replay, self.env.get_state(), host)

    def note(self, text: str) -> None:
        """Prints a note and keeps it, so that every later result repeats it."""
        self.progress.say(text)
        self.counters.notes.append(text)

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is still being written."""
        try:
            self.checkpointer.wait()
        except OSError as error:
            self._not_saved(error)

    def _not_saved(self, error: OSError) -> None:
        self.saved_at = None
        self.progress.say(f"checkpoint at step {self._saving_steps:,} could not be saved ({error}); going on")

    def evaluate(self) -> None:
        """The final evaluation, unless evaluation.json already has it."""
        trained = {"env_steps": self.counters.env_steps, "updates": self.counters.updates}
        if evaluation.is_current(self.directory / evaluation.FILE, self.config, trained):
            self.progress.say(
                f"finished: {self.directory} has its {trained['env_steps']:,} steps and {evaluation.FILE}"
            )
            return
        evaluation.run(
            self.config,
            self.agent,
            self.devices.local(self.state.agent),
            self.make_env,
            trained,
            self.progress,
            self.signals,
            self.counters.notes,
            self.home.check_held,
        )

    @functools.cached_property
    def _insert(self) -> Any:
        return self.devices.jit(store.insert, self.devices.by_env(self.replay), donate=(0,))
