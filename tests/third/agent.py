"""The functions of the third agent."""

from functools import partial

import jax
import jax.numpy as jnp

from tests.third import MinimalConfig
from twister_jax.agents.base import Agent, Dream, Glimpse, Health, Pretraining
from twister_jax.replay import store


def make_agent(config, spec):
    algorithm = config.algorithm
    assert isinstance(algorithm, MinimalConfig)

    def init(key):
        return {
            "w": jax.random.normal(key, (spec.num_actions, 16)),
            "updates": jnp.zeros((), jnp.int32),
            "health": Health.sound(("image", "weights")),
        }

    def init_carry(state, num_envs):
        return {"memory": jnp.zeros((num_envs, 16)), "action": jnp.zeros((num_envs, spec.num_actions))}

    def act(state, carry, observation, key, sample=True):
        seen = jnp.mean(observation.image / 255.0, (1, 2, 3))[:, None] * jnp.ones(16)
        if algorithm.reads_reward:
            seen = seen + observation.reward[:, None]
        before = carry["memory"] + carry["action"] @ jnp.arange(1.0, spec.num_actions + 1)[:, None]
        memory = jnp.where(observation.is_first[:, None], 0.0, before) * 0.5 + seen
        logits = memory @ state["w"].T
        if not spec.discrete:
            noise = jax.random.normal(key, logits.shape) if sample else 0.0
            action = jnp.tanh(logits) + noise
        else:
            choice = jax.random.categorical(key, logits) if sample else jnp.argmax(logits, -1)
            action = jax.nn.one_hot(choice, spec.num_actions)
        return action, {"memory": memory, "action": action}

    def took(carry, action):
        return carry | {"action": action}

    def sample(replay, key, shards=1):
        return store.sample(replay, key, algorithm.batch_size // shards, algorithm.batch_length), replay

    def learn(state, windows, key, scale=1.0):
        image = jnp.mean(windows.image / 255.0)
        noise = jax.random.normal(key, state["w"].shape)
        loss = jnp.mean(state["w"] ** 2) + image + jnp.mean(windows.reward)
        updates = state["updates"]
        bad = (algorithm.bad_from > 0) & (updates >= algorithm.bad_from) & (updates < algorithm.bad_until)
        loss = jnp.where(bad, jnp.nan, loss)
        busy = jnp.ones((256, 256)) * image
        with jax.named_scope("work"):
            busy = jax.lax.fori_loop(0, algorithm.work, lambda _, x: x @ x / 256.0, busy)
        w = state["w"] * 0.99 + scale * 0.01 * (noise + image) + 0.0 * busy[0, 0]
        finite = {"image": jnp.isfinite(image), "weights": jnp.isfinite(loss)}
        state = {
            "w": jnp.where(bad, state["w"], w),
            "updates": updates + 1,
            "health": state["health"].record(finite),
        }
        return state, {"losses/image": image, "losses/weights": loss, "drawn": noise[0, 0]}

    def report(state, replay, key):
        return {"frame": store.sample(replay, key, 1, 1).image[0, 0]}

    # Its world model expects that all stays as it was last seen, and that every action is worth its share.
    def begin(state, num_envs):
        return {"image": jnp.zeros((num_envs, *spec.image_shape)), "reward": jnp.zeros(num_envs)}

    def observe(state, mind, step, key):
        return {"image": step.image / 255.0, "reward": step.reward}

    def imagine(state, mind, action, key):
        return mind | {"reward": jnp.mean(action, -1)}

    def look(state, mind):
        return Glimpse(mind["image"], mind["reward"], jnp.full_like(mind["reward"], 0.9), mind["reward"] + 1)

    def policy(state, mind, key):
        return jnp.broadcast_to(jax.nn.one_hot(0, spec.num_actions), (len(mind["reward"]), spec.num_actions))

    phases = (("warm_up", algorithm.warm_up), ("second", algorithm.second))
    return Agent(
        init=init,
        init_carry=init_carry,
        act=act,
        took=took,
        act_evaluate=partial(act, sample=config.evaluation.sample_actions),
        sample=sample,
        learn=learn,
        report=report,
        health=lambda state: state["health"],
        shared_sizes={"algorithm.batch_size": algorithm.batch_size},
        min_replay_steps=algorithm.batch_length,
        tokens_per_update=algorithm.batch_size * algorithm.batch_length,
        reads_reward=algorithm.reads_reward,
        headline="losses/image",
        parts=("sample", "work"),
        dream=Dream(begin, observe, imagine, look, policy, lambda reward: reward),
        pretraining=tuple(
            Pretraining(sample, partial(learn, scale=2.0), name, count) for name, count in phases if count
        ),
    )
