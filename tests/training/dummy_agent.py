"""An agent that keeps the contract and learns nothing worth having, in milliseconds.

Run as a program it trains one: `python dummy_agent.py LOGDIR STEPS [field=value ...]`.
"""

import dataclasses
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp

from twister_jax import replay as replays
from twister_jax.agent import Agent, Health, Pretraining
from twister_jax.config import EvaluationConfig, TrainConfig, make_config, replace
from twister_jax.envs import make_vector_env

WINDOW = 8


PHASES = (("warm_up", 30), ("second", 20))


def make_agent(config, spec, *, bad_from=None, bad_until=10**9, phases=PHASES, work=0):
    """`bad_from`: first update with a non-finite loss. `work`: products of matrices per update."""

    def init(key):
        return {
            "w": jax.random.normal(key, (spec.num_actions, 16)),
            "updates": jnp.zeros((), jnp.int32),
            "health": Health.sound(),
        }

    def init_carry(state, num_envs):
        return {"memory": jnp.zeros((num_envs, 16))}

    def act(state, carry, observation, key, sample=True):
        seen = jnp.mean(observation.image / 255.0, (1, 2, 3))[:, None] * jnp.ones(16)
        memory = jnp.where(observation.is_first[:, None], 0.0, carry["memory"]) * 0.5 + seen
        logits = memory @ state["w"].T
        choice = jax.random.categorical(key, logits) if sample else jnp.argmax(logits, -1)
        return jax.nn.one_hot(choice, spec.num_actions), {"memory": memory}

    def sample(replay, key):
        return replays.sample(replay, key, 4, WINDOW), replay

    def learn(state, windows, key, scale=1.0):
        image = jnp.mean(windows.image / 255.0)
        noise = jax.random.normal(key, state["w"].shape)
        loss = jnp.mean(state["w"] ** 2) + image + jnp.mean(windows.reward)
        bad = jnp.zeros((), bool)
        if bad_from is not None:
            bad = (state["updates"] >= bad_from) & (state["updates"] < bad_until)
            loss = jnp.where(bad, jnp.nan, loss)
        busy = jnp.ones((256, 256)) * image
        busy = jax.lax.fori_loop(0, work, lambda _, x: x @ x / 256.0, busy)
        w = state["w"] * 0.99 + scale * 0.01 * (noise + image) + 0.0 * busy[0, 0]
        state = {
            "w": jnp.where(bad, state["w"], w),
            "updates": state["updates"] + 1,
            "health": state["health"].record(jnp.stack([jnp.zeros((), bool), bad])),
        }
        return state, {"losses/image": image, "losses/weights": loss, "drawn": noise[0, 0]}

    def warm_up(state, replay, key):
        windows, replay = sample(replay, key)
        state, metrics = learn(state, windows, key, scale=2.0)
        return state, replay, metrics

    def report(state, replay, key):
        return {"frame": replays.sample(replay, key, 1, 1).image[0, 0]}

    return Agent(
        init=init,
        init_carry=init_carry,
        act=act,
        act_evaluate=partial(act, sample=False),
        sample=sample,
        learn=learn,
        report=report,
        loss_names=("image", "weights"),
        health=lambda state: state["health"],
        min_replay_steps=WINDOW,
        tokens_per_update=4 * WINDOW,
        pretraining=tuple(Pretraining(name, count, warm_up) for name, count in phases),
    )


def make_test_config(logdir, steps=120, **overrides):
    base = make_config("twister", "debug", game="Catch")
    base = dataclasses.replace(
        base,
        logdir=str(logdir),
        precision="float32",
        train=TrainConfig(
            steps=steps,
            prefill_steps=20,
            updates_per_step=0.7,
            log_every=7,
            report_every=40,
            checkpoint_every=25,
        ),
        evaluation=EvaluationConfig(episodes=5, num_envs=2),
    )
    return replace(base, overrides)


if __name__ == "__main__":
    from twister_jax.__main__ import exit_with, start_jax
    from twister_jax.training.loop import train

    fields = {name: json.loads(value) for name, value in (each.split("=") for each in sys.argv[3:])}
    work = fields.pop("work", 0)
    start_jax()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = make_test_config(sys.argv[1], int(sys.argv[2]), **fields)
    exit_with(train(config, partial(make_agent, work=work), make_vector_env))
