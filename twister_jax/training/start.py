"""How a run begins, or goes on from its newest checkpoint."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import jax

from twister_jax import agents, presets
from twister_jax.errors import UserError
from twister_jax.files import one_line
from twister_jax.randomness import Purpose, key_for
from twister_jax.replay import store
from twister_jax.replay.store import Replay
from twister_jax.training.logs import Averages
from twister_jax.training.memory import check_start
from twister_jax.training.programs import Programs, trace_agent
from twister_jax.training.provenance import different_numerics
from twister_jax.training.rundir import check_same_run
from twister_jax.training.save import Snapshot
from twister_jax.training.state import Counters, RunState, tree_bytes

if TYPE_CHECKING:
    from twister_jax.training.run import Run


def start_or_resume(run: "Run") -> None:
    """Gives a run its state, replay, counters, log and programs.

    Raises:
      UserError: the memory, the settings or what the directory holds do not allow the run.
    """
    config, agent, num_envs, spec = run.config, run.agent, run.config.env.num_envs, run.env.spec
    capacity = presets.stored_steps(config)
    for name, value in (("replay.capacity", capacity), ("train.steps", config.train.steps)):
        if value // num_envs < agent.min_replay_steps:
            raise UserError(
                f"{name} = {value}: must be at least {agent.min_replay_steps * num_envs}, "
                f"the stored steps that {config.agent} needs before its first update"
            )
    make_replay = functools.partial(
        store.init, num_envs, math.ceil(capacity / num_envs), spec.image_shape, spec.num_actions
    )
    shapes, replay_shapes = RunState.shapes(agent, spec, num_envs), jax.eval_shape(make_replay)
    devices, lies = run.devices, run.devices.by_env(replay_shapes)
    compiling = agents.package(config.agent).compiling_bytes
    sizes = devices.bytes(replay_shapes, lies), tree_bytes(shapes.agent)
    check_start(*sizes, compiling, jax.local_devices()[0], run.progress.say)
    _remark(run, sizes[0])
    snapshot = run.restore(shapes, devices.shaped(replay_shapes, lies))
    if snapshot is not None:
        _resume(run, snapshot)
        if not run.finished:
            run.compile(shapes, replay_shapes)
        return
    run.counters, run.stored = Counters(), 0
    run.home.write_config(config.to_dict())  # only its updates' scratch may refuse it now
    run.open_log()
    try:
        step = run.env.reset()
    except RuntimeError as error:
        raise UserError(f"cannot start {config.game}: {error}") from error
    run.progress.update("starting; programs that are not in the cache take a minute or two to compile")
    # Loading a program and touching gigabytes leave Python free for tracing.
    with ThreadPoolExecutor(1) as beside:
        state = beside.submit(RunState.begin, agent, spec, num_envs, config.seed, step, devices)
        replay = beside.submit(devices.jit(make_replay, lies))
        run.compile(shapes, replay_shapes)
        run.state, run.replay = state.result(), replay.result()
    run.store(run.state.action, step)


def _remark(run: "Run", replay: int) -> None:
    """Prints what may surprise a user about the devices; `replay` is its size on each, in bytes."""
    idle, used = jax.device_count() - run.devices.count, run.devices.count
    if idle and run.alone:
        run.progress.say(
            f"{idle} of {idle + used} devices are idle: --parallel.data N shares updates among N of them, "
            "--seeds trains a seed on each"
        )
    if used > 1 and not run.devices.split_streams:
        run.progress.say(
            f"one environment: each of the {used} devices has a copy of its stream, {replay / 1e9:.2f} GB"
        )


def _resume(run: "Run", snapshot: Snapshot) -> None:
    host = snapshot.host
    run.state = run.devices.spread(snapshot.state, snapshot.state.shardings(run.devices))
    run.replay = snapshot.replay
    may_change = run.config.changeable()
    check_same_run(run.checkpointer.directory, host.get("config"), run.config.to_dict(), may_change)
    try:  # it may come from a stranger
        run.counters = Counters.from_host(host["counters"])
        run.averages = {kind: Averages.from_host(sums) for kind, sums in host["averages"].items()}
        offset, pending = int(host["metrics_offset"]), list(map(str, host["metrics_pending"]))
        if offset < 0:
            raise ValueError(f"metrics_offset {offset}")
        restarted = run.env.set_state(snapshot.env)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"cannot resume {run.directory}: {one_line(error)}") from error
    run.saved_at = (run.counters.position, run.counters.updates)
    run.home.write_config(run.config.to_dict())
    run.progress.say(f"resuming {run.directory} at step {run.counters.env_steps:,}")
    run.stored = int(run.replay.inserted)
    if snapshot.lost:
        run.note(
            f"{snapshot.lost:,} of the {snapshot.lost + min(run.stored, run.replay.capacity):,} stored steps "
            f"were damaged on disk: resumed without them at step {run.counters.env_steps:,}"
        )
    if restarted and not run.finished:
        run.note(
            f"resumed at step {run.counters.env_steps:,} with new episodes, as {run.config.game} cannot be "
            f"saved: not as if undisturbed"
        )
    if snapshot.visits_lost:
        run.note(f"visit counts were damaged on disk: counted anew from step {run.counters.env_steps:,}")
    if not run.finished and (changed := different_numerics(host.get("numerics"), run.config.precision)):
        run.note(f"resumed at step {run.counters.env_steps:,} with {changed}: not bit for bit")
    resumed_at = (run.counters.env_steps, run.counters.pretraining_updates)
    run.open_log(offset=offset, pending=pending, resumed_at=resumed_at)


def compile_programs(run: "Run", state: RunState, replay: Replay) -> Programs:
    """Starts compiling all that the loop calls, for state and replay of these shapes."""
    key = key_for(run.config.seed, Purpose.INIT)
    pictures = bool(run.config.train.report_every)
    traced = trace_agent(run.agent, state, replay, key, pictures, run.devices)
    for kind in (*(phase.name for phase in run.agent.pretraining), "update"):
        metrics = traced[kind].out_info[2]
        if run.averages.get(kind) is None or run.averages[kind].total.keys() != metrics.keys():
            run.averages[kind] = Averages.empty(metrics)
        whole = run.devices.everywhere(run.averages[kind])
        sums = run.devices.shaped(run.averages[kind], whole)
        traced[f"{kind} averages"] = run.devices.trace(Averages.add, sums, metrics, out=whole, donate=(0,))
    return Programs(traced, run.signals)
