"""What all tests share: small sizes, and programs compiled once."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twister_jax import replay
from twister_jax.__main__ import keep_compiled_programs
from twister_jax.agent import Agent, Transition
from twister_jax.config import Config, TwisterConfig, TwisterModelConfig
from twister_jax.envs.base import EnvSpec
from twister_jax.twister.agent import make_agent

SPEC = EnvSpec(image_shape=(64, 64, 3), num_actions=4)

SMALL_MODEL = TwisterModelConfig(
    hidden_size=16,
    cnn_channels=2,
    stoch_groups=4,
    stoch_classes=5,
    transformer_blocks=2,
    attention_heads=2,
    attention_context=3,
    contrastive_steps=3,
    contrastive_size=8,
)
SMALL = Config(
    precision="float32",
    algorithm=TwisterConfig(batch_size=3, batch_length=6, imagination_horizon=4, model=SMALL_MODEL),
)


def random_steps(count: int, streams: int = 1, seed: int = 0, spec: EnvSpec = SPEC) -> Transition:
    """Steps [count, stream, ...] with episodes a few steps long."""
    rng = np.random.default_rng(seed)
    shape = (count, streams)
    is_first = rng.random(shape) < 0.2
    action = np.eye(spec.num_actions, dtype=np.float32)[rng.integers(spec.num_actions, size=shape)]
    return Transition(
        image=rng.integers(0, 256, (*shape, *spec.image_shape), dtype=np.uint8),
        action=np.where(is_first[..., None], 0, action).astype(np.float32),
        reward=rng.normal(size=shape).astype(np.float32),
        terminal=(rng.random(shape) < 0.1) & ~is_first,
        is_first=is_first,
    )


def filled_replay(count: int = 40, streams: int = 2, seed: int = 0, spec: EnvSpec = SPEC) -> replay.Replay:
    """A store holding random steps."""
    store = replay.init(streams, count, spec.image_shape, spec.num_actions)
    insert = jax.jit(replay.insert, donate_argnums=0)
    steps = random_steps(count, streams, seed, spec)
    for index in range(count):
        store = insert(store, jax.tree.map(lambda x, i=index: jnp.asarray(x[i]), steps))
    return store


@dataclasses.dataclass
class Compiled:
    """A small agent with its functions compiled."""

    config: Config
    agent: Agent
    state: Any
    update: Any
    act: Any


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Many tests compile the same programs, here and in subprocesses; one compilation of each is enough."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of all workers
    os.environ["TWISTER_JAX_CACHE"] = str(base / "xla")
    keep_compiled_programs(jax.default_backend())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def small() -> Compiled:
    """Do not donate or change its state."""
    agent = make_agent(SMALL, SPEC)
    state = jax.jit(agent.init)(jax.random.key(0))
    return Compiled(SMALL, agent, state, jax.jit(agent.update), jax.jit(agent.act))
