"""How many kernels a GPU is given in an update: each costs some microseconds, however little it does.

A call of a library counts once, whatever it launches; what XLA puts into one CUDA graph costs less each.
On a GPU the update that is measured is counted. On a CPU the update is compiled for an absent GPU, which
takes JAX's CUDA build (JAX 0.11, `pip install 'jax[cuda12]'`) and `JAX_PLATFORMS=cpu`. XLA then chooses
without trying, and gives matrix products to cuBLAS; numbers of the two kinds are not to be compared.
"""

import collections
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from benchmarks import programs
from benchmarks.bench import Bench
from benchmarks.subject import make_shapes
from twister_jax.config import Config
from twister_jax.fields import replace
from twister_jax.runtime import tracing_for

SECTION = "launches"
TOP = 12

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""
"""What XLA wants to know of a GPU that it cannot ask."""

_WITHOUT_TRYING: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Launch(NamedTuple):
    """An instruction that becomes a kernel."""

    name: str
    kind: str
    """Of a fusion what makes it: kLoop, kInput (sums and transpositions), triton; of a call its target."""
    times: int
    """That an update runs it."""
    loop: str
    """The innermost loop that it is in, or nothing."""


def run(bench: Bench) -> None:
    """The number, how it is made up, and the lines of ours that most of them come from."""
    report = bench.report
    if jax.default_backend() not in ("cpu", "gpu"):
        report.add(SECTION, "kernels", None, "", f"of GPUs only, not of a {jax.default_backend()}")
        return
    if jax.default_backend() == "cpu":
        precision = bench.options.precision if bench.options.precision != "auto" else "bfloat16"
        try:
            compiled = compile_for_absent_gpu(replace(bench.config, {"precision": precision}))
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            note = f"not counted: {' '.join(str(error).split())[:120]}; see benchmarks/launches.py"
            report.add(SECTION, "kernels", None, "", note)
            return
        text, note = compiled.as_text(), f"compiled for an absent H200, {precision}"
        memory = compiled.memory_analysis().temp_size_in_bytes
        report.add(SECTION, "temporary memory", memory, "B", "as the compiler plans it")
    else:
        text, note = bench.compile_update().text(), "the measured program"

    launches = count(text)
    sources, loops, kinds, lines = (
        programs.source_lines(text),
        *(collections.Counter[str]() for _ in range(3)),
    )
    for each in launches:
        kinds[each.kind] += each.times
        lines[sources.get(each.name, "no line of ours").removeprefix("<- ")] += each.times
        if each.loop:
            loops[each.loop] += each.times
    report.add(SECTION, "kernels", sum(each.times for each in launches), "", note)
    for loop, total in loops.most_common():
        report.add(SECTION, f"in {loop}", total, "", "all its rounds")
    for counted, what in ((kinds, "by what they are"), (lines, "by the line they come from")):
        for name, total in counted.most_common(TOP):
            report.add(SECTION, name[:44], total, "", what)


def compile_for_absent_gpu(config: Config) -> Any:
    """An update compiled for `H200`.

    Raises:
      NotImplementedError: JAX has no CUDA build here, or was not told to use the CPU.
      JaxRuntimeError: XLA cannot compile it without trying.
    """
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    with tracing_for("gpu"):
        subject = make_shapes(config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            (subject.state, subject.replay, key),
        )
        lowered = jax.jit(subject.agent.update, donate_argnums=(0, 1)).lower(*arguments)
    return lowered.compile(compiler_options=_WITHOUT_TRYING)


def count(text: str) -> list[Launch]:
    """Every instruction of a compiled GPU program that becomes a kernel.

    Of a conditional the branch with most kernels counts.

    Raises:
      ValueError: the text is not such a program, or does not say how often a loop goes round.
    """
    entry, computations = programs.computations(text)

    def walk(computation: str, times: int, loop: str) -> list[Launch]:
        if computation not in computations:
            raise ValueError(f"no computation {computation!r} in the compiled program")
        launches: list[Launch] = []
        for line in computations[computation]:
            name, operation = programs.name_of(line), programs.operation_of(line)
            if operation == "while":
                rounds = re.search(r"known_trip_count\D*(\d+)", line)
                if rounds is None:
                    raise ValueError(f"the compiled program does not say how often {name} goes round")
                launches += walk(programs.called(line, "body")[0], times * int(rounds[1]), name)
            elif operation == "conditional":
                branches = programs.called(line, "branch_computations|true_computation|false_computation")
                made = [walk(branch, times, loop) for branch in branches]
                launches += max(made, key=lambda each: sum(launch.times for launch in each))
            elif operation in ("call", "async-start"):
                for inner in programs.called(line, "to_apply|calls"):
                    launches += walk(inner, times, loop)
            elif operation not in _NOTHING and not operation.endswith(("-done", "-update")):
                launches.append(Launch(name, _kind(operation, line), times, loop))
        return launches

    return walk(entry, 1, "")


_NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "opt-barrier", "domain"}
_NOTHING |= {"after-all", "add-dependency", "partition-id", "replica-id"}


def _kind(operation: str, line: str) -> str:
    if operation.startswith("custom-call"):
        found = re.search(r'custom_call_target="([^"]*)"', line)
        return f"call {found[1]}" if found else operation
    if operation.startswith("fusion"):
        found = re.search(r'"kind":"__(\w+)"', line) or re.search(r"kind=(\w+)", line)
        return f"fusion {found[1]}" if found else operation
    return operation
