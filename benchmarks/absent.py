"""An update compiled for machines that this host does not have, from shapes alone.

TPUs take `libtpu`, which compiles for them without one (the extra `tpu`). GPUs take JAX's CUDA build (JAX
0.11, the extra `cuda12`); XLA then chooses without trying, and gives matrix products to cuBLAS.
"""

import importlib.util
from typing import Any, NamedTuple

from benchmarks.subject import make_shapes, trace_update
from benchmarks.targets import Target
from twister_jax.config import Config
from twister_jax.errors import UserError
from twister_jax.fields import replace
from twister_jax.parallel import Devices
from twister_jax.runtime import tracing_for

_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
"""What XLA wants to know of a GPU that it cannot ask."""

_WITHOUT_TRYING = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Compiled(NamedTuple):
    """A program of one of several devices that run the same."""

    text: str
    argument_bytes: int
    temp_bytes: int
    """Scratch memory, and results that do not take the place of arguments."""


def compile_update(target: Target, config: Config) -> Compiled:
    """The update of a run with these settings on all chips of the target.

    Raises:
      UserError: what compiles for the target is not installed, or the chips cannot share the batch.
      JaxRuntimeError: the compiler refuses.
    """
    devices_there = _devices(target)
    with tracing_for(target.chip.kind):
        config = replace(config, {"parallel.data": target.count})
        subject = make_shapes(config)
        sizes = subject.agent.shared_sizes
        devices = Devices.choose(target.count, config.env.num_envs, sizes, devices_there)
        lowered = trace_update(subject, devices).lower()
    compiled = lowered.compile(compiler_options=_WITHOUT_TRYING if target.chip.kind == "gpu" else None)
    memory = compiled.memory_analysis()
    left_over = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return Compiled(compiled.as_text(), memory.argument_size_in_bytes, memory.temp_size_in_bytes + left_over)


def _devices(target: Target) -> list[Any]:
    """The chips, as JAX describes them."""
    from jax.experimental import topologies

    needed, extra = ("libtpu", "tpu") if target.chip.kind == "tpu" else ("jax_cuda12_plugin", "cuda12")
    if importlib.util.find_spec(needed) is None:
        raise UserError(
            f"--target {target.name}: needs {needed}: pip install -c constraints.txt 'twister_jax[{extra}]'"
        )
    if target.chip.kind == "gpu":
        described = _HOPPER.format(
            bandwidth=target.chip.bandwidth, memory=target.chip.memory, name=target.chip.device_kind
        )
        shape = f"1x1x{target.count}"
        topology = topologies.get_topology_desc(platform="cuda", target_config=described, topology=shape)
        return list(topology.devices)
    grid = (*target.grid, 1, 1)[:3]
    # A host has 2 × 2 chips; smaller grids are on one that has fewer.
    host = (1, 1, 1) if target.count == 1 else (2, 2, 1)
    if any(size % of_host for size, of_host in zip(grid, host, strict=True)):
        raise UserError(f"--target {target.name}: must be one chip, or even both ways: hosts have 2x2 chips")
    name = f"{target.name.partition(':')[0]}:{'x'.join(map(str, target.grid))}"
    return list(topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=host).devices)
