"""Acting, the environments, the replay, and what travels between host and device."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench import Bench
from benchmarks.subject import Subject
from benchmarks.timing import Clock, Program, Times, compile_program
from twister_jax.agents.base import Observation
from twister_jax.envs import make_vector_env
from twister_jax.randomness import Purpose, key_for
from twister_jax.replay import store
from twister_jax.replay.store import Transition

SECTION = "acting"


def run(bench: Bench) -> None:
    """All that an environment step costs besides the update."""
    quick = bench.options.quick
    for envs in (1, 8) if quick else (1, 8, 64):
        _latency(bench, envs)
    _host_time(bench)
    _replay(bench)
    _traffic(bench)
    for envs in (1, 8) if quick else (1, 8, 32):
        _environments(bench, envs)


def _frames(subject: Subject, envs: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (envs, *subject.spec.image_shape), dtype=np.uint8)


def _compile_act(subject: Subject, envs: int) -> tuple[Program, Any]:
    """The policy for so many environments, and its carry."""
    carry = jax.jit(lambda state: subject.agent.init_carry(state, envs))(subject.state)
    carry = jax.tree.map(jnp.copy, carry)
    observation = Observation(jnp.array(_frames(subject, envs)), jnp.zeros(envs, bool))
    key = key_for(0, Purpose.ACT)
    return compile_program(subject.agent.act, subject.state, carry, observation, key), carry


def _latency(bench: Bench, envs: int) -> None:
    """From frames on the host to actions on the host, while the device does nothing else."""
    subject = bench.subject
    program, carry = _compile_act(subject, envs)
    frames, first = _frames(subject, envs), np.zeros(envs, bool)
    keys = [key_for(0, Purpose.ACT, step) for step in range(16)]

    def step(carry: tuple[Any, int]) -> tuple[Any, int]:
        memory, index = carry
        observation = Observation(jnp.array(frames), jnp.array(first))
        action, memory = program.call(subject.state, memory, observation, keys[index % len(keys)])
        np.asarray(action)
        return memory, index + 1

    times = bench.take(Clock(step, (carry, 0), bench.fill))
    note = "frames on the host to actions on the host"
    bench.report.time(SECTION, f"act, {envs} environments", times, note)
    bench.report.rate(SECTION, f"actions, {envs} environments", envs, times, "actions/s")


def _host_time(bench: Bench) -> None:
    """Host time that acting and storing take in the loop: until all is enqueued, not until it is done."""
    subject = bench.subject
    program, carry = _compile_act(subject, 1)
    frames, first = _frames(subject, 1), np.zeros(1, bool)
    reward = np.zeros(1, np.float32)
    insert = jax.jit(store.insert, donate_argnums=0)
    observation = Observation(jnp.array(frames), jnp.array(first))
    samples: dict[str, list[float]] = {"act": [], "insert": [], "act and insert": []}
    for index in range(3 + (10 if bench.options.quick else 200)):
        started = time.perf_counter()
        key = key_for(0, Purpose.ACT, index)
        action, carry = program.call(subject.state, carry, observation, key)
        acted = time.perf_counter()
        jax.block_until_ready(action)
        resumed = time.perf_counter()
        # As `training.run.Run.store` does: the frames travel once.
        observation = Observation(jnp.array(frames), jnp.array(first))
        given, terminal = jnp.asarray(reward), jnp.asarray(first)
        transition = Transition(observation.image, action, given, terminal, observation.is_first)
        subject.replay = insert(subject.replay, transition)
        stored = time.perf_counter()
        jax.block_until_ready(subject.replay)
        if index >= 3:
            samples["act"].append(acted - started)
            samples["insert"].append(stored - resumed)
            samples["act and insert"].append(acted - started + stored - resumed)
    for name, values in samples.items():
        note = "1 environment; until enqueued, not done"
        bench.report.time(SECTION, f"host time, {name}", Times(tuple(values)), note)


def _replay(bench: Bench) -> None:
    subject = bench.subject
    step = Transition(
        image=jnp.array(_frames(subject, 1)),
        action=jnp.zeros((1, subject.spec.num_actions)),
        reward=jnp.zeros(1),
        terminal=jnp.zeros(1, bool),
        is_first=jnp.zeros(1, bool),
    )
    insert = compile_program(store.insert, subject.replay, step, donate=(0,))
    clock = Clock(lambda replay: insert.call(replay, step), subject.replay, bench.fill)
    times = bench.take(clock)
    subject.replay = clock.carry
    bench.report.time(SECTION, "replay insertion, 1 step", times, f"capacity {subject.replay.capacity:,}")

    def sample(replay, key):
        return subject.agent.sample(replay, key)[0]  # the replay, not donated here, would be copied

    key = key_for(0, Purpose.UPDATE)
    program = compile_program(sample, subject.replay, key)
    times = bench.measure(program, subject.replay, key)
    bench.report.time(SECTION, "replay sampling", times, "what one update reads")


def _traffic(bench: Bench) -> None:
    """Bytes of the arrays that the loop hands over in a step of one environment.

    What `training.run.Run.store` uploads as the next observation also goes into the replay.
    """
    observation = _frames(bench.subject, 1).nbytes + 1  # and is_first
    transition = 4 + 1  # reward, terminal; the action is on the device already
    keys = 4 * 2 * (1 + bench.config.train.updates_per_step)  # seed and step, for acting and each update
    actions = 4 * bench.subject.spec.num_actions
    note = "computed from what the loop hands over"
    bench.report.add(SECTION, "host to device, per step", observation + transition + keys, "B", note)
    bench.report.add(SECTION, "device to host, per step", actions, "B", note)


def _environments(bench: Bench, envs: int) -> None:
    config = bench.config
    env = make_vector_env(config.game, config.env, envs, seed=0)
    try:
        env.reset()
        rng = np.random.default_rng(0)

        def step(_: None) -> None:
            env.step(env.spec.to_env(env.spec.random_actions(rng, envs)))

        times = bench.take(Clock(step, None, max(bench.fill, 0.02)))
    finally:
        env.close()
    note = f"{config.game}, random actions, with resets"
    bench.report.rate(SECTION, f"stepping {envs} environments", envs, times, "steps/s", note)
