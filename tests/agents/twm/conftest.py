"""Small sizes, and streams of steps as an environment gives them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twister_jax.agents.twm.agent import Twm
from twister_jax.agents.twm.config import TwmConfig, TwmModelConfig
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.networks import Networks
from twister_jax.presets import make_config
from twister_jax.replay import store
from twister_jax.replay.store import Replay

GREY = EnvSpec(image_shape=(64, 64, 1), num_actions=3)

MODEL = TwmModelConfig(
    cnn_channels=2,
    encoder_hidden=(16,),
    stoch_groups=3,
    stoch_classes=4,
    hidden_size=16,
    transformer_layers=2,
    attention_heads=2,
    head_size=8,
    feedforward_size=24,
    memory_steps=2,
    latent_head=(16,),
    reward_head=(8,),
    discount_head=(8,),
    actor=(16,),
    critic=(16,),
)
ALGORITHM = TwmConfig(
    batch_size=3,
    batch_length=4,
    imagination_batch=5,
    imagination_horizon=4,
    restart_frames=2,
    model=MODEL,
    pretrain_observation_samples=24,
    pretrain_dynamics_samples=12,
    pretrain_behavior_samples=20,
)
CONFIG = dataclasses.replace(
    make_config("twm", "debug", "Catch", precision="float32"),
    algorithm=dataclasses.replace(ALGORITHM, model=dataclasses.replace(MODEL, transformer_layers=1)),
)


def stream(count: int, seed: int) -> dict[str, np.ndarray]:
    """Steps of well-formed episodes of 1 to 6 actions, some ended by the game, some by a time limit."""
    rng = np.random.default_rng(seed)
    steps: dict[str, list[Any]] = {name: [] for name in ("frame", "action", "reward", "terminal", "first")}
    while len(steps["frame"]) < count:
        actions = int(rng.integers(1, 7))
        ends_in_terminal = bool(rng.random() < 0.6)
        for index in range(actions + 1):
            first = index == 0
            steps["frame"].append(rng.integers(0, 256, 64 * 64, dtype=np.uint8))
            steps["action"].append(np.eye(3, dtype=np.float32)[rng.integers(3)] * (not first))
            steps["reward"].append(np.float32(0.0 if first else rng.normal()))
            steps["terminal"].append(ends_in_terminal and index == actions)
            steps["first"].append(first)
    return {name: np.stack(values)[:count] for name, values in steps.items()}


def replay_of(streams: list[dict[str, np.ndarray]], capacity: int) -> Replay:
    """A store after these streams were inserted step by step (older steps drop out when it is full)."""
    count = len(streams[0]["frame"])
    empty = store.init(len(streams), capacity, GREY.image_shape, GREY.num_actions)
    slots = np.arange(max(0, count - capacity), count)

    def put(rows: jax.Array, name: str) -> jax.Array:
        filled = np.array(rows)
        for index, one in enumerate(streams):
            filled[index, slots % capacity] = one[name][slots]
        return jnp.asarray(filled)

    return empty.replace(
        frames=put(empty.frames, "frame"),
        action=put(empty.action, "action"),
        reward=put(empty.reward, "reward"),
        terminal=put(empty.terminal, "terminal"),
        is_first=put(empty.is_first, "first"),
        inserted=jnp.asarray(count, jnp.int32),
    )


@pytest.fixture(scope="session")
def filled() -> Replay:
    """Two streams of 60 steps."""
    return replay_of([stream(60, 0), stream(60, 1)], 64)


@pytest.fixture(scope="session")
def networks() -> Networks:
    return Twm(ALGORITHM, GREY, jnp.float32).networks


@pytest.fixture(scope="session")
def params(networks: Networks) -> dict[str, Any]:
    """Random parameters, none of them zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), shapes)
