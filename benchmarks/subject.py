"""What is measured: an agent with fresh parameters in front of a replay full of synthetic steps."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax import envs, presets
from twister_jax.agents import make_agent
from twister_jax.agents.base import Agent
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec
from twister_jax.parallel import Devices
from twister_jax.randomness import Purpose, key_for
from twister_jax.replay import store
from twister_jax.replay.store import Replay

_EPISODE = 200


@dataclasses.dataclass
class Subject:
    """An agent, its state and its replay. What donates the last two puts the new ones in their place."""

    config: Config
    spec: EnvSpec
    agent: Agent
    state: Any
    replay: Replay


def make_spec(config: Config) -> EnvSpec:
    """Of the game: then the section `loop` runs the very program that the section `update` compiled."""
    suite, name = envs.resolve(config.game)
    return suite.make(name, config.env, config.seed).spec


def make_subject(config: Config, most_steps: int | None = None, streams: int = 1) -> Subject:
    """An agent and a replay as large as the training loop would allocate, or of `most_steps`, in all."""
    spec = make_spec(config)
    agent = make_agent(config, spec)
    state = jax.jit(agent.init)(key_for(config.seed, Purpose.INIT))
    steps = max(math.ceil(replay_steps(config, agent, most_steps) / streams), agent.min_replay_steps)
    replay = synthetic_replay(spec, steps, streams)
    return Subject(config, spec, agent, state, replay)


def make_shapes(config: Config) -> Subject:
    """What `make_subject` makes, with shapes in place of arrays; computes nothing."""
    spec = make_spec(config)
    agent = make_agent(config, spec)
    streams = config.env.num_envs
    steps = max(math.ceil(replay_steps(config, agent) / streams), agent.min_replay_steps)
    state, replay = jax.eval_shape(
        lambda key: (agent.init(key), store.init(streams, steps, spec.image_shape, spec.num_actions)),
        key_for(config.seed, Purpose.INIT),
    )
    return Subject(config, spec, agent, state, replay)


def trace_update(subject: Subject, devices: Devices) -> Any:
    """The update of a subject, or of its shapes, traced for these devices as the training loop does."""
    agent, key = subject.agent, jax.eval_shape(lambda: jax.random.key(0))
    whole, streams = devices.everywhere, devices.by_env(subject.replay)
    shaped = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (subject.state, subject.replay, key),
        (whole(subject.state), streams, whole(key)),
    )
    update = dataclasses.replace(agent, sample=devices.sampler(agent.sample)).update
    return devices.trace(update, *shaped, donate=(0, 1), out=(whole(key), streams, whole(key)))


def replay_steps(config: Config, agent: Agent, most_steps: int | None = None) -> int:
    """Capacity of the replay that the training loop would allocate, or `most_steps` if that is less."""
    capacity = presets.stored_steps(config)
    return max(capacity if most_steps is None else min(capacity, most_steps), agent.min_replay_steps)


def synthetic_replay(spec: EnvSpec, steps: int, streams: int = 1, seed: int = 0) -> Replay:
    """A full store: noise for frames, random actions and rewards, episodes of 200 steps.

    All streams are alike.
    """
    rng = np.random.default_rng(seed)
    place = np.arange(steps) % _EPISODE
    action = spec.random_actions(rng, steps)
    action[place == 0] = 0.0

    def stored(x: np.ndarray) -> jax.Array:
        # `jnp.array` copies: the store is donated, and must not lie in NumPy's memory.
        return jnp.array(np.broadcast_to(x, (streams, *x.shape)))

    return Replay(
        frames=stored(rng.integers(0, 256, (steps, math.prod(spec.image_shape)), dtype=np.uint8)),
        action=stored(action),
        reward=stored(np.sign(rng.normal(size=steps)).astype(np.float32) * (place != 0)),
        terminal=stored(place == _EPISODE - 1),
        is_first=stored(place == 0),
        visits=jnp.zeros((streams, steps), jnp.int32),
        inserted=jnp.full((), steps, jnp.int32),
        image_shape=spec.image_shape,
    )


def update_keys(config: Config, count: int = 32) -> list[jax.Array]:
    """Keys for updates, made beforehand."""
    return [key_for(config.seed, Purpose.UPDATE, step) for step in range(count)]
