"""Acting, the emulator, the replay, and what travels between host and device."""

import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.subject import Subject
from benchmarks.timing import Clock, Program, Times, compile_program
from twister_jax import replay as replays
from twister_jax.agent import Observation, Transition
from twister_jax.randomness import Purpose, key_for

if TYPE_CHECKING:
    from benchmarks.bench import Bench

SECTION = "acting"


def run(bench: "Bench") -> None:
    """All that an environment step costs besides the update."""
    quick = bench.options.quick
    for envs in (1, 8) if quick else (1, 8, 64):
        _latency(bench, envs)
    _host_time(bench)
    _replay(bench)
    _traffic(bench)
    for envs in (1, 8) if quick else (1, 8, 32):
        _emulator(bench, envs)


def _frames(subject: Subject, envs: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (envs, *subject.spec.image_shape), dtype=np.uint8)


def _compile_act(subject: Subject, envs: int) -> tuple[Program, Any]:
    """The policy for so many environments, and its carry."""
    carry = jax.jit(lambda state: subject.agent.init_carry(state, envs))(subject.state)
    carry = jax.tree.map(jnp.copy, carry)
    observation = Observation(jnp.array(_frames(subject, envs)), jnp.zeros(envs, bool))
    key = key_for(0, Purpose.ACT)
    return compile_program(subject.agent.act, subject.state, carry, observation, key), carry


def _latency(bench: "Bench", envs: int) -> None:
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

    times = Clock(step, (carry, 0), bench.fill).take(bench.options.repeats, bench.options.budget)
    bench.report.time(
        SECTION, f"act, {envs} environments", times, "frames on the host to actions on the host"
    )
    bench.report.rate(SECTION, f"actions, {envs} environments", envs, times, "actions/s")


def _host_time(bench: "Bench") -> None:
    """Host time that acting and storing take in the loop: until all is enqueued, not until it is done."""
    subject = bench.subject
    program, carry = _compile_act(subject, 1)
    frames, first = _frames(subject, 1), np.zeros(1, bool)
    reward = np.zeros(1, np.float32)
    insert = jax.jit(replays.insert, donate_argnums=0)
    observation = Observation(jnp.array(frames), jnp.array(first))
    samples: dict[str, list[float]] = {"act": [], "insert": [], "both": []}
    for index in range(3 + (10 if bench.options.quick else 200)):
        started = time.perf_counter()
        key = key_for(0, Purpose.ACT, index)
        action, carry = program.call(subject.state, carry, observation, key)
        acted = time.perf_counter()
        jax.block_until_ready(action)
        resumed = time.perf_counter()
        # As `training.loop.Run.store` does: the frames travel once.
        observation = Observation(jnp.array(frames), jnp.array(first))
        given, terminal = jnp.asarray(reward), jnp.asarray(first)
        transition = Transition(observation.image, action, given, terminal, observation.is_first)
        subject.replay = insert(subject.replay, transition)
        stored = time.perf_counter()
        jax.block_until_ready(subject.replay)
        if index >= 3:
            samples["act"].append(acted - started)
            samples["insert"].append(stored - resumed)
            samples["both"].append(acted - started + stored - resumed)
    for name, values in samples.items():
        title = f"host time, {'act and insert' if name == 'both' else name}"
        bench.report.time(SECTION, title, Times(tuple(values)), "1 environment; until enqueued, not done")


def _replay(bench: "Bench") -> None:
    subject, algorithm = bench.subject, bench.config.algorithm
    step = Transition(
        image=jnp.array(_frames(subject, 1)),
        action=jnp.zeros((1, subject.spec.num_actions)),
        reward=jnp.zeros(1),
        terminal=jnp.zeros(1, bool),
        is_first=jnp.zeros(1, bool),
    )
    insert = compile_program(replays.insert, subject.replay, step, donate=(0,))
    clock = Clock(lambda replay: insert.call(replay, step), subject.replay, bench.fill)
    times = clock.take(bench.options.repeats, bench.options.budget)
    subject.replay = clock.carry
    bench.report.time(SECTION, "replay insertion, 1 step", times, f"capacity {subject.replay.capacity:,}")

    def sample(replay, key):
        return replays.sample(replay, key, algorithm.batch_size, algorithm.batch_length)

    key = key_for(0, Purpose.UPDATE)
    program = compile_program(sample, subject.replay, key)
    name = f"replay sampling, {algorithm.batch_size} x {algorithm.batch_length} steps"
    bench.report.time(SECTION, name, bench.measure(program, subject.replay, key), "uniform windows")


def _traffic(bench: "Bench") -> None:
    """Bytes of the arrays that the loop hands over in a step of one environment.

    What `training.loop.Run.store` uploads as the next observation also goes into the replay.
    """
    observation = _frames(bench.subject, 1).nbytes + 1  # and is_first
    transition = 4 + 1  # reward, terminal; the action is on the device already
    keys = 4 * 2 * (1 + bench.config.train.updates_per_step)  # seed and step, for acting and each update
    actions = 4 * bench.subject.spec.num_actions
    note = "computed from what the loop hands over"
    bench.report.add(SECTION, "host to device, per step", observation + transition + keys, "B", note)
    bench.report.add(SECTION, "device to host, per step", actions, "B", note)


def _emulator(bench: "Bench", envs: int) -> None:
    from twister_jax.envs import make_vector_env

    config = bench.config
    env = make_vector_env(config.game, config.env, envs, seed=0)
    try:
        env.reset()
        rng = np.random.default_rng(0)

        def step(_: None) -> None:
            env.step(rng.integers(env.spec.num_actions, size=envs))

        times = Clock(step, None, max(bench.fill, 0.02)).take(bench.options.repeats, bench.options.budget)
    finally:
        env.close()
    name = f"emulator, {envs} environments"
    bench.report.rate(SECTION, name, envs, times, "steps/s", f"{config.game}, random actions, with resets")
