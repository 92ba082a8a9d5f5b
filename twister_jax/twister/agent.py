"""TWISTER as one agent: init, act, sample, learn. `learn` reads like the paper's algorithm 1."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from twister_jax import replay as replay_store
from twister_jax.agent import Agent, Health, Metrics, Observation, Transition, compute_dtype, guard
from twister_jax.config import Config, TwisterConfig
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.distributions import KeySampler
from twister_jax.nn.networks import Networks, Params
from twister_jax.nn.transformer import Ring
from twister_jax.optimizer import apply_gradients, make_optimizer
from twister_jax.replay import Replay
from twister_jax.twister.behavior import (
    Actor,
    Critic,
    ReturnScale,
    actor_loss,
    critic_loss,
    imagine,
    make_targets,
    starts_of,
)
from twister_jax.twister.report import open_loop_picture
from twister_jax.twister.world_model import (
    WorldModel,
    augment,
    features,
    loss_scales,
    to_float,
    world_model_loss,
)


@struct.dataclass
class TwisterState:
    """Everything that learns."""

    world_model: Params
    actor: Params
    critic: Params
    slow_critic: Params
    world_model_optimizer: Any
    actor_optimizer: Any
    critic_optimizer: Any
    return_scale: ReturnScale
    updates: Int[Array, ""]
    health: Health


@struct.dataclass
class TwisterCarry:
    """What acting remembers of each environment: its context, and the transition it is in."""

    ring: Ring
    latent: Float[Array, "env latent"]
    action: Float[Array, "env action"]


def make_networks(config: TwisterConfig, spec: EnvSpec, dtype: DTypeLike) -> Networks:
    """TWISTER's three networks."""
    return Networks(
        {
            "world_model": partial(WorldModel, config.model, spec, dtype=dtype),
            "actor": partial(Actor, config.model, spec, dtype=dtype),
            "critic": partial(Critic, config.model, dtype=dtype),
        }
    )


def make_agent(config: Config, spec: EnvSpec) -> Agent:
    """TWISTER for one environment."""
    algorithm = config.algorithm
    assert isinstance(algorithm, TwisterConfig)
    networks = make_networks(algorithm, spec, compute_dtype(config.precision))
    world_model_losses = tuple(loss_scales(algorithm))

    def init(key: PRNGKeyArray) -> TwisterState:
        params = networks.init(key)
        return TwisterState(
            **params,
            slow_critic=jax.tree.map(jnp.copy, params["critic"]),
            world_model_optimizer=make_optimizer(algorithm.world_model_optimizer).init(params["world_model"]),
            actor_optimizer=make_optimizer(algorithm.actor_optimizer).init(params["actor"]),
            critic_optimizer=make_optimizer(algorithm.critic_optimizer).init(params["critic"]),
            return_scale=ReturnScale.zero(),
            updates=jnp.zeros((), jnp.int32),
            health=Health.sound(),
        )

    def init_carry(state: TwisterState, num_envs: int) -> TwisterCarry:
        model = networks.merge("world_model", state.world_model)
        latent = jnp.broadcast_to(model.initial_latent(), (num_envs, model.initial_latent().size))
        return TwisterCarry(
            ring=model.transformer.empty_ring(num_envs),
            latent=latent,
            action=jnp.zeros((num_envs, spec.num_actions)),
        )

    def act(
        state: TwisterState,
        carry: TwisterCarry,
        observation: Observation,
        key: PRNGKeyArray,
        *,
        sample_actions: bool = True,
    ) -> tuple[Float[Array, "env action"], TwisterCarry]:
        model = networks.merge("world_model", state.world_model)
        actor = networks.merge("actor", state.actor)
        draw = KeySampler(key)
        first = observation.is_first[:, None]

        latent = jnp.where(first, model.initial_latent(), carry.latent)
        action = jnp.where(first, 0.0, carry.action)
        ring = dataclasses.replace(carry.ring, visible=carry.ring.visible & ~first)
        deter, ring = model.step(latent, action, ring, model.transformer.position_table())

        latent = draw("posterior", model.posterior(to_float(observation.image)))
        latent = latent.reshape(latent.shape[0], -1)
        policy = actor(features(latent, deter))
        action = draw("action", policy) if sample_actions else policy.mode()
        return action, TwisterCarry(ring, latent, action)

    def sample(replay: Replay, key: PRNGKeyArray) -> tuple[Transition, Replay]:
        key_window, *_ = jax.random.split(key, 5)
        return replay_store.sample(replay, key_window, algorithm.batch_size, algorithm.batch_length), replay

    def learn(state: TwisterState, windows: Transition, key: PRNGKeyArray) -> tuple[TwisterState, Metrics]:
        _, key_crop, key_draw, key_dropout, key_dream = jax.random.split(key, 5)  # the first is of `sample`

        # 1. A second view of every frame of the windows.
        augmented = augment(key_crop, windows, algorithm)

        # 2. Train the world model.
        def loss_of_world_model(params: Params):
            model = networks.merge("world_model", params)
            return world_model_loss(model, windows, algorithm, KeySampler(key_draw), augmented, key_dropout)

        gradients, out = jax.grad(loss_of_world_model, has_aux=True)(state.world_model)
        bad = ~jnp.isfinite(jnp.stack([out.losses[name] for name in world_model_losses]))
        world_model, world_model_optimizer, world_model_norm = apply_gradients(
            algorithm.world_model_optimizer,
            gradients,
            state.world_model,
            state.world_model_optimizer,
            ~jnp.any(bad),
        )

        # 3. Imagine from every state of the windows, with the new world model.
        model = networks.merge("world_model", world_model)
        start = starts_of(model, out.observed, windows.is_first, windows.terminal)
        noise = jax.random.split(key_dream, algorithm.imagination_horizon)
        trajectory = imagine(model, networks.merge("actor", state.actor), start, noise, KeySampler)
        imagined = trajectory.features

        # 4. Train the critic; its forward pass also gives the values that the returns are made of.
        slow_mean = networks.merge("critic", state.slow_critic)(imagined[:-1]).mean()

        def loss_of_critic(params: Params):
            value = networks.merge("critic", params)(imagined)
            targets = make_targets(
                model, value.mean(), trajectory, start.continues, state.return_scale, algorithm
            )
            value = jax.tree.map(lambda x: x[:-1], value)
            return critic_loss(value, slow_mean, targets, algorithm), targets

        (loss_critic, targets), gradients = jax.value_and_grad(loss_of_critic, has_aux=True)(state.critic)
        critic, critic_optimizer, critic_norm = apply_gradients(
            algorithm.critic_optimizer,
            gradients,
            state.critic,
            state.critic_optimizer,
            jnp.isfinite(loss_critic),
        )

        # 5. Train the actor.
        def loss_of_actor(params: Params):
            policy = networks.merge("actor", params)(imagined[:-1])
            return actor_loss(policy, trajectory.action, targets, algorithm)

        (loss_actor, entropy), gradients = jax.value_and_grad(loss_of_actor, has_aux=True)(state.actor)
        actor, actor_optimizer, actor_norm = apply_gradients(
            algorithm.actor_optimizer, gradients, state.actor, state.actor_optimizer, jnp.isfinite(loss_actor)
        )

        # 6. Move the slow critic and the return scale.
        rate = algorithm.slow_critic_rate
        slow_critic = jax.tree.map(lambda s, c: (1.0 - rate) * s + rate * c, state.slow_critic, critic)
        return_scale = guard(jnp.isfinite(loss_critic), targets.return_scale, state.return_scale)

        rest = [world_model_norm, loss_critic, critic_norm, loss_actor, actor_norm]
        health = state.health.record(jnp.concatenate([bad, ~jnp.isfinite(jnp.stack(rest))]))
        state = TwisterState(
            world_model,
            actor,
            critic,
            slow_critic,
            world_model_optimizer,
            actor_optimizer,
            critic_optimizer,
            return_scale,
            state.updates + 1,
            health,
        )
        contrastive = [out.losses[f"contrastive_{k}"] for k in range(algorithm.model.contrastive_steps)]
        scales = loss_scales(algorithm)
        metrics = {
            **{f"losses/{name}": loss for name, loss in out.losses.items()},
            "losses/contrastive": sum(
                scales[f"contrastive_{k}"] * loss for k, loss in enumerate(contrastive)
            ),
            "losses/actor": loss_actor,
            "losses/critic": loss_critic,
            **{f"contrastive_accuracy/{k}": a for k, a in enumerate(out.contrastive_accuracy)},
            "gradient_norm/world_model": world_model_norm,
            "gradient_norm/actor": actor_norm,
            "gradient_norm/critic": critic_norm,
            "entropy/policy": entropy,
            "entropy/posterior": jnp.mean(jnp.sum(out.observed.posterior.entropy(), -1)),
            "entropy/prior": jnp.mean(jnp.sum(out.observed.prior.entropy(), -1)),
            "imagination/return": jnp.mean(targets.returns),
            "imagination/value": jnp.mean(targets.value),
            "imagination/reward": jnp.mean(targets.reward),
            "imagination/continue": jnp.mean(targets.continues),
            "imagination/return_scale": return_scale.scale,
            "replay/reward": jnp.mean(windows.reward),
        }
        return state, metrics

    def report(state: TwisterState, replay: Replay, key: PRNGKeyArray) -> dict[str, Array]:
        key_window, key_draw = jax.random.split(key)
        model = networks.merge("world_model", state.world_model)
        windows = replay_store.sample(replay, key_window, 4, algorithm.batch_length)
        return {"open_loop": open_loop_picture(model, windows, key_draw)}

    return Agent(
        init=init,
        init_carry=init_carry,
        act=act,
        act_evaluate=partial(act, sample_actions=config.evaluation.sample_actions),
        sample=sample,
        learn=learn,
        report=report,
        loss_names=(
            *world_model_losses,
            "world_model_gradient",
            "critic",
            "critic_gradient",
            "actor",
            "actor_gradient",
        ),
        health=lambda state: state.health,
        min_replay_steps=algorithm.batch_length,
        tokens_per_update=algorithm.batch_size * algorithm.batch_length,
    )
