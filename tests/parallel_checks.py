"""Run with several virtual devices: `python -m tests.parallel_checks COUNT AGENT TARGET` prints JSON.

What an update computes on one device and on several, and what passes between devices.
"""

import dataclasses
import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests import conftest
from tests.agents.twm.conftest import CONFIG as SMALL_TWM
from tests.agents.twm.conftest import GREY
from twister_jax.agents import make_agent
from twister_jax.parallel import DATA, Devices
from twister_jax.runtime import tracing_for

_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
BATCH, STREAMS = 8, 8
SIZES = {
    "twister": (conftest.SMALL, conftest.SPEC, {"batch_size": BATCH}),
    "twm": (SMALL_TWM, GREY, {"batch_size": BATCH, "imagination_batch": BATCH, "restart_frames": BATCH}),
}


def collectives(text: str) -> list[list[Any]]:
    """Kind and shapes of whatever passes between devices in a compiled program."""
    found = [[m.group(2), re.findall(r"\w+\[[\d,]*\]", m.group(1))] for m in _COLLECTIVE.finditer(text)]
    return sorted(found)


def largest_differences(one: Any, many: Any) -> dict[str, float]:
    """Of every leaf, relative to the largest number in its tree of parameters, moments or metrics."""
    named = jax.tree_util.tree_leaves_with_path(one)
    groups: dict[str, float] = {}
    for path, leaf in named:
        group = _group(path)
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating):
            groups[group] = max(groups.get(group, 0.0), float(jnp.max(jnp.abs(leaf))))
    differences = {}
    for (path, leaf), other in zip(named, jax.tree.leaves(many), strict=True):
        if not leaf.size or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        gap = np.max(np.abs(np.asarray(leaf, np.float64) - np.asarray(other, np.float64)))
        differences[jax.tree_util.keystr(path)] = float(gap) / (groups.get(_group(path)) or 1.0)
    return differences


def _group(path: Any) -> str:
    """Everything of one network's parameters or of one of its moments; other leaves are by themselves."""
    name = jax.tree_util.keystr(path)
    found = re.match(r".*?(params\['\w+'\]|optimizers\['\w+'\].*?\.(mu|nu)|slow_critic)", name)
    return found.group() if found else name


def check(count: int, kind: str, target: str) -> dict[str, Any]:
    config, spec, sizes = SIZES[kind]
    config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, **sizes))
    # To compile; what is computed is the same.
    fast = conftest.QUICK if conftest.CAN_BE_QUICK else {"xla_backend_optimization_level": 0}

    def compiled(function, *args, **options):
        return jax.jit(function, **options).lower(*args).compile(compiler_options=fast)

    with tracing_for(target):
        agent = make_agent(config, spec)
        key = jax.random.key(2)
        state = compiled(agent.init, jax.random.key(0))(jax.random.key(0))
        replay = conftest.filled_replay(40, STREAMS, spec=spec)
        batch, _ = compiled(agent.sample, replay, jax.random.key(1))(replay, jax.random.key(1))
        one = compiled(agent.learn, state, batch, key)(state, batch, key)

        devices = Devices.choose(count, STREAMS, agent.shared_sizes)
        whole = NamedSharding(devices.mesh, PartitionSpec())
        shares = lambda tree: jax.tree.map(  # noqa: E731
            lambda x: NamedSharding(devices.mesh, PartitionSpec(DATA)) if x.ndim else whole, tree
        )
        args = (jax.device_put(state, whole), jax.device_put(batch, shares(batch)), key)
        with devices.tracing():
            program = compiled(agent.learn, *args, out_shardings=whole)
        many = program(*args)

        split = jax.device_put(replay, devices.by_env(replay))
        sample = devices.sampler(agent.sample)
        sampling = compiled(sample, split, key, donate_argnums=0)
        drawn, after = sampling(split, key)
        alone = Devices.choose(count, 1, agent.shared_sizes)
        stream = conftest.filled_replay(40, 1, spec=spec)
        copied = jax.device_put(stream, alone.by_env(stream))
        same, _ = jax.jit(alone.sampler(agent.sample))(copied, key)
        expected, _ = jax.jit(agent.sample)(stream, key)
    return {
        "differences": largest_differences(one, many),
        "learn": collectives(program.as_text()),
        "learn, in loops": collectives(program.as_text().partition("\nENTRY ")[0]),
        "sample": collectives(sampling.as_text()),
        "in place": sampling.memory_analysis().alias_size_in_bytes >= after.frames.nbytes / count,
        "replay per device": [shard.data.nbytes for shard in after.frames.addressable_shards],
        "replay": after.frames.nbytes,
        "visits": np.asarray(after.visits).sum(1).tolist(),
        "from own streams": _from_own_streams(drawn, replay, count),
        "one stream as one device": all(
            np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (same, expected)), strict=True)
        ),
    }


def _from_own_streams(batch: Any, replay: Any, count: int) -> bool:
    """Whether all rewards that a device drew are of its own streams."""
    plain = hasattr(batch, "image")
    rewards = np.asarray((batch if plain else batch.windows).reward)
    stored = np.asarray(replay.reward if plain else jnp.tanh(replay.reward))
    shares, streams = np.split(rewards, count), np.split(stored, count)
    return all(
        np.isclose(share.reshape(-1, 1), own.reshape(-1), atol=1e-6).any(1).all()
        for share, own in zip(shares, streams, strict=True)
    )


if __name__ == "__main__":
    print(json.dumps(check(int(sys.argv[1]), *sys.argv[2:])))
