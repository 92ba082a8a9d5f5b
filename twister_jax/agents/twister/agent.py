"""TWISTER as one agent: init, act, sample, learn. `learn` reads like the paper's algorithm 1."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from twister_jax.agents.base import Agent, Health, Losses, Metrics, Observation, Trained
from twister_jax.agents.open_loop import open_loop_picture
from twister_jax.agents.twister.behavior import (
    Actor,
    Critic,
    ReturnScale,
    StartStates,
    Targets,
    Trajectory,
    actor_loss,
    critic_loss,
    imagine,
    make_targets,
    start_states,
)
from twister_jax.agents.twister.config import TwisterConfig
from twister_jax.agents.twister.dream import make_dream
from twister_jax.agents.twister.world_model import (
    Observed,
    WorldModel,
    WorldModelOutput,
    augment,
    features,
    loss_scales,
    to_float,
    world_model_loss,
)
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.distributions import KeySampler, NamedKeys, Sampler
from twister_jax.nn.networks import Networks, Params
from twister_jax.nn.optimizer import where_finite
from twister_jax.nn.transformer import KeyValueCache
from twister_jax.replay import store
from twister_jax.replay.store import Replay, Transition
from twister_jax.runtime import compute_dtype


@struct.dataclass
class TwisterState:
    """Everything that learns: `world_model`, `actor` and `critic`, and what follows the critic."""

    trained: Trained
    slow_critic: Params
    return_scale: ReturnScale
    health: Health


@struct.dataclass
class TwisterCarry:
    """What acting remembers of each environment: its context, and the transition it is in."""

    cache: KeyValueCache
    latent: Float[Array, "env latent"]
    action: Float[Array, "env action"]


class Behavior(NamedTuple):
    """Gradients of actor and critic, their losses, and what they learned from."""

    gradients: dict[str, Params]
    losses: Losses
    targets: Targets
    entropy: Float[Array, ""]


class Twister:
    """TWISTER's functions for one kind of environment; pure, and together its `Agent`.

    Args:
      config: sizes, losses, optimisers.
      spec: what the environments give and take.
      dtype: of matrix products.
    """

    def __init__(self, config: TwisterConfig, spec: EnvSpec, dtype: DTypeLike):
        self.config, self.spec, self.dtype = config, spec, dtype
        self.optimizers = {
            "world_model": config.world_model_optimizer,
            "critic": config.critic_optimizer,
            "actor": config.actor_optimizer,
        }
        self.networks = Networks(
            {
                "world_model": partial(WorldModel, config.model, spec, dtype=dtype),
                "actor": partial(Actor, config.model, spec, dtype=dtype),
                "critic": partial(Critic, config.model, dtype=dtype),
            }
        )
        self.terms = (
            *loss_scales(config),
            "world_model_gradient",
            "critic",
            "critic_gradient",
            "actor",
            "actor_gradient",
        )

    def init(self, key: PRNGKeyArray) -> TwisterState:
        """Fresh parameters; the slow critic starts as the critic."""
        params = self.networks.init(key)
        return TwisterState(
            trained=Trained.begin(params, self.optimizers),
            slow_critic=jax.tree.map(jnp.copy, params["critic"]),
            return_scale=ReturnScale.zero(),
            health=Health.sound(self.terms),
        )

    # -------------------------------------------------------------------------------------------- acting

    def init_carry(self, state: TwisterState, num_envs: int) -> TwisterCarry:
        """An empty context."""
        model = self.world_model(state.trained.params["world_model"])
        latent = model.initial_latent()
        return TwisterCarry(
            cache=model.transformer.empty_cache(num_envs),
            latent=jnp.broadcast_to(latent, (num_envs, latent.size)),
            action=jnp.zeros((num_envs, self.spec.num_actions)),
        )

    def act(
        self,
        state: TwisterState,
        carry: TwisterCarry,
        observation: Observation,
        key: PRNGKeyArray,
        *,
        sample_actions: bool = True,
    ) -> tuple[Float[Array, "env action"], TwisterCarry]:
        """One transition of the context, the posterior of the image, and the policy."""
        model = self.world_model(state.trained.params["world_model"])
        actor = self.actor(state.trained.params["actor"])
        draw = KeySampler(key)
        deter, cache = model.proceed(carry.latent, carry.action, carry.cache, observation.is_first)
        latent = draw("posterior", model.posterior(to_float(observation.image)))
        latent = latent.reshape(latent.shape[0], -1)
        policy = actor(features(latent, deter))
        action = draw("action", policy) if sample_actions else policy.mode()
        return action, TwisterCarry(cache, latent, action)

    def took(self, carry: TwisterCarry, action: Float[Array, "env action"]) -> TwisterCarry:
        """The same transition with another action."""
        return dataclasses.replace(carry, action=action)

    # ------------------------------------------------------------------------------------------ learning

    def sample(self, replay: Replay, key: PRNGKeyArray, shards: int = 1) -> tuple[Transition, Replay]:
        """Windows, uniform over all start positions."""
        share = self.config.batch_size // shards
        return store.sample(replay, key, share, self.config.batch_length), replay

    def learn(
        self, state: TwisterState, windows: Transition, key: PRNGKeyArray
    ) -> tuple[TwisterState, Metrics]:
        """One update of everything."""
        config = self.config
        key_view, key_latents, key_dropout, key_dream = jax.random.split(key, 4)
        trained, norms, finite = state.trained, {}, {}

        def step(name: str, gradients: Params, losses: Losses) -> Trained:
            with jax.named_scope("optimizers"):
                stepped, norms[name], found = trained.step(name, self.optimizers[name], gradients, losses)
            finite.update(found)
            return stepped

        # 1. A second view of every frame of the windows.
        with jax.named_scope("augmentation"):
            view = augment(key_view, windows, config)

        # 2. Train the world model.
        with jax.named_scope("world_model"):
            gradients, out = self.world_model_gradients(
                trained.params["world_model"], windows, view, KeySampler(key_latents), key_dropout
            )
        trained = step("world_model", gradients, out.losses)

        # 3. Imagine from every state of the windows, with the new world model.
        keys = jax.random.split(key_dream, config.imagination_horizon)
        noise = NamedKeys.of_rounds(keys, "action", "prior")
        with jax.named_scope("imagination"):
            start, trajectory = self.imagine(trained.params, out.observed, windows, noise, NamedKeys)

        # 4. Train the critic, then the actor on the critic's values.
        with jax.named_scope("actor_and_critic"):
            behavior = self.behavior_gradients(
                trained.params, state.slow_critic, start, trajectory, state.return_scale
            )
        for name in ("critic", "actor"):
            trained = step(name, behavior.gradients[name], {name: behavior.losses[name]})

        # 5. Move the slow critic and the return scale.
        rate, critic = config.slow_critic_rate, trained.params["critic"]
        slow_critic = jax.tree.map(lambda s, c: (1.0 - rate) * s + rate * c, state.slow_critic, critic)
        return_scale = where_finite(finite["critic"], behavior.targets.return_scale, state.return_scale)

        state = TwisterState(trained, slow_critic, return_scale, state.health.record(finite))
        return state, self.metrics(windows, out, behavior, norms)

    def world_model_gradients(
        self,
        params: Params,
        windows: Transition,
        view: Float[Array, "batch time height width channel"],
        sampler: Sampler,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Params, WorldModelOutput]:
        """Gradients of the world-model loss (eq. 5), and all that its pass computed."""

        def loss(params: Params):
            return world_model_loss(
                self.world_model(params), windows, self.config, sampler, view, dropout_key
            )

        return jax.grad(loss, has_aux=True)(params)

    def imagine(
        self, params: dict[str, Params], observed: Observed, windows: Transition, noise: Any, sampler: Any
    ) -> tuple[StartStates, Trajectory]:
        """Rollouts under the policy from all states of the windows; see `behavior.imagine`."""
        model, actor = self.world_model(params["world_model"]), self.actor(params["actor"])
        start = start_states(model, observed, windows.is_first, windows.terminal)
        return start, imagine(model, actor, start, noise, sampler)

    def behavior_gradients(
        self,
        params: dict[str, Params],
        slow_critic: Params,
        start: StartStates,
        trajectory: Trajectory,
        return_scale: ReturnScale,
    ) -> Behavior:
        """Gradients of critic (eq. 9) and actor (eq. 10), which share the returns and their new scale."""
        model, states = self.world_model(params["world_model"]), trajectory.features
        slow_mean = self.critic(slow_critic)(states[:-1]).mean()

        def loss_of_critic(params: Params):
            value = self.critic(params)(states)  # its mean also makes the returns
            targets = make_targets(
                model, value.mean(), trajectory, start.continues, return_scale, self.config
            )
            value = jax.tree.map(lambda x: x[:-1], value)
            return critic_loss(value, slow_mean, targets, self.config), targets

        (critic, targets), critic_gradients = jax.value_and_grad(loss_of_critic, has_aux=True)(
            params["critic"]
        )

        def loss_of_actor(params: Params):
            return actor_loss(self.actor(params)(states[:-1]), trajectory.action, targets, self.config)

        (actor, entropy), actor_gradients = jax.value_and_grad(loss_of_actor, has_aux=True)(params["actor"])
        gradients = {"critic": critic_gradients, "actor": actor_gradients}
        return Behavior(gradients, {"critic": critic, "actor": actor}, targets, entropy)

    # ------------------------------------------------------------------------------------ for people

    def metrics(
        self, windows: Transition, out: WorldModelOutput, behavior: Behavior, norms: Metrics
    ) -> Metrics:
        """What a row of metrics.jsonl holds."""
        targets, scales = behavior.targets, loss_scales(self.config)
        contrastive = [name for name in out.losses if name.startswith("contrastive_")]
        return {
            **{f"losses/{name}": loss for name, loss in (out.losses | behavior.losses).items()},
            "losses/contrastive": sum(scales[name] * out.losses[name] for name in contrastive),
            **{f"contrastive_accuracy/{k}": a for k, a in enumerate(out.contrastive_accuracy)},
            **{f"gradient_norm/{name}": norm for name, norm in norms.items()},
            "entropy/policy": behavior.entropy,
            "entropy/posterior": jnp.mean(jnp.sum(out.observed.posterior.entropy(), -1)),
            "entropy/prior": jnp.mean(jnp.sum(out.observed.prior.entropy(), -1)),
            "imagination/return": jnp.mean(targets.returns),
            "imagination/value": jnp.mean(targets.value),
            "imagination/reward": jnp.mean(targets.reward),
            "imagination/continue": jnp.mean(targets.continues),
            "imagination/return_scale": targets.return_scale.scale,
            "replay/reward": jnp.mean(windows.reward),
        }

    def report(
        self, state: TwisterState, replay: Replay, key: PRNGKeyArray
    ) -> dict[str, UInt8[Array, "height width 3"]]:
        """Truth, reconstruction and imagination of four windows."""
        stored = self.config.batch_length
        return {"open_loop": open_loop_picture(make_dream(self), state, replay, key, stored)}

    # ------------------------------------------------------------------------------------------ networks

    def world_model(self, params: Params) -> WorldModel:
        """The world model with these parameters."""
        return self.networks.merge("world_model", params)

    def actor(self, params: Params) -> Actor:
        """The actor with these parameters."""
        return self.networks.merge("actor", params)

    def critic(self, params: Params) -> Critic:
        """The critic with these parameters."""
        return self.networks.merge("critic", params)


def make_agent(config: Config, spec: EnvSpec) -> Agent:
    """TWISTER for one kind of environment."""
    algorithm = config.algorithm
    assert isinstance(algorithm, TwisterConfig)
    twister = Twister(algorithm, spec, compute_dtype(config.precision))
    return Agent(
        init=twister.init,
        init_carry=twister.init_carry,
        act=twister.act,
        took=twister.took,
        act_evaluate=partial(twister.act, sample_actions=config.evaluation.sample_actions),
        sample=twister.sample,
        learn=twister.learn,
        report=twister.report,
        health=lambda state: state.health,
        parts=("sample", "augmentation", "world_model", "imagination", "actor_and_critic", "optimizers"),
        shared_sizes={"algorithm.batch_size": algorithm.batch_size},
        min_replay_steps=algorithm.batch_length,
        tokens_per_update=algorithm.batch_size * algorithm.batch_length,
        headline="losses/image",
        dream=make_dream(twister),
    )
