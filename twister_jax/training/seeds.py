"""What a run computes, for several seeds at once: every array has a leading axis, the seed.

`active` says which seeds take part in a call. The others keep what they had.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from twister_jax.agents.base import Agent, Learner
from twister_jax.replay import store
from twister_jax.replay.store import Replay, Transition
from twister_jax.training.logs import Averages

Active = Bool[Array, " seed"]


def _where(active: Active, new: Any, old: Any) -> Any:
    """`new` where a seed takes part."""
    return jax.tree.map(lambda x, y: jnp.where(active.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, old)


def act_all(agent: Agent) -> Callable[..., Any]:
    def act(states: Any, carries: Any, observations: Any, keys: Any, active: Active) -> Any:
        actions, after = jax.vmap(agent.act)(states, carries, observations, keys)
        return actions, _where(active, after, carries)

    return act


def took_all(agent: Agent) -> Callable[..., Any]:
    def took(carries: Any, actions: Any, active: Active) -> Any:
        return _where(active, jax.vmap(agent.took)(carries, actions), carries)

    return took


def update_all(learner: Learner, in_turn: bool) -> Callable[..., Any]:
    """An update of those seeds that take part, side by side or in turn.

    In turn it needs the scratch memory of one update, and is the choice where one update fills the device.
    Donate the replays but not the states: XLA's CPU backend copies donated states.
    """

    def update(states: Any, replays: Replay, keys: Any, active: Active) -> Any:
        keys_sample, keys_learn = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        batches, drawn = jax.vmap(learner.sample)(replays, keys_sample)
        replays = dataclasses.replace(drawn, visits=_where(active, drawn.visits, replays.visits))
        if not in_turn:
            new, metrics = jax.vmap(learner.learn)(states, batches, keys_learn)
            return _where(active, new, states), replays, metrics
        _, shapes = jax.eval_shape(
            learner.learn, *jax.tree.map(lambda x: x[0], (states, batches, keys_learn))
        )
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def one(args: Any) -> Any:
            state, batch, key, takes_part = args
            return jax.lax.cond(takes_part, learner.learn, lambda *_: (state, nothing), state, batch, key)

        states, metrics = jax.lax.map(one, (states, batches, keys_learn, active))
        return states, replays, metrics

    return update


def add_all(averages: Averages, metrics: Any, active: Active) -> Averages:
    return _where(active, jax.vmap(Averages.add)(averages, metrics), averages)


def insert_all(replays: Replay, steps: Transition, active: Active) -> Replay:
    """Each seed's step goes into its own store; where it has none, what lies there is written again."""

    def one(replay: Replay, step: Transition, takes_part: Any) -> Replay:
        slot = replay.inserted % replay.capacity
        there = {
            name: jax.lax.dynamic_index_in_dim(getattr(replay, name), slot, axis=1, keepdims=False)
            for name in ("frames", "action", "reward", "terminal", "is_first")
        }
        image = there.pop("frames").reshape(step.image.shape)
        step = jax.tree.map(lambda x, y: jnp.where(takes_part, x, y), step, Transition(image=image, **there))
        visits = replay.visits
        after = store.insert(replay, step)
        return dataclasses.replace(
            after,
            visits=jnp.where(takes_part, after.visits, visits),
            inserted=replay.inserted + takes_part,
        )

    return jax.vmap(one)(replays, steps, active)
