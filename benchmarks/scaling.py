"""How an update scales over the devices there are: one batch shared by more, and a batch each.

On a CPU the devices are virtual (alone on the command line, this section asks for eight) and share its cores:
times show what sharing costs, not what it brings. Bytes of collectives and memory of each device are those of
the compiled programs, which are the same on real devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import kernels
from benchmarks.bench import Bench
from benchmarks.options import resized
from benchmarks.subject import make_subject, trace_update
from benchmarks.timing import Clock, Times
from twister_jax import presets
from twister_jax.config import Config
from twister_jax.errors import UserError
from twister_jax.fields import replace
from twister_jax.parallel import SEED, Devices
from twister_jax.randomness import Purpose, key_for
from twister_jax.runtime import target
from twister_jax.training import seeds

SECTION = "scaling"
_REPLAY_STEPS = 2_000


def run(bench: Bench) -> None:
    """Powers of two of the devices there are, up to all of them."""
    bench.forget()
    available = jax.device_count()
    counts = [2**n for n in range(available.bit_length()) if 2**n <= available]
    how = "virtual devices that share the cores" if jax.default_backend() == "cpu" else "real devices"
    bench.report.add(SECTION, "devices", available, "", how)
    if available == 1:
        bench.report.add(SECTION, "scaling", None, "s", "one device only; XLA_FLAGS can make more of a CPU")
        return
    batch = bench.config.algorithm.batch_size  # type: ignore[attr-defined]
    one: Times | None = None
    for count in counts:
        times = _measure(bench, f"batch {batch} on {count}", bench.config, count, available)
        one = one or times
        if times and one:
            bench.report.add(SECTION, f"batch {batch} on {count}, speed-up", one.median / times.median, "")
    for count in counts[1:]:
        config = resized(bench.config, {"batch_size": batch * count})
        times = _measure(bench, f"batch {batch} each on {count}", config, count, available)
        if times and one:
            more = times.median / one.median
            bench.report.add(SECTION, f"batch {batch} each on {count}, times one", more, "")
    if not bench.out_of_time:
        _seeds(bench, min(2, available) if bench.options.quick else min(4, available))


def _measure(bench: Bench, name: str, config: Config, count: int, streams: int) -> Times | None:
    """An update on `count` devices, of a replay that has a stream for each device there is."""
    report = bench.report
    try:
        if bench.out_of_time:
            raise UserError("--minutes are over")
        config = resized(replace(config, {"env.num_envs": streams, "parallel.data": count}), {})
        presets.validate(config)
        subject = make_subject(config, _REPLAY_STEPS, streams)
        devices = Devices.choose(count, streams, subject.agent.shared_sizes)
    except UserError as error:
        report.add(SECTION, name, None, "s", f"not measured: {str(error)[:200]}")
        return None
    compiled = trace_update(subject, devices).lower().compile()
    whole, by_stream = devices.everywhere(subject.state), devices.by_env(subject.replay)
    state, replay = jax.device_put((subject.state, subject.replay), (whole, by_stream))
    key = key_for(0, Purpose.UPDATE, 0)
    key = jax.device_put(key, devices.everywhere(key))

    def step(carry: Any) -> Any:
        return compiled(*carry[:2], key)

    times = bench.take(Clock(step, (state, replay, None), bench.fill))
    report.time(SECTION, name, times)
    memory = compiled.memory_analysis()
    report.add(SECTION, f"{name}, scratch memory", memory.temp_size_in_bytes, "B", "each device")
    report.add(SECTION, f"{name}, replay", devices.bytes(subject.replay, by_stream), "B", "each device")
    sent = [each for each in kernels.read(compiled.as_text()) if each.collective]
    for kind in dict.fromkeys(each.collective for each in sent):
        total = sum(each.times * each.sent for each in sent if each.collective == kind)
        number = sum(each.times for each in sent if each.collective == kind)
        report.add(SECTION, f"{name}, {kind}", total, "B", f"{number} of them, each device gives that")
    return times


def _seeds(bench: Bench, count: int) -> None:
    """`count` seeds: each on a device of its own, side by side on one, and in turn on one."""
    for name, devices, in_turn in (
        (f"{count} seeds, a device each", count, target() == "cpu"),
        (f"{count} seeds in turn", 1, True),
        (f"{count} seeds side by side", 1, False),
    ):
        if bench.out_of_time:
            bench.report.add(SECTION, name, None, "s", "not measured: --minutes are over")
            continue
        subject = make_subject(bench.config, _REPLAY_STEPS)
        mesh = jax.make_mesh((devices,), (SEED,), (AxisType.Auto,), devices=jax.devices()[:devices])
        spec = PartitionSpec(SEED)
        update = seeds.update_all(subject.agent, in_turn)
        if devices > 1:
            update = jax.shard_map(update, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        keys = jnp.stack([key_for(seed, Purpose.INIT) for seed in range(count)])
        state = jax.jit(jax.vmap(subject.agent.init))(keys)
        replay = jax.tree.map(lambda x: jnp.stack([x] * count), subject.replay)
        split = NamedSharding(mesh, spec)
        state, replay, keys, active = jax.tree.map(
            lambda x, split=split: jax.device_put(x, split), (state, replay, keys, jnp.ones(count, bool))
        )
        program = jax.jit(update, donate_argnums=1, out_shardings=split)
        compiled = program.lower(state, replay, keys, active).compile()

        def step(carry: Any, compiled: Any = compiled, keys: Any = keys, active: Any = active) -> Any:
            return compiled(*carry[:2], keys, active)

        bench.report.time(SECTION, name, bench.take(Clock(step, (state, replay, None), bench.fill)))
        memory = compiled.memory_analysis()
        if memory is not None:
            scratch = memory.temp_size_in_bytes
            bench.report.add(SECTION, f"{name}, scratch memory", scratch, "B", "each device")
