"""A run of many processes, as one of them sees it.

Every process steps its share of the environments, and all of them make the same updates: what decides how
the loop goes on (steps, episodes, signals, the clock) is exchanged once in every iteration. The first process
writes and speaks for all.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from twister_jax.config import Config
from twister_jax.envs.base import EnvStep, VectorEnv
from twister_jax.envs.vector import join_states
from twister_jax.errors import UserError
from twister_jax.processes import Processes
from twister_jax.replay import segments
from twister_jax.replay.store import Replay
from twister_jax.training.logs import Log, MetricsFile
from twister_jax.training.progress import Progress
from twister_jax.training.run import Run
from twister_jax.training.rundir import RunDirectory
from twister_jax.training.save import Snapshot
from twister_jax.training.state import RunState


class Part(Run):
    """The run, in one of its processes."""

    def __init__(self, processes: Processes, config: Config, *args: Any, **kwargs: Any):
        self.processes = processes
        self._clock, self._agreed = 0.0, False
        self._snapshot: Snapshot | None = None
        self._compiled_by_all: set[str] = set()
        if config.env.num_envs % processes.count:
            raise UserError(
                f"env.num_envs = {config.env.num_envs}: must be a multiple of {processes.count}, the "
                "processes that step them"
            )
        super().__init__(config, *args, **kwargs)
        self.signals.deaf = True

    # ---------------------------------------------------------------------------------- what is its own

    def make_training_env(self, seed: int) -> VectorEnv:
        total = self.config.env.num_envs
        part = self.processes.share(total)
        count = part.stop - part.start
        return self.make_env(self.config.game, self.config.env, count, seed, first=part.start, total=total)

    def step_env(self, action: Any) -> EnvStep:
        return super().step_env(self._own(action))

    def put_action(self, action: np.ndarray) -> jax.Array:
        return super().put_action(self._own(action))

    def _own(self, action: Any) -> np.ndarray:
        """The rows of this process's environments, of an array of all of them."""
        if isinstance(action, jax.Array) and not action.is_fully_addressable:
            rows = {shard.index[0].start or 0: np.asarray(shard.data) for shard in action.addressable_shards}
            return np.concatenate([rows[start] for start in sorted(rows)])
        return np.asarray(action)[self.processes.share(self.config.env.num_envs)]

    # ------------------------------------------------------------------------------ what is agreed upon

    def count(self, step: EnvStep) -> None:
        episodes = [(float(episode.score), int(episode.length)) for episode in step.episodes]
        given = self._agree(int((~step.is_first).sum()), episodes)
        steps = sum(each["steps"] for each in given)
        self.add_steps(steps, [(score, length) for each in given for score, length in each["episodes"]])

    def _agree(self, steps: int = 0, episodes: list[tuple[float, int]] | None = None) -> list[dict[str, Any]]:
        mine = {
            "steps": steps,
            "episodes": episodes or [],
            "signal": self.signals.received,
            "seconds": super().seconds,
        }
        given = self.processes.exchange(mine)
        self._clock, self._agreed = given[0]["seconds"], True
        came = [each["signal"] for each in given if each["signal"] is not None]
        if came:
            self.signals.received, self.signals.deaf = came[0], False
        return given

    @property
    def seconds(self) -> float:
        """By the first process's clock, when all last heard of it."""
        return self._clock

    def housekeep(self) -> None:
        if not self._agreed:
            self._agree()
        self._agreed = False
        super().housekeep()

    def program(self, name: str) -> Any:
        """See `Run`. No process runs a program before all have it: devices wait for one another half a minute
        at most, and what compiles in one may be in another's cache.
        """
        program = super().program(name)
        if name not in self._compiled_by_all:
            self.processes.exchange(name)
            self._compiled_by_all.add(name)
        return program

    # ------------------------------------------------------------------------------------ what is saved

    def restore(self, shapes: RunState, replay: Replay) -> Snapshot | None:
        snapshot = super().restore(shapes, replay) if self.processes.first else None
        restored = self.processes.of_first(self.checkpointer.restored)
        if restored is None or self.processes.first:
            return snapshot
        return self.checkpointer.restore_the_same(tuple(restored), shapes, replay)

    def save(self, *, wait: bool = True) -> bool:
        """All processes give what they have; the first one writes it."""
        self._tried_at, self._tried_steps = self.seconds, self.counters.env_steps
        there = self.saved_at == (self.counters.position, self.counters.updates)
        if self.processes.of_first(there):
            return True
        self._snapshot = self._gather()
        saved = False
        if self.processes.first:
            try:
                saved = super().save(wait=wait)
            finally:
                self.processes.of_first()  # nothing more is wanted
        else:
            while wanted := self.processes.of_first():
                segments.fetch(self.replay, *wanted)
        self._snapshot = None
        return bool(self.processes.of_first(saved))

    def save_somewhere(self) -> Any:
        """In its directory, or not at all."""
        return self.directory if self.save() else None

    def snapshot(self) -> Snapshot:
        assert self._snapshot is not None
        return self._snapshot

    def _gather(self) -> Snapshot:
        """Everything of all processes but the stored steps, which the first one asks for piece by piece."""
        state, visits = self.devices.gathered((self.state, self.replay.visits))
        snapshot = super().snapshot()
        env = join_states([part.encode() for part in self.processes.exchange(snapshot.env.decode())])

        def fetch(replay: Replay, start: int, stop: int) -> np.ndarray:
            self.processes.of_first((start, stop))
            return segments.fetch(replay, start, stop)

        return dataclasses.replace(
            snapshot,
            state=state,
            replay=dataclasses.replace(self.replay, visits=visits),
            env=env,
            fetch=fetch,
        )

    # ------------------------------------------------------------------------------------- what is said

    def open_log(self, **resumed: Any) -> None:
        super().open_log(**resumed) if self.processes.first else setattr(self, "log", _NoLog(**resumed))

    def evaluate(self) -> None:
        """The first process plays; the others wait, so that none is missed."""
        self.signals.deaf = False
        try:
            if self.processes.first:
                super().evaluate()
        finally:
            self.processes.of_first()


class Silent(Progress):
    """The progress of the other processes, which print nothing."""

    def due(self) -> bool:
        return False

    def update(self, line: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass


class NoDirectory(RunDirectory):
    """The run directory of the other processes, which write nothing."""

    def __enter__(self) -> "NoDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def check_held(self) -> None:
        pass

    def make_again(self, config: dict[str, Any]) -> None:
        pass

    def write_config(self, config: dict[str, Any]) -> None:
        pass


class _NoLog(Log):
    def __init__(self, **resumed: Any):
        self.file = MetricsFile(Path())  # of which nothing but the counts is looked at

    def row(self, row: Any) -> None:
        pass

    def plot(self, env_steps: int, values: Any) -> None:
        pass

    def plot_pretraining(self, updates: int, values: Any) -> None:
        pass

    def pictures(self, step: int, pictures: Any) -> None:
        pass
