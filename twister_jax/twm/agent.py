"""TWM as one agent: init, act, sample, learn. `learn` reads like the paper's algorithm 1."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from twister_jax.agent import Agent, Health, Metrics, Observation, Pretraining, compute_dtype
from twister_jax.config import Config, TwmConfig
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.distributions import KeySampler, OneHot
from twister_jax.nn.networks import Networks, Params
from twister_jax.optimizer import apply_gradients, make_optimizer
from twister_jax.replay import Replay
from twister_jax.twm import windows as replay_windows
from twister_jax.twm.behavior import (
    Trajectory,
    actor_loss,
    behavior_network,
    critic_loss,
    imagine,
    normalized_policy_entropy,
)
from twister_jax.twm.dynamics import Dynamics, dynamics_total
from twister_jax.twm.observation import (
    ObservationModel,
    flat,
    observation_losses,
    observation_total,
    to_float,
)
from twister_jax.twm.report import open_loop_picture
from twister_jax.twm.windows import Windows
from twister_jax.twm.world_model import dynamics_pass, starts, world_model_loss

NETWORKS = ("observation", "dynamics", "critic", "actor")
"""Each has an optimiser of its own, and is stepped or held back as a whole."""

LOSSES = {
    "observation": ("decoder", "entropy", "consistency"),
    "dynamics": ("latent", "reward", "discount"),
    "critic": ("critic",),
    "actor": ("actor",),
}
"""The loss terms of each network."""


@struct.dataclass
class TwmState:
    """Everything that learns."""

    params: dict[str, Params]
    optimizers: dict[str, Any]
    updates: Int[Array, ""]
    """Updates of the interleaved loop."""
    health: Health


@struct.dataclass
class TwmCarry:
    """What acting remembers of each environment: the newest frames, oldest first."""

    frames: UInt8[Array, "env height width stack"]


class TwmBatch(NamedTuple):
    """What an update reads of the replay."""

    windows: Windows
    """A step of context, the steps to train on, one after."""
    fresh: UInt8[Array, "frame height width stack"]
    """Observations from all over the replay, to go on from where an imagined rollout ends."""
    visits: Float[Array, ""]
    """How often a step that the replay holds was drawn, on average."""


class UpdateKeys(NamedTuple):
    """One key for each thing that an update draws: windows and frames in `sample`, the others in `learn`."""

    window: PRNGKeyArray
    model: PRNGKeyArray
    dropout: PRNGKeyArray
    start: PRNGKeyArray
    frame: PRNGKeyArray
    latent: PRNGKeyArray
    dream: PRNGKeyArray

    @classmethod
    def of(cls, key: PRNGKeyArray) -> "UpdateKeys":
        """Split from the key of the update."""
        window, model, dropout, start, fresh, dream = jax.random.split(key, 6)
        frame, latent = jax.random.split(fresh)
        return cls(window, model, dropout, start, frame, latent, dream)


def make_networks(config: TwmConfig, num_actions: int, dtype: jnp.dtype) -> Networks:
    """Observation model, dynamics model, critic and actor."""
    model = config.model
    latent = model.stoch_groups * model.stoch_classes
    return Networks(
        {
            "observation": partial(ObservationModel, model, dtype=dtype),
            "dynamics": partial(Dynamics, model, num_actions, config.discount, dtype=dtype),
            "critic": partial(behavior_network, latent, model.critic, 1, dtype=dtype),
            "actor": partial(behavior_network, latent, model.actor, num_actions, dtype=dtype),
        }
    )


def make_agent(config: Config, spec: EnvSpec) -> Agent:
    """TWM for one environment, which must give single grey frames and have discrete actions."""
    algorithm = config.algorithm
    assert isinstance(algorithm, TwmConfig)
    stack = algorithm.model.frame_stack
    networks = make_networks(algorithm, spec.num_actions, compute_dtype(config.precision))
    optimizers = {name: getattr(algorithm, f"{name}_optimizer") for name in NETWORKS}
    merge = networks.merge

    def init(key: PRNGKeyArray) -> TwmState:
        params = networks.init(key)
        return TwmState(
            params=params,
            optimizers={name: make_optimizer(optimizers[name]).init(params[name]) for name in NETWORKS},
            updates=jnp.zeros((), jnp.int32),
            health=Health.sound(),
        )

    # -------------------------------------------------------------------------------------- acting

    def init_carry(state: TwmState, num_envs: int) -> TwmCarry:
        return TwmCarry(jnp.zeros((num_envs, *spec.image_shape[:2], stack), jnp.uint8))

    def act(
        state: TwmState,
        carry: TwmCarry,
        observation: Observation,
        key: PRNGKeyArray,
        *,
        sample_actions: bool = True,
    ) -> tuple[Float[Array, "env action"], TwmCarry]:
        shifted = jnp.concatenate([carry.frames[..., 1:], observation.image], axis=-1)
        reset = jnp.broadcast_to(observation.image, shifted.shape)
        frames = jnp.where(observation.is_first[:, None, None, None], reset, shifted)
        latent = merge("observation", state.params["observation"]).encoder(to_float(frames)).mode()
        policy = OneHot.of(merge("actor", state.params["actor"])(flat(latent)))
        return policy.draw(key) if sample_actions else policy.mode(), TwmCarry(frames)

    # ------------------------------------------------------------------------------------- learning

    def apply(
        state: TwmState, gradients: dict[str, Params], losses: dict[str, Float[Array, ""]]
    ) -> tuple[TwmState, Metrics, Bool[Array, " terms"]]:
        """Steps the given networks, each only if its losses and gradient are finite.

        Returns the new state without its health, metrics, and the bad ones among `loss_names`.
        """
        params, optimizer_states, metrics, bad = dict(state.params), dict(state.optimizers), {}, []
        for name in NETWORKS:
            bad += [~jnp.isfinite(losses.get(term, jnp.zeros(()))) for term in LOSSES[name]]
            if name not in gradients:
                bad.append(jnp.zeros((), bool))
                continue
            sound = ~jnp.any(jnp.stack(bad[-len(LOSSES[name]) :]))
            params[name], optimizer_states[name], norm = apply_gradients(
                optimizers[name], gradients[name], params[name], optimizer_states[name], sound
            )
            metrics[f"gradient_norm/{name}"] = norm
            bad.append(~jnp.isfinite(norm))
        metrics |= {f"losses/{name}": loss for name, loss in losses.items()}
        stepped = dataclasses.replace(state, params=params, optimizers=optimizer_states)
        return stepped, metrics, jnp.stack(bad)

    def record(state: TwmState, metrics: Metrics, bad: Bool[Array, " terms"]) -> tuple[TwmState, Metrics]:
        health = state.health.record(bad)
        return dataclasses.replace(state, health=health), metrics

    def behavior_gradients(
        state: TwmState, trajectory: Trajectory
    ) -> tuple[dict[str, Params], dict[str, Float[Array, ""]], Metrics]:
        """Critic and actor on imagined rollouts; the critic's pass gives the advantages for the actor."""

        def loss_of_critic(params: Params):
            return critic_loss(merge("critic", params), trajectory, algorithm.gae_lambda)

        (loss_critic, critic), critic_gradient = jax.value_and_grad(loss_of_critic, has_aux=True)(
            state.params["critic"]
        )

        def loss_of_actor(params: Params):
            return actor_loss(merge("actor", params), trajectory, critic.advantages, algorithm)

        (loss_actor, actor), actor_gradient = jax.value_and_grad(loss_of_actor, has_aux=True)(
            state.params["actor"]
        )
        gradients = {"critic": critic_gradient, "actor": actor_gradient}
        metrics = {
            "entropy/policy": actor.normalized_entropy,
            "imagination/return": jnp.mean(critic.returns),
            "imagination/value": jnp.mean(critic.value),
            "imagination/advantage": jnp.mean(jnp.abs(critic.advantages)),
        }
        return gradients, {"critic": loss_critic, "actor": loss_actor}, metrics

    def sample(replay: Replay, key: PRNGKeyArray) -> tuple[TwmBatch, Replay]:
        """Windows, those seen least most often, and frames."""
        keys = UpdateKeys.of(key)
        windows, replay = replay_windows.sample_balanced(
            replay,
            keys.window,
            algorithm.batch_size,
            algorithm.batch_length + 2,
            stack,
            algorithm.sampling_temperature,
        )
        fresh = replay_windows.sample_frames(replay, keys.frame, algorithm.restart_frames, stack)
        visits = jnp.sum(replay.visits) / (replay.size * replay.visits.shape[0])
        return TwmBatch(windows, fresh, visits), replay

    def learn(state: TwmState, batch: TwmBatch, key: PRNGKeyArray) -> tuple[TwmState, Metrics]:
        keys, windows = UpdateKeys.of(key), batch.windows

        # 1. Train the observation model and the dynamics model.
        def loss_of_world_model(observation: Params, dynamics: Params):
            models = merge("observation", observation), merge("dynamics", dynamics)
            return world_model_loss(*models, windows, algorithm, KeySampler(keys.model), keys.dropout)

        gradients, seen = jax.grad(loss_of_world_model, argnums=(0, 1), has_aux=True)(
            state.params["observation"], state.params["dynamics"]
        )
        losses = {term: getattr(seen.observation, term) for term in LOSSES["observation"]}
        losses |= {term: getattr(seen.dynamics, term) for term in LOSSES["dynamics"]}
        state, metrics, bad = apply(
            state, dict(zip(("observation", "dynamics"), gradients, strict=True)), losses
        )

        # 2. Imagine from some of the batch's steps, with the new dynamics model; rollouts that end go on
        #    from random frames.
        candidates = starts(seen.latent, windows)
        chosen = jax.random.permutation(keys.start, candidates.reward.shape[0])[: algorithm.imagination_batch]
        encoder = merge("observation", state.params["observation"]).encoder
        trajectory, _ = imagine(
            merge("dynamics", state.params["dynamics"]),
            merge("actor", state.params["actor"]),
            jax.tree.map(lambda x: x[chosen], candidates),
            flat(encoder(to_float(batch.fresh)).draw(keys.latent)),
            jax.random.split(keys.dream, algorithm.imagination_horizon),
            KeySampler,
            algorithm,
        )

        # 3. Train critic and actor.
        behavior, behavior_losses, behavior_metrics = behavior_gradients(state, trajectory)
        state, more, bad_behavior = apply(state, behavior, behavior_losses)

        metrics |= more | behavior_metrics
        metrics |= {
            "entropy/posterior": seen.observation.normalized_entropy,
            "reconstruction_error": seen.observation.reconstruction_error,
            "imagination/reward": jnp.mean(trajectory.reward),
            "imagination/discount": jnp.mean(trajectory.discount),
            "imagination/restarts": jnp.sum(trajectory.done).astype(jnp.float32),
            "replay/reward": jnp.mean(windows.reward),
            "replay/visits": batch.visits,
        }
        state = dataclasses.replace(state, updates=state.updates + 1)
        state, metrics = record(state, metrics, bad | bad_behavior)
        return state, metrics

    # ---------------------------------------------------------------------------------- pre-training

    def pretrain_observation(
        state: TwmState, replay: Replay, key: PRNGKeyArray
    ) -> tuple[TwmState, Replay, Metrics]:
        key_frame, key_draw = jax.random.split(key)
        count = algorithm.batch_size * algorithm.batch_length
        frames = to_float(replay_windows.sample_frames(replay, key_frame, count, stack))

        def loss(params: Params):
            model = merge("observation", params)
            posterior = model.encoder(frames)
            sample = posterior.draw(key_draw)
            losses = observation_losses(model.decoder, posterior, sample, frames, None, algorithm)
            return observation_total(losses, algorithm), losses

        gradient, seen = jax.grad(loss, has_aux=True)(state.params["observation"])
        losses = {term: getattr(seen, term) for term in ("decoder", "entropy")}
        state, metrics, bad = apply(state, {"observation": gradient}, losses)
        state, metrics = record(state, metrics | {"entropy/posterior": seen.normalized_entropy}, bad)
        return state, replay, metrics

    def pretrain_dynamics(
        state: TwmState, replay: Replay, key: PRNGKeyArray
    ) -> tuple[TwmState, Replay, Metrics]:
        key_window, key_draw, key_dropout = jax.random.split(key, 3)
        windows = replay_windows.sample_uniform(
            replay, key_window, algorithm.batch_size, algorithm.batch_length + 2, stack
        )
        posterior = merge("observation", state.params["observation"]).encoder(to_float(windows.frames))
        latent = flat(posterior.draw(key_draw))[:, :-1]
        following = jax.tree.map(lambda x: x[:, 2:], posterior)

        def loss(params: Params):
            model = merge("dynamics", params)
            losses, *_ = dynamics_pass(model, latent, following, windows, algorithm, key_dropout)
            return dynamics_total(losses, algorithm), losses

        gradient, seen = jax.grad(loss, has_aux=True)(state.params["dynamics"])
        losses = {term: getattr(seen, term) for term in LOSSES["dynamics"]}
        state, metrics, bad = apply(state, {"dynamics": gradient}, losses)
        state, metrics = record(state, metrics, bad)
        return state, replay, metrics

    def pretrain_behavior(
        state: TwmState, replay: Replay, key: PRNGKeyArray
    ) -> tuple[TwmState, Replay, Metrics]:
        key_window, key_draw = jax.random.split(key)
        windows = replay_windows.sample_uniform(
            replay, key_window, algorithm.imagination_batch, algorithm.imagination_horizon + 1, stack
        )
        posterior = merge("observation", state.params["observation"]).encoder(to_float(windows.frames))
        real = Trajectory(
            latent=flat(posterior.draw(key_draw)),
            action=windows.action,
            reward=windows.reward,
            discount=jnp.full_like(windows.reward, algorithm.discount),
            done=windows.last,
            weight=jnp.ones_like(windows.reward),
        )

        def loss_of_critic(params: Params):
            return critic_loss(merge("critic", params), real, algorithm.gae_lambda)

        (loss_critic, _), critic_gradient = jax.value_and_grad(loss_of_critic, has_aux=True)(
            state.params["critic"]
        )

        # The data come from random actions, so the actor starts from the policy of most entropy.
        def loss_of_actor(params: Params):
            entropy = normalized_policy_entropy(merge("actor", params), real.latent)
            return -algorithm.actor_entropy_scale * entropy

        loss_actor, actor_gradient = jax.value_and_grad(loss_of_actor)(state.params["actor"])
        gradients = {"critic": critic_gradient, "actor": actor_gradient}
        state, metrics, bad = apply(state, gradients, {"critic": loss_critic, "actor": loss_actor})
        state, metrics = record(state, metrics, bad)
        return state, replay, metrics

    def report(state: TwmState, replay: Replay, key: PRNGKeyArray) -> dict[str, Array]:
        key_window, key_draw = jax.random.split(key)
        windows = replay_windows.sample_uniform(replay, key_window, 4, algorithm.batch_length + 2, stack)
        observation = merge("observation", state.params["observation"])
        dynamics = merge("dynamics", state.params["dynamics"])
        return {"open_loop": open_loop_picture(observation, dynamics, windows, key_draw)}

    samples = algorithm.batch_size * algorithm.batch_length
    behavior_samples = algorithm.imagination_batch * algorithm.imagination_horizon
    phases = (
        ("observation", algorithm.pretrain_observation_samples, samples, pretrain_observation),
        ("dynamics", algorithm.pretrain_dynamics_samples, samples, pretrain_dynamics),
        ("behavior", algorithm.pretrain_behavior_samples, behavior_samples, pretrain_behavior),
    )
    return Agent(
        init=init,
        init_carry=init_carry,
        act=act,
        act_evaluate=partial(act, sample_actions=config.evaluation.sample_actions),
        sample=sample,
        learn=learn,
        report=report,
        loss_names=tuple(term for name in NETWORKS for term in (*LOSSES[name], f"{name}_gradient")),
        health=lambda state: state.health,
        min_replay_steps=algorithm.min_replay_steps,
        tokens_per_update=samples,
        pretraining=tuple(
            Pretraining(name, -(-budget // per_update), function)
            for name, budget, per_update, function in phases
            if budget
        ),
    )
