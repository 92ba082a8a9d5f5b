"""How an update grows: with the batch, with the length of windows, and with seeds in one program."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.bench import Bench
from benchmarks.machine import limited_host_memory
from benchmarks.options import resized
from benchmarks.subject import make_subject
from benchmarks.timing import Clock, Program, Times, compile_program
from twister_jax import presets
from twister_jax.config import Config
from twister_jax.errors import UserError
from twister_jax.randomness import Purpose, key_for
from twister_jax.runtime import return_freed_memory
from twister_jax.training import seeds
from twister_jax.training.memory import check_memory

SECTION = "growth"
_REPLAY_STEPS = 10_000
"""Of each store here; five stores of full size would not fit everywhere."""


@dataclasses.dataclass(frozen=True)
class _Case:
    name: str
    size: int
    """What an update's time is expected to be proportional to, within one series of cases."""
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    """What differs in the agent's settings."""
    seeds: int = 1
    in_turn: bool = False


def run(bench: Bench) -> None:
    """One size grows, the others stay as they are."""
    quick = bench.options.quick
    bench.forget()  # its state and replay would take memory from the largest sizes
    one = _Case("seeds 1", 1)
    for in_turn, how in ((False, "side by side"), (True, "in turn")):
        counts = (2,) if quick else (5, 2, 3, 4)  # five is what people train, and time may run out
        cases = [_Case(f"seeds {count} {how}", count, {}, count, in_turn) for count in counts]
        _grow(bench, cases, baseline=one)
    for what, values in (
        ("batch_size", (4, 8) if quick else (4, 8, 16, 32, 64)),
        ("batch_length", (16, 32) if quick else (16, 32, 64, 128)),
    ):
        _grow(bench, [_Case(f"{what.replace('_', ' ')} {size}", size, {what: size}) for size in values])


def _grow(bench: Bench, cases: Sequence[_Case], baseline: _Case | None = None) -> None:
    """Measures what the budget allows and the memory holds, interleaved with the baseline if there is one."""
    report, budget = bench.report, bench.options.budget
    clock: Clock | None = None  # of the baseline
    rate: float | None = None  # seconds to a unit of size
    too_large: int | None = None
    for case in cases:
        try:
            if bench.out_of_time:
                raise UserError("--minutes are over")
            if too_large is not None and case.size >= too_large:
                raise UserError(f"size {too_large} does not fit already")
            config = resized(bench.config, case.sizes)
            presets.validate(config)
            if baseline is not None and clock is None:
                clock = _start(bench, baseline, bench.config)[1]
                rate = clock.sample() / baseline.size
            if rate is not None and rate * case.size > budget:
                raise UserError(f"an update would take {rate * case.size:.3g} s")
        except UserError as error:
            report.add(SECTION, case.name, None, "s", f"not measured: {str(error)[:200]}")
            continue
        try:
            with limited_host_memory():
                rate = _measure(bench, case, config, clock).median / case.size
        except (UserError, jax.errors.JaxRuntimeError, MemoryError) as error:
            report.add(SECTION, case.name, None, "s", f"not measured: {str(error)[:200]}")
            too_large = case.size
            clock = None  # its donated state may be gone
        report.write()


def _start(bench: Bench, case: _Case, config: Config) -> tuple[Program, Clock, int]:
    """The compiled update, a clock that has warmed up, and the tokens of an update."""
    program, arguments, tokens = _compile(case, config)
    return_freed_memory()  # or it would count as taken
    check_memory({"update": program.temp_bytes}, jax.devices()[0])

    def step(carry: Any) -> Any:
        state, replay, _, keys = carry
        return *program.call(state, replay, keys), keys

    return program, Clock(step, (*arguments[:2], None, arguments[2]), bench.fill), tokens


def _measure(bench: Bench, case: _Case, config: Config, beside: Clock | None) -> Times:
    report, options = bench.report, bench.options
    program, clock, tokens = _start(bench, case, config)
    # As many updates of one as these are of all seeds: their samples then take about as long.
    span = 1 if beside is None else max(1, round(case.seeds * clock.calls / beside.calls))
    times = clock.take(options.repeats, options.budget, beside, beside_span=span)
    report.time(SECTION, case.name, times, f"compiled, or found in the cache, in {program.seconds:.3g} s")
    report.rate(SECTION, f"{case.name}, tokens", tokens, times, "tokens/s")
    if beside is not None:
        how = f"means of {span * beside.calls} updates of one, before each of these"
        report.time(SECTION, f"{case.name}, one seed", beside.times, how)
        ratio = times.median / beside.times.median
        report.add(SECTION, f"{case.name}, times one seed", ratio, "", "of the medians")
    report.add(SECTION, f"{case.name}, temporary memory", program.temp_bytes, "B")
    return times


def _compile(case: _Case, config: Config) -> tuple[Program, tuple[Any, Any, Any], int]:
    """The update for all seeds at once, its arguments, and its tokens."""
    subject = make_subject(config, _REPLAY_STEPS)
    agent = subject.agent
    keys = jnp.stack([key_for(seed, Purpose.INIT) for seed in range(case.seeds)])
    update: Callable[..., Any]
    if case.seeds == 1:
        update, arguments = agent.update, (subject.state, subject.replay, keys[0])
    else:
        every = jnp.ones(case.seeds, bool)
        of_seeds = seeds.update_all(agent, case.in_turn)
        update = lambda states, replays, keys: of_seeds(states, replays, keys, every)  # noqa: E731
        state = jax.jit(jax.vmap(agent.init))(keys)
        replay = jax.tree.map(lambda x: jnp.stack([x] * case.seeds), subject.replay)
        arguments = (jax.tree.map(jnp.copy, state), replay, keys)
    program = compile_program(update, *arguments, donate=(1,) if case.seeds > 1 else (0, 1))
    return program, arguments, case.seeds * agent.tokens_per_update
