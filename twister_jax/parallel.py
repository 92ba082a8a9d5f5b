"""Devices: a mesh, and where every array of a run lies on it.

Along the axis `data` the batch of an update is split, and the environments with their streams of replay;
parameters are on every device, and XLA sums the gradients. Contrastive negatives, quantiles of returns and
restarts are taken over the whole batch, so an update computes what one device would, up to rounding. Along
the axis `seed` lie independent runs.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from twister_jax.errors import UserError

SEED, DATA = "seed", "data"

Sample = Callable[..., tuple[Any, Any]]
"""(replay, key, shards) -> (batch, replay); see `agents.base.Learner`."""


def split(tree: Any) -> Any:
    """Inside a compiled function: splits the leading axis of every array over the devices of a run.

    Without it, every device would repeat the computation of what was gathered from the whole batch. Does
    nothing on a single device.
    """
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(DATA)) if devices_in_use() > 1 else tree


def whole(tree: Any) -> Any:
    """Inside a compiled function: gives every device of a run all of every array.

    For few numbers of which all are read one after the other, as a cumulative sum does: over pieces on
    several devices it would be a round of messages for each doubling. Does nothing where there is one device.
    """
    return jax.lax.with_sharding_constraint(tree, PartitionSpec()) if devices_in_use() > 1 else tree


def devices_in_use() -> int:
    """How many devices share the batch of what is being traced."""
    return jax.sharding.get_abstract_mesh().shape.get(DATA, 1)


def on_shares(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, computed by every device for its share of the first argument's leading axis.

    For code that must see one device's share as a plain array, such as a loop over pieces of a batch.
    """
    if devices_in_use() == 1:
        return function(*args)

    def on_share(first: Any, *shared: Any) -> Any:
        # Each device makes a gradient of its own of what they share; said like this, JAX adds them up.
        return function(first, *jax.lax.pcast(shared, DATA, to="varying"))

    specs = (PartitionSpec(DATA), *(PartitionSpec() for _ in args[1:]))
    return jax.shard_map(on_share, in_specs=specs, out_specs=PartitionSpec(DATA))(*args)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of one run, along the axis `data`.

    Attributes:
      mesh: of them.
      split_streams: whether each has the streams of its own environments; else, with one environment, each
        has a copy of its stream.
    """

    mesh: Mesh
    split_streams: bool

    @classmethod
    def choose(
        cls,
        count: int,
        num_envs: int,
        sizes: Mapping[str, int] | None = None,
        available: Sequence[Any] | None = None,
    ) -> "Devices":
        """The first `count` devices.

        Args:
          count: how many.
          num_envs: environments, each with a stream of the replay.
          sizes: settings that the devices share among them, by name.
          available: devices to choose from; those of this machine by default.

        Raises:
          UserError: there are fewer devices, or they cannot share evenly.
        """
        available = jax.devices() if available is None else available
        if count > len(available):
            more = (
                f"; XLA_FLAGS=--xla_force_host_platform_device_count={count} makes virtual ones"
                if available[0].platform == "cpu"
                else ""
            )
            raise UserError(
                f"parallel.data = {count}: must be at most {len(available)}, the devices there are{more}"
            )
        shared = {"env.num_envs": num_envs} if num_envs > 1 else {}
        for name, value in (shared | dict(sizes or {})).items():
            if value % count:
                raise UserError(
                    f"{name} = {value}: must be a multiple of parallel.data = {count}; "
                    f"{_neighbours(value, count)} would do"
                )
        axes = (AxisType.Auto,)
        return cls(jax.make_mesh((count,), (DATA,), axes, devices=available[:count]), num_envs > 1)

    @property
    def count(self) -> int:
        """How many."""
        return self.mesh.shape[DATA]

    # ------------------------------------------------------------------------------ where arrays lie

    def everywhere(self, tree: Any) -> Any:
        """Shardings that put a copy of every array on every device."""
        return jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), tree)

    def by_env(self, tree: Any) -> Any:
        """Shardings that split every array along its leading axis, the environment; scalars are copied."""
        axis = DATA if self.split_streams else None
        return jax.tree.map(
            lambda x: NamedSharding(self.mesh, PartitionSpec(axis) if x.ndim else PartitionSpec()), tree
        )

    def put(self, tree: Any, shardings: Any) -> Any:
        """Copies arrays of the host there."""
        if self.count == 1:
            return jax.tree.map(jnp.array, tree)
        return jax.tree.map(lambda x, s: jax.make_array_from_process_local_data(s, x), tree, shardings)

    def spread(self, tree: Any, shardings: Any) -> Any:
        """Distributes arrays that this host holds completely: every device gets its part."""
        if self.count == 1:
            return tree

        def place(x: Any, sharding: NamedSharding) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(place, tree, shardings)

    def gathered(self, tree: Any) -> Any:
        """Copies of all arrays on every device; all processes must call it."""
        return jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)

    def shaped(self, tree: Any, shardings: Any) -> Any:
        """Shapes of arrays that lie so, to trace a function for them."""
        if self.count == 1:
            return tree
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def local(self, tree: Any) -> Any:
        """The part of every array, or of every shape, that the first device of this process holds."""

        def first(x: Any) -> Any:
            if isinstance(x, jax.Array):
                return x.addressable_data(0)
            return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

        return tree if self.count == 1 else jax.tree.map(first, tree)

    def bytes(self, tree: Any, shardings: Any) -> int:
        """Memory that arrays, or their shapes, take on each device."""
        sizes = jax.tree.map(
            lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
        )
        return sum(jax.tree.leaves(sizes))

    # -------------------------------------------------------------------------------- what they compute

    def sampler(self, sample: Sample) -> Sample:
        """`sample`, sharded: every device draws its share of the batch from the replay that it holds.

        The share is drawn from the device's own streams. Where all have the same stream, all draw the same
        batch, that of a single device, and each gathers its part. No frame goes from one device to another.
        """
        if self.count == 1:
            return sample

        def draw(replay: Any, key: Any) -> tuple[Any, Any]:
            here = jax.lax.axis_index(DATA)
            if self.split_streams:
                batch, replay = sample(replay, jax.random.fold_in(key, here), self.count)
                mean = lambda x: x if x.ndim else jax.lax.pmean(x, DATA)  # noqa: E731
                return jax.tree.map(mean, batch), replay
            batch, replay = sample(replay, key, 1)

            def part(x: Any) -> Any:
                share = x.shape[0] // self.count if x.ndim else 0
                return jax.lax.dynamic_slice_in_dim(x, here * share, share) if x.ndim else x

            return jax.tree.map(part, batch), replay

        def sample_shares(replay: Any, key: Any, shards: int = 1) -> tuple[Any, Any]:
            assert shards == 1
            spec = lambda x, axis=DATA: PartitionSpec(axis) if x.ndim else PartitionSpec()  # noqa: E731
            streams = jax.tree.map(lambda x: spec(x, DATA if self.split_streams else None), replay)
            batch = jax.tree.map(spec, jax.eval_shape(lambda: sample(replay, key, 1))[0])
            shared = jax.shard_map(
                draw, mesh=self.mesh, in_specs=(streams, PartitionSpec()), out_specs=(batch, streams)
            )
            return shared(replay, key)

        return sample_shares

    def jit(self, function: Callable[..., Any], out: Any, donate: tuple[int, ...] = ()) -> Any:
        """`jax.jit`; `out` are the shardings of what the function returns."""
        return jax.jit(function, donate_argnums=donate, out_shardings=None if self.count == 1 else out)

    def trace(self, function: Callable[..., Any], *args: Any, out: Any, donate: tuple[int, ...] = ()) -> Any:
        """`function` traced for arguments of these shapes; `out_info` has the shapes that it returns."""
        with self.tracing():
            return self.jit(function, out, donate).trace(*args)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Inside, `split` splits over these devices."""
        with jax.set_mesh(self.mesh) if self.count > 1 else contextlib.nullcontext():
            yield


def _neighbours(value: int, count: int) -> str:
    """The multiples of `count` next to `value`, for a message."""
    below = value // count * count
    return " or ".join(str(each) for each in (below, below + count) if each)
