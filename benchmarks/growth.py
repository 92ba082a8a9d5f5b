"""How an update grows: with the batch, with the length of windows, and with seeds in one program."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from benchmarks.machine import limited_host_memory
from benchmarks.options import resized
from benchmarks.subject import make_subject
from benchmarks.timing import Clock, Program, compile_program
from twister_jax import config as configs
from twister_jax.allocator import return_freed_memory
from twister_jax.config import Config
from twister_jax.errors import UserError
from twister_jax.randomness import Purpose, key_for
from twister_jax.training.rundir import check_memory

if TYPE_CHECKING:
    from benchmarks.bench import Bench

SECTION = "growth"
_REPLAY_STEPS = 10_000
"""Of each store here; five stores of full size would not fit everywhere."""


def run(bench: "Bench") -> None:
    """One size grows, the others stay as they are."""
    quick = bench.options.quick
    bench.forget()  # its state and replay would take memory from the largest sizes
    _grow(bench, "batch_size", (4, 8) if quick else (4, 8, 16, 32, 64))
    _grow(bench, "batch_length", (16, 32) if quick else (16, 32, 64, 128))
    _grow(bench, "seeds", (1, 2) if quick else (1, 2, 3, 4, 5))


def _grow(bench: "Bench", what: str, values: Sequence[int]) -> None:
    """Until one update would outlast the budget, or the memory would not suffice."""
    report, budget = bench.report, bench.options.budget
    last: tuple[int, float] | None = None
    for value in values:
        name = f"{what.replace('_', ' ')} {value}"
        expected = last[1] * value / last[0] if last else 0.0
        if bench.out_of_time or expected > budget:
            why = "--minutes are over" if bench.out_of_time else f"an update would take {expected:.3g} s"
            report.add(SECTION, name, None, "s", f"not measured: {why}")
            return
        seeds = value if what == "seeds" else 1
        config = bench.config if what == "seeds" else resized(bench.config, **{what: value})
        try:
            configs.validate(config)
        except UserError as error:
            report.add(SECTION, name, None, "s", f"not measured: {str(error)[:200]}")
            continue
        try:
            with limited_host_memory():
                seconds = _measure(bench, name, config, seeds)
        except (UserError, jax.errors.JaxRuntimeError) as error:  # not enough memory
            report.add(SECTION, name, None, "s", f"not measured: {str(error)[:200]}")
            return
        last = (value, seconds)
        report.write()


def _measure(bench: "Bench", name: str, config: Config, seeds: int) -> float:
    report = bench.report
    program, arguments, tokens = _compile(config, seeds)
    return_freed_memory()  # or it would count as taken
    check_memory({"update": program.temp_bytes}, jax.devices()[0])
    started = time.perf_counter()

    def step(carry: Any) -> Any:
        state, replay, _, keys = carry
        return *program.call(state, replay, keys), keys

    clock = Clock(step, (*arguments[:2], None, arguments[2]), bench.fill)
    left = bench.options.budget - (time.perf_counter() - started)
    times = clock.take(bench.options.repeats, left)
    report.time(SECTION, name, times, f"compiled, or found in the cache, in {program.seconds:.3g} s")
    report.rate(SECTION, f"{name}, tokens", tokens, times, "tokens/s")
    report.add(SECTION, f"{name}, temporary memory", program.temp_bytes, "B")
    return times.median


def _compile(config: Config, seeds: int) -> tuple[Program, tuple[Any, Any, Any], int]:
    """The update for all seeds at once, its arguments, and its tokens."""
    subject = make_subject(config, _REPLAY_STEPS)
    keys = jnp.stack([key_for(seed, Purpose.INIT) for seed in range(seeds)])
    update = subject.agent.update
    if seeds == 1:
        arguments = (subject.state, subject.replay, keys[0])
    else:
        update = jax.vmap(update)
        state = jax.jit(jax.vmap(subject.agent.init))(keys)
        replay = jax.tree.map(lambda x: jnp.stack([x] * seeds), subject.replay)
        arguments = (jax.tree.map(jnp.copy, state), replay, keys)
    program = compile_program(update, *arguments, donate=(0, 1))
    return program, arguments, seeds * subject.agent.tokens_per_update
