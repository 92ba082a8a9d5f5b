"""The host loop: act, learn, step, store.

JAX returns before the device has finished, so an iteration puts the action and then the updates into the
device's queue, waits for the action alone, and steps the emulator while the device learns. Metrics are
summed on the device and read once in `train.log_every` updates.

A run is data: what is on the device (`OnDevice` and the replay), the environments' own state, and a few
counters (`Counters`). All of it goes into every checkpoint, and every random draw depends on the seed and
those counters alone, so a run that was killed and restarted ends where it would have ended.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax import config as configs
from twister_jax import replay as replays
from twister_jax.agent import Agent, Health, Pretraining, Transition
from twister_jax.config import Config, EnvConfig
from twister_jax.envs.base import EnvSpec, EnvStep, VectorEnv
from twister_jax.errors import UserError
from twister_jax.randomness import Purpose, generator_for, key_for
from twister_jax.replay import Replay
from twister_jax.training import evaluation
from twister_jax.training.background import (
    Interrupted,
    Pending,
    Signals,
    Stopwatch,
    compile_in_background,
    trace,
)
from twister_jax.training.checkpoint import Checkpointer, Snapshot
from twister_jax.training.metrics import Averages, Log, Progress, duration
from twister_jax.training.rundir import RunDirectory, check_memory
from twister_jax.training.state import OnDevice, observe

MakeAgent = Callable[[Config, EnvSpec], Agent]
MakeEnv = Callable[[str, EnvConfig, int, int], VectorEnv]

MAY_CHANGE = (
    "logdir",
    "train.steps",
    "train.log_every",
    "train.report_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.max_bad_updates",
    "train.tensorboard",
    "evaluation.episodes",
    "evaluation.num_envs",
    "evaluation.noop_max",
    "evaluation.time_limit_frames",
    "evaluation.sample_actions",
)
"""What a run that is resumed may have otherwise than when it began."""


def stored_steps(steps: int) -> int:
    """Room for a run of `steps` agent steps: resets are stored too, and are many where games are short."""
    return math.ceil(1.08 * steps) + 1_000


class DivergedError(UserError):
    """Too many updates in a row were not finite."""

    exit_code = 1


@dataclasses.dataclass
class Counters:
    """Where a run stands, as far as the host knows."""

    iterations: int = 0
    """Times all environments were stepped, resets included."""
    env_steps: int = 0
    """Agent steps that took an action."""
    updates: int = 0
    """Updates of the interleaved loop."""
    pretraining_updates: int = 0
    """Updates of all pretraining phases together."""
    filled_at: int | None = None
    """`env_steps` when the random steps were over."""
    episodes: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    """(score, length) of the games that ended since the last row."""
    recent_scores: list[float] = dataclasses.field(default_factory=list)
    """Of the last ten games."""
    wall_seconds: float = 0.0


def train(config: Config, make_agent: MakeAgent, make_env: MakeEnv) -> int:
    """Trains, evaluates, and leaves everything in the run directory; goes on where an earlier call stopped.

    Returns:
      The exit code: 0, or 128 + the number of the signal that ended the run.

    Raises:
      UserError: the directory, the memory or the settings do not allow the run.
      DivergedError: see `train.max_bad_updates`.
    """
    tell = Progress()
    with RunDirectory(Path(config.logdir)) as directory, Signals() as signals:
        directory.check_or_write_config(configs.to_dict(config), MAY_CHANGE)
        run = Run(config, make_agent, make_env, tell, signals)
        try:
            run.learn_everything()
            tell.close()
            run.evaluate()
        except Interrupted:
            saved = run.save()
            tell.say(
                f"{signals.name}: {'saved' if saved else 'not saved'}; the same command goes on from there"
            )
            return signals.exit_code
        finally:
            tell.close()
            run.finish_saving()
            run.env.close()
    return 0


class Run:
    """A run between two iterations, and how it gets from one to the next."""

    state: OnDevice
    replay: Replay
    counters: Counters
    averages: dict[str, Averages]
    """Metrics since the last row, by the kind of update."""
    compiled: dict[str, Pending]
    log: Log
    clock: Stopwatch
    _saved_position: int | None
    _reported: int

    def __init__(
        self, config: Config, make_agent: MakeAgent, make_env: MakeEnv, tell: Progress, signals: Signals
    ):
        self.config, self.tell, self.signals = config, tell, signals
        self.directory = Path(config.logdir)
        self.make_env = make_env
        self.env = start_env(make_env, config)
        self.agent = make_agent(config, self.env.spec)
        self.checkpointer = Checkpointer(self.directory / "checkpoints", config.train.keep_checkpoints)
        self.averages = {}
        self._start_or_resume()
        self._tried_at, self._tried_steps = self.clock.seconds(), self.counters.env_steps
        self._pace: list[tuple[float, int]] = []
        self._shown: dict[str, float | None] = {}
        self._fits = False

    # ------------------------------------------------------------------------------------- the loop

    def learn_everything(self) -> None:
        """From wherever the run stands to its last step."""
        if self.finished:
            return
        while not self.finished:
            if self.filling:
                self.step_randomly()
            elif phase := self.phase:
                self.pretrain(*phase)
            else:
                self.iterate()
            self.housekeep()
        self.tell.update(self.progress_line())
        self.save()

    def step_randomly(self) -> None:
        """One step of the prefill."""
        spec, envs = self.env.spec, self.env.num_envs
        generator = generator_for(self.config.seed, Purpose.PREFILL, self.counters.iterations)
        if spec.discrete:
            choice = generator.integers(spec.num_actions, size=envs)
            vector = np.eye(spec.num_actions, dtype=np.float32)[choice]
        else:
            vector = generator.uniform(-1, 1, (envs, spec.num_actions)).astype(np.float32)
        self.step_env(vector)
        if not self.filling:
            self.counters.filled_at = self.counters.env_steps
            # The actor has seen none of this, so it begins as if the present step were the first.
            observation = self.state.observation._replace(is_first=jnp.ones(envs, bool))
            self.state = dataclasses.replace(self.state, observation=observation)

    def iterate(self) -> None:
        """Acts, learns and steps; the emulator runs while the device learns."""
        self.wait_for("act", "update", "update averages")
        act = self.ready("act")
        key = key_for(self.config.seed, Purpose.ACT, self.counters.iterations)
        action, carry = act(self.state.agent, self.state.carry, self.state.observation, key)
        self.state = dataclasses.replace(self.state, carry=carry)
        self.learn()
        self.step_env(action)
        if self.counters.env_steps >= self.config.train.steps:
            self.learn()  # what the last step earned

    def learn(self) -> None:
        """All updates that are owed by now."""
        while self.counters.updates < self.owed:
            key = key_for(self.config.seed, Purpose.UPDATE, self.counters.updates)
            self.update("update", key)
            self.counters.updates += 1
            if self.counters.updates % self.config.train.log_every == 0:
                self.write_row("update")

    def pretrain(self, phase: Pretraining, done: int) -> None:
        """One update of a pretraining phase that has had `done`."""
        self.wait_for(phase.name, f"{phase.name} averages")
        key = key_for(self.config.seed, Purpose.PRETRAIN, self.counters.pretraining_updates)
        self.update(phase.name, key)
        self.counters.pretraining_updates += 1
        done += 1
        if done % self.config.train.log_every == 0 or done == phase.updates:
            self.write_row(phase.name, {"phase": phase.name, "phase_updates": done})

    def update(self, kind: str, key: Any) -> None:
        """Puts one update into the device's queue."""
        learn, add = self.ready(kind), self.ready(f"{kind} averages")
        agent, self.replay, metrics = learn(self.state.agent, self.replay, key)
        self.state = dataclasses.replace(self.state, agent=agent)
        self.averages[kind] = add(self.averages[kind], metrics)

    def step_env(self, action: Any) -> None:
        """Waits for the action, steps every environment, and stores what comes."""
        chosen = np.asarray(action)
        step = take_step(self.env, chosen.argmax(-1) if self.env.spec.discrete else chosen)
        self.store(action, step)
        self.counters.iterations += 1
        self.counters.env_steps += int(np.sum(~step.is_first))
        for episode in step.episodes:
            self.counters.episodes.append((float(episode.score), int(episode.length)))
            self.counters.recent_scores = [*self.counters.recent_scores, float(episode.score)][-10:]

    def store(self, action: Any, step: EnvStep) -> None:
        """Puts a step into the replay."""
        observation = observe(step)  # the frames travel once
        action, reward, terminal = map(jnp.asarray, (action, step.reward, step.terminal))
        transition = Transition(observation.image, action, reward, terminal, observation.is_first)
        self.replay = _insert(self.replay, transition)
        self.state = dataclasses.replace(self.state, observation=observation)

    # ------------------------------------------------------------------------------- where it stands

    @property
    def finished(self) -> bool:
        """Whether nothing is left but to evaluate."""
        return self.counters.env_steps >= self.config.train.steps

    @property
    def filling(self) -> bool:
        """Whether random steps are still wanted."""
        stored = self.counters.iterations + 1  # in each stream; the first reset is one
        return self.counters.filled_at is None and (
            self.counters.env_steps < self.config.train.prefill_steps or stored < self.agent.min_replay_steps
        )

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
    def owed(self) -> int:
        """Updates that should have been made by now."""
        return updates_owed(
            self.counters.env_steps, self.counters.filled_at, self.config.train.updates_per_step
        )

    @property
    def position(self) -> int:
        """Names checkpoints: it grows whenever the run gets on."""
        return self.counters.env_steps + self.counters.pretraining_updates

    def ready(self, name: str) -> Any:
        """A compiled function; between `wait_for` and the end of an iteration it is there at once."""
        return self.compiled[name].result(self.signals)

    def wait_for(self, *names: str) -> None:
        """Waits until functions are compiled. A signal is answered here, and nowhere within an iteration."""
        for name in names:
            if not self.compiled[name].ready():
                self.tell.update(self.progress_line())
                self.ready(name)
                self._pace.clear()
        if not self._fits:
            self._check_scratch_memory()
            self._fits = True

    def _check_scratch_memory(self) -> None:
        """Before anything runs: what an update leaves with the process cannot be told from what is gone.

        Pictures are left out, so that nothing waits for their compilation.
        """
        updates = ["update", *(phase.name for phase in self.agent.pretraining)]
        memory = {name: self.ready(name).memory_analysis() for name in updates}
        scratch = {name: m.temp_size_in_bytes for name, m in memory.items() if m is not None}
        if scratch:
            largest = max(scratch, key=scratch.__getitem__)
            check_memory({f"running {largest}": scratch[largest]}, jax.devices()[0])

    # ---------------------------------------------------------------------------------- housekeeping

    def housekeep(self) -> None:
        """Pictures, checkpoints, the progress line, and the question whether to stop."""
        train, counters = self.config.train, self.counters
        if train.report_every and counters.updates // train.report_every > self._reported:
            self.wait_for("report")
            self._reported = counters.updates // train.report_every
            key = key_for(self.config.seed, Purpose.REPORT, counters.updates)
            self.log.pictures(counters.env_steps, self.ready("report")(self.state.agent, self.replay, key))
        if (
            counters.env_steps // train.checkpoint_every > self._tried_steps // train.checkpoint_every
            or self.clock.seconds() - self._tried_at > 60 * train.checkpoint_minutes
        ):
            self.save(wait=False)
        if self.tell.due():
            self.tell.update(self.progress_line())
        self.signals.check()

    def write_row(self, kind: str, phase: dict[str, Any] | None = None) -> None:
        """Waits for the device, writes a row of metrics.jsonl, and stops a run that diverged."""
        counters = self.counters
        prefix = f"pretraining/{kind}/" if phase else ""
        values: dict[str, Any] = {prefix + name: value for name, value in self.averages[kind].means().items()}
        self.averages[kind] = Averages.empty(self.averages[kind].total)
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
            "wall_seconds": round(self.clock.seconds(), 3),
        }
        self.log.row({**where, **(phase or {}), **values})
        plotted = {**values, f"{prefix}steps_per_second": self.pace(), "updates": counters.updates}
        self.log.plot(phase["phase_updates"] if phase else counters.env_steps, plotted)
        self.check_health()

    def health(self) -> Health:
        """Waits for the device and says how sound the updates were."""
        return jax.device_get(self.agent.health(self.state.agent))

    def check_health(self) -> None:
        """Stops a run that diverged, before it is saved: what is on disk stays good.

        Raises:
          DivergedError: see `train.max_bad_updates`.
        """
        health = self.health()
        if health.longest >= self.config.train.max_bad_updates:
            raise DivergedError(
                f"training diverged: {int(health.longest)} updates in a row were not finite, first in "
                f"{self.agent.loss_names[int(health.first_bad)]}; the last good checkpoint is kept in "
                f"{self.checkpointer.directory}; a lower learning rate or another seed may help"
            )

    def _keep_config(self) -> None:
        """Writes config.json again where the directory had vanished: without it nothing could be resumed."""
        path = self.directory / "config.json"
        if not path.exists():
            with contextlib.suppress(OSError):
                self.directory.mkdir(parents=True, exist_ok=True)
                evaluation.write_atomically(path, json.dumps(configs.to_dict(self.config), indent=2) + "\n")

    def save(self, *, wait: bool = True) -> bool:
        """Writes a checkpoint, unless the newest one stands where the run stands; says whether there is one.

        Without `wait` the run goes on as soon as everything is copied off the device, and the disk is written
        meanwhile. A disk that refuses is reported and asked again when the next checkpoint is due.
        """
        self._tried_at, self._tried_steps = self.clock.seconds(), self.counters.env_steps
        self.finish_saving()
        if self.position == self._saved_position:
            return True
        self.check_health()
        self._keep_config()
        self.counters.wall_seconds = self.clock.seconds()
        self.log.file.flush()
        host = {
            "counters": dataclasses.asdict(self.counters),
            "averages": {kind: averages.to_host() for kind, averages in self.averages.items()},
            "metrics_offset": self.log.file.offset,
            "metrics_pending": self.log.file.pending,
        }
        try:
            self.checkpointer.save(
                self.position, Snapshot(self.state, self.replay, self.env.get_state(), host), wait=wait
            )
        except OSError as error:
            self._not_saved(error)
            return False
        self._saved_position = self.position
        return True

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is still being written."""
        try:
            self.checkpointer.wait()
        except OSError as error:
            self._not_saved(error)

    def _not_saved(self, error: OSError) -> None:
        self._saved_position = None
        self.tell.say(
            f"checkpoint at step {self.counters.env_steps:,} could not be saved ({error}); going on"
        )

    def evaluate(self) -> None:
        """The final evaluation, unless evaluation.json already has it."""
        step = self.counters.env_steps
        path = self.directory / "evaluation.json"
        if evaluation.is_current(path, self.config, step, self.counters.updates):
            self.tell.say(f"finished: {self.directory} has its {step:,} steps and evaluation.json")
            return
        evaluation.run(
            self.config,
            self.agent,
            self.state.agent,
            self.make_env,
            {"env_steps": step, "updates": self.counters.updates},
            self.tell,
            self.signals,
        )

    def pace(self) -> float:
        """Agent steps (in pretraining: updates) per second, over the last half minute or so."""
        now = (self.clock.seconds(), self.position)
        self._pace = [then for then in self._pace if then[0] > now[0] - 30] or self._pace[-1:]
        self._pace.append(now)
        (t0, s0), (t1, s1) = self._pace[0], self._pace[-1]
        return (s1 - s0) / (t1 - t0) if t1 > t0 else 0.0

    def progress_line(self) -> str:
        """`steps 1,234/100,000  updates 1,071  12.3 steps/s  return 3 (last 10: 2.4)  …  left 2h13m`."""
        counters, pace = self.counters, self.pace()
        parts = [f"steps {counters.env_steps:,}/{self.config.train.steps:,}"]
        if self.filling:
            parts.append("random actions")
        elif phase := self.phase:
            parts.append(
                f"pretraining {phase[0].name} {phase[1]:,}/{phase[0].updates:,}  {pace:.1f} updates/s"
            )
        else:
            parts.append(f"updates {counters.updates:,}  {pace:.1f} steps/s")
        if counters.recent_scores:
            recent = counters.recent_scores
            parts.append(f"return {recent[-1]:g} (last {len(recent)}: {np.mean(recent):.1f})")
        first = self.agent.loss_names[0]
        for name, value in self._shown.items():
            if name.rsplit("/", 1)[-1] == first and value is not None:
                parts.append(f"{name} {value:.4g}")
        kind = "update" if self.phase is None else self.phase[0].name
        if not self.filling and not self.compiled[kind].ready():
            parts.append("compiling")
        elif pace and not self.filling:
            target = self.config.train.steps + sum(phase.updates for phase in self.agent.pretraining)
            parts.append(f"left {duration((target - self.position) / pace)}")
        return "  ".join(parts)

    # ----------------------------------------------------------------------------------- the beginning

    def _start_or_resume(self) -> None:
        config, agent, envs, spec = self.config, self.agent, self.env.num_envs, self.env.spec
        capacity = min(config.replay.capacity, stored_steps(config.train.steps))
        make_replay = functools.partial(
            replays.init, envs, math.ceil(capacity / envs), spec.image_shape, spec.num_actions
        )
        for name, value in (("replay.capacity", capacity), ("train.steps", config.train.steps)):
            if value // envs < agent.min_replay_steps:
                raise UserError(
                    f"{name} = {value}: must be at least {agent.min_replay_steps * envs}, the stored steps "
                    f"that {config.agent} needs before its first update"
                )
        shapes, replay_shapes = OnDevice.shapes(agent, spec, envs), jax.eval_shape(make_replay)
        check_memory({"replay": _bytes(replay_shapes), "agent": _bytes(shapes.agent)}, jax.devices()[0])
        snapshot = self.checkpointer.restore(shapes, replay_shapes)
        if snapshot is None:
            self.counters = Counters()
            step = first_step(self.env, config.game)
            # Loading a program and touching gigabytes leave Python free for tracing.
            with ThreadPoolExecutor(1) as beside:
                begin = beside.submit(OnDevice.begin, agent, config.seed, step)
                replay = beside.submit(jax.jit(make_replay))
                self.compiled = self._compile(shapes, replay_shapes)
                self.state, self.replay = begin.result(), replay.result()
            self.store(np.zeros((envs, spec.num_actions), np.float32), step)
            self._saved_position = None
            self.log = Log(self.directory, self.tell, config.train.tensorboard)
        else:
            host = snapshot.host
            self.state, self.replay = snapshot.state, snapshot.replay
            self.counters = Counters(**host["counters"])
            self.averages = {kind: Averages.from_host(sums) for kind, sums in host["averages"].items()}
            try:
                self.env.set_state(snapshot.env)
            except ValueError as error:
                raise UserError(f"cannot resume {self.directory}: {error}") from error
            self._saved_position = self.position
            self.tell.say(f"resuming {self.directory} at step {self.counters.env_steps:,}")
            self.log = Log(
                self.directory,
                self.tell,
                config.train.tensorboard,
                offset=host["metrics_offset"],
                pending=host["metrics_pending"],
                resumed_at=self.counters.env_steps,
            )
            if not self.finished:
                self.compiled = self._compile(shapes, replay_shapes)
        self.clock = Stopwatch(self.counters.wall_seconds)
        self._reported = self.counters.updates // max(1, config.train.report_every)

    def _compile(self, state: OnDevice, replay: Replay) -> dict[str, Pending]:
        """Starts compiling all that the loop calls, for state and replay of these shapes."""
        agent = self.agent
        key = key_for(self.config.seed, Purpose.INIT)
        functions = {"act": trace(agent.act, state.agent, state.carry, state.observation, key)}
        updates = {phase.name: phase.update for phase in agent.pretraining} | {"update": agent.update}
        for kind, function in updates.items():
            functions[kind] = trace(function, state.agent, replay, key, donate=(0, 1))
            metrics = functions[kind].out_info[2]
            if self.averages.get(kind) is None or self.averages[kind].total.keys() != metrics.keys():
                self.averages[kind] = Averages.empty(metrics)
            functions[f"{kind} averages"] = trace(Averages.add, self.averages[kind], metrics, donate=(0,))
        if self.config.train.report_every:
            functions["report"] = trace(agent.report, state.agent, replay, key)
        return compile_in_background(functions)


def updates_owed(env_steps: int, filled_at: int | None, updates_per_step: float) -> int:
    """Updates due after `env_steps` steps, from totals, so that no rounding builds up."""
    if filled_at is None:
        return 0
    return math.floor((env_steps - filled_at) * updates_per_step)


def start_env(make_env: MakeEnv, config: Config) -> VectorEnv:
    """The training environments.

    Raises:
      UserError: they do not work.
    """
    seed = int(generator_for(config.seed, Purpose.ENVIRONMENT).integers(2**31))
    try:
        return make_env(config.game, config.env, config.env.num_envs, seed)
    except RuntimeError as error:
        raise UserError(f"cannot start {config.game}: {error}") from error


def first_step(env: VectorEnv, game: str) -> EnvStep:
    """Resets all environments.

    Raises:
      UserError: one cannot be reset.
    """
    try:
        return env.reset()
    except RuntimeError as error:
        raise UserError(f"cannot start {game}: {error}") from error


def take_step(env: VectorEnv, actions: Any) -> EnvStep:
    """Steps all environments.

    Raises:
      UserError: one failed too often.
    """
    try:
        return env.step(actions)
    except RuntimeError as error:
        raise UserError(f"{error}; the last checkpoint is kept") from error


_insert = jax.jit(replays.insert, donate_argnums=0)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
