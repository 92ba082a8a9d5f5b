"""TWM as one agent: init, act, sample, learn. `learn` reads like the paper's algorithm 1."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from twister_jax.agents.base import Agent, Health, Losses, Metrics, Observation, Pretraining, Trained
from twister_jax.agents.open_loop import open_loop_picture
from twister_jax.agents.twm import pretraining
from twister_jax.agents.twm import windows as replay_windows
from twister_jax.agents.twm.behavior import (
    Behavior,
    CriticOutput,
    FramesMlp,
    StartStates,
    Trajectory,
    View,
    actor_loss,
    behavior_network,
    critic_loss,
    imagine,
    make_view,
)
from twister_jax.agents.twm.config import TwmConfig
from twister_jax.agents.twm.dream import make_dream
from twister_jax.agents.twm.dynamics import Dynamics
from twister_jax.agents.twm.history import History, TwmCarry, took
from twister_jax.agents.twm.mlp import Mlp
from twister_jax.agents.twm.observation import ObservationModel, flat, push_frame, to_float
from twister_jax.agents.twm.windows import Windows
from twister_jax.agents.twm.world_model import WorldModelOutput, loss_scales, start_states, world_model_loss
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec
from twister_jax.errors import UserError
from twister_jax.nn.distributions import KeySampler, NamedKeys, OneHot, Sampler
from twister_jax.nn.networks import Networks, Params
from twister_jax.parallel import split
from twister_jax.replay.store import Replay
from twister_jax.runtime import compute_dtype


@struct.dataclass
class TwmState:
    """Everything that learns: `observation` and `dynamics` model, `critic` and `actor`."""

    trained: Trained
    health: Health


class TwmBatch(NamedTuple):
    """What an update reads of the replay."""

    windows: Windows
    """A step of context, the steps to train on, one after."""
    fresh: UInt8[Array, "frame height width stack"]
    """Observations from all over the replay, to go on from where an imagined rollout ends."""
    visits: Float[Array, ""]
    """How often a step that the replay holds was drawn, on average."""


class Twm:
    """TWM's functions for one kind of environment; pure, and together its `Agent`.

    Args:
      config: sizes, losses, optimisers.
      spec: what the environments give and take: single grey frames, and discrete actions.
      dtype: of matrix products.
    """

    def __init__(self, config: TwmConfig, spec: EnvSpec, dtype: DTypeLike):
        self.config, self.spec, self.stack = config, spec, config.model.frame_stack
        self.optimizers = {
            "observation": config.observation_optimizer,
            "dynamics": config.dynamics_optimizer,
            "critic": config.critic_optimizer,
            "actor": config.actor_optimizer,
        }
        model, actions = config.model, spec.num_actions
        self.networks = Networks(
            {
                "observation": partial(ObservationModel, model, dtype=dtype),
                "dynamics": partial(Dynamics, model, actions, config.discount, dtype=dtype),
                "critic": partial(behavior_network, model, model.critic, 1, dtype=dtype),
                "actor": partial(behavior_network, model, model.actor, actions, dtype=dtype),
            }
        )
        losses = {**loss_scales(config), "critic": ("critic",), "actor": ("actor",)}
        self.terms = tuple(term for name in losses for term in (*losses[name], f"{name}_gradient"))

    def init(self, key: PRNGKeyArray) -> TwmState:
        """Fresh parameters."""
        trained = Trained.begin(self.networks.init(key), self.optimizers)
        return TwmState(trained, Health.sound(self.terms))

    # -------------------------------------------------------------------------------------------- acting

    def init_carry(self, state: TwmState, num_envs: int) -> TwmCarry:
        """Black frames, which the first reset replaces."""
        shape = (num_envs, *self.spec.image_shape[:2], self.stack)
        model, actions = self.config.model, self.spec.num_actions
        history = History.empty(model, num_envs, actions) if model.policy_reads == "state" else None
        return TwmCarry(jnp.zeros(shape, jnp.uint8), history)

    def act(
        self,
        state: TwmState,
        carry: TwmCarry,
        observation: Observation,
        key: PRNGKeyArray,
        *,
        sample_actions: bool = True,
    ) -> tuple[Float[Array, "env action"], TwmCarry]:
        """The policy in the most likely latent of the newest frames; no transformer, but where it reads h."""
        params, history, hidden = state.trained.params, carry.history, None
        frames = push_frame(carry.frames, observation.image, observation.is_first)
        if history is not None:
            history = history.answered(observation)
            hidden = history.hidden(self.dynamics(params["dynamics"]))
        latent = flat(self.observation(params["observation"]).encoder(to_float(frames)).mode())
        reads_frames = self.config.model.policy_reads == "frames"  # and then the latent is for nobody
        seen = to_float(frames) if reads_frames else self.view(params)(latent, hidden)
        policy = OneHot.of(self.actor(params["actor"])(seen))
        action = policy.draw(key) if sample_actions else policy.mode()
        return action, TwmCarry(frames, history and history.after(latent, action))

    def view(self, params: dict[str, Params]) -> View:
        """What policy and value read of z, and of h of the step before."""
        return make_view(self.config.model.policy_reads, self.observation(params["observation"]).decoder)

    # ------------------------------------------------------------------------------------------ learning

    def sample(self, replay: Replay, key: PRNGKeyArray, shards: int = 1) -> tuple[TwmBatch, Replay]:
        """Windows, those seen least most often, and single observations."""
        config = self.config
        temperature = config.sampling_temperature if config.balanced_sampling else math.inf
        key_windows, key_fresh = jax.random.split(key)
        windows, replay = replay_windows.sample_balanced(
            replay, key_windows, config.batch_size // shards, config.batch_length + 2, self.stack, temperature
        )
        fresh = replay_windows.sample_frames(replay, key_fresh, config.restart_pool // shards, self.stack)
        visits = jnp.sum(replay.visits) / (replay.size * replay.visits.shape[0])
        return TwmBatch(windows, fresh, visits), replay

    def learn(self, state: TwmState, batch: TwmBatch, key: PRNGKeyArray) -> tuple[TwmState, Metrics]:
        """One update of everything."""
        config, windows = self.config, batch.windows
        key_latents, key_dropout, key_start, key_restarts, key_dream = jax.random.split(key, 5)

        # 1. Train the observation model and the dynamics model.
        with jax.named_scope("world_model"):
            gradients, out = self.world_model_gradients(
                state.trained.params, windows, KeySampler(key_latents), key_dropout
            )
        trained, metrics, finite = self.step(state.trained, gradients, out.losses)

        # 2. Imagine from some of the batch's steps, with the new models; rollouts that end go on from
        #    random frames.
        with jax.named_scope("imagination"):
            candidates = start_states(out.latent, windows)
            chosen = jax.random.permutation(key_start, candidates.reward.shape[0])[: config.imagination_batch]
            start = split(jax.tree.map(lambda x: x[chosen], candidates))
            encoder = self.observation(trained.params["observation"]).encoder
            restarts = flat(encoder(to_float(batch.fresh)).draw(key_restarts))
            restarts = restarts.reshape(config.imagination_horizon, config.restart_frames, -1)
            keys = jax.random.split(key_dream, config.imagination_horizon)
            noise = NamedKeys.of_rounds(keys, "action", "latent")
            trajectory, _ = self.imagine(trained.params, start, restarts, noise, NamedKeys)

        # 3. Train critic and actor.
        with jax.named_scope("actor_and_critic"):
            behavior = self.behavior_gradients(trained.params, trajectory)
        trained, more_metrics, more_finite = self.step(trained, behavior.gradients, behavior.losses)

        metrics |= more_metrics | out.logged
        metrics |= {
            "entropy/policy": behavior.entropy,
            "imagination/return": jnp.mean(behavior.critic.returns),
            "imagination/value": jnp.mean(behavior.critic.value),
            "imagination/advantage": jnp.mean(jnp.abs(behavior.critic.advantages)),
            "imagination/reward": jnp.mean(trajectory.reward),
            "imagination/discount": jnp.mean(trajectory.discount),
            "imagination/restarts": jnp.sum(trajectory.done).astype(jnp.float32),
            "replay/reward": jnp.mean(windows.reward),
            "replay/visits": batch.visits,
        }
        return TwmState(trained, state.health.record(finite | more_finite)), metrics

    def world_model_gradients(
        self, params: dict[str, Params], windows: Windows, sampler: Sampler, dropout_key: PRNGKeyArray | None
    ) -> tuple[dict[str, Params], WorldModelOutput]:
        """Gradients of observation (eq. 4) and dynamics model (eq. 5), and all that their pass computed."""

        def loss(params: dict[str, Params]):
            observation, dynamics = self.observation(params["observation"]), self.dynamics(params["dynamics"])
            return world_model_loss(observation, dynamics, windows, self.config, sampler, dropout_key)

        return jax.grad(loss, has_aux=True)({name: params[name] for name in ("observation", "dynamics")})

    def imagine(
        self,
        params: dict[str, Params],
        start: StartStates,
        restarts: Float[Array, "H pool latent"],
        noise: Any,
        sampler: Any,
    ) -> tuple[Trajectory, Float[Array, "rollout H_plus_1 hidden"]]:
        """Rollouts under the policy, and their hidden states; see `behavior.imagine`."""
        dynamics, actor = self.dynamics(params["dynamics"]), self.actor(params["actor"])
        return imagine(dynamics, actor, start, restarts, noise, sampler, self.config, self.view(params))

    def behavior_gradients(self, params: dict[str, Params], trajectory: Trajectory) -> Behavior:
        """Gradients of critic (eq. 7) and actor (eq. 6), whose advantages are those of the critic's pass."""
        critic_gradient, critic, out = self.critic_gradient(params["critic"], trajectory)

        def loss(params: Params):
            return actor_loss(self.actor(params), trajectory, out.advantages, self.config)

        (actor, entropy), actor_gradient = jax.value_and_grad(loss, has_aux=True)(params["actor"])
        gradients = {"critic": critic_gradient, "actor": actor_gradient}
        return Behavior(gradients, {"critic": {"critic": critic}, "actor": {"actor": actor}}, out, entropy)

    def critic_gradient(
        self, params: Params, trajectory: Trajectory
    ) -> tuple[Params, Float[Array, ""], CriticOutput]:
        """Gradient of the critic, its loss, and what its pass computed."""

        def loss(params: Params):
            return critic_loss(self.critic(params), trajectory, self.config.gae_lambda)

        (critic, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return gradient, critic, out

    def step(
        self, trained: Trained, gradients: dict[str, Params], losses: dict[str, Losses]
    ) -> tuple[Trained, Metrics, dict[str, Bool[Array, ""]]]:
        """Steps each network that has a gradient, if that and its losses are finite.

        Returns:
          the new parameters and optimisers, metrics, and which losses and gradients were finite.
        """
        metrics: Metrics = {}
        finite: dict[str, Bool[Array, ""]] = {}
        with jax.named_scope("optimizers"):
            for name, gradient in gradients.items():
                optimizer = self.optimizers[name]
                trained, norm, found = trained.step(name, optimizer, gradient, losses[name])
                metrics |= {f"losses/{term}": loss for term, loss in losses[name].items()}
                metrics[f"gradient_norm/{name}"] = norm
                finite |= found
        return trained, metrics, finite

    # -------------------------------------------------------------------------------------- pre-training

    def sample_frames(
        self, replay: Replay, key: PRNGKeyArray, shards: int = 1
    ) -> tuple[UInt8[Array, "frame height width stack"], Replay]:
        """Single observations, as many as a batch of windows trains on."""
        count = self.config.batch_size * self.config.batch_length // shards
        return replay_windows.sample_frames(replay, key, count, self.stack), replay

    def pretrain_observation(
        self, state: TwmState, frames: UInt8[Array, "frame height width stack"], key: PRNGKeyArray
    ) -> tuple[TwmState, Metrics]:
        """One step of the observation model on single observations."""

        def loss(params: Params):
            return pretraining.observation_loss(self.observation(params), to_float(frames), self.config, key)

        gradient, (losses, logged) = jax.grad(loss, has_aux=True)(state.trained.params["observation"])
        gradients, terms = {"observation": gradient}, {"observation": losses}
        trained, metrics, finite = self.step(state.trained, gradients, terms)
        return TwmState(trained, state.health.record(finite)), metrics | logged

    def sample_windows(
        self, count: int, length: int, replay: Replay, key: PRNGKeyArray, shards: int = 1
    ) -> tuple[Windows, Replay]:
        """`count` windows of `length` observations, drawn uniformly."""
        return replay_windows.sample_uniform(replay, key, count // shards, length, self.stack), replay

    def pretrain_dynamics(
        self, state: TwmState, windows: Windows, key: PRNGKeyArray
    ) -> tuple[TwmState, Metrics]:
        """One step of the dynamics model."""
        params = state.trained.params
        posterior = self.observation(params["observation"]).encoder(to_float(windows.frames))

        def loss(params: Params):
            return pretraining.dynamics_loss(self.dynamics(params), posterior, windows, self.config, key)

        gradient, losses = jax.grad(loss, has_aux=True)(params["dynamics"])
        trained, metrics, finite = self.step(state.trained, {"dynamics": gradient}, {"dynamics": losses})
        return TwmState(trained, state.health.record(finite)), metrics

    def pretrain_behavior(
        self, state: TwmState, windows: Windows, key: PRNGKeyArray
    ) -> tuple[TwmState, Metrics]:
        """One step of the critic, and of the actor on its entropy."""
        config, params = self.config, state.trained.params
        posterior = self.observation(params["observation"]).encoder(to_float(windows.frames))
        latent = flat(posterior.draw(key))
        dynamics = self.dynamics(params["dynamics"])
        trajectory = pretraining.replayed_trajectory(dynamics, latent, windows, config)
        critic_gradient, critic, _ = self.critic_gradient(params["critic"], trajectory)

        def loss(params: Params):
            return pretraining.actor_loss(self.actor(params), trajectory.seen, config)

        actor, actor_gradient = jax.value_and_grad(loss)(params["actor"])
        gradients = {"critic": critic_gradient, "actor": actor_gradient}
        losses = {"critic": {"critic": critic}, "actor": {"actor": actor}}
        trained, metrics, finite = self.step(state.trained, gradients, losses)
        return TwmState(trained, state.health.record(finite)), metrics

    # ---------------------------------------------------------------------------------------- for people

    def report(
        self, state: TwmState, replay: Replay, key: PRNGKeyArray
    ) -> dict[str, UInt8[Array, "height width 3"]]:
        """Truth, reconstruction and imagination of four windows."""
        stored = self.config.min_replay_steps
        return {"open_loop": open_loop_picture(make_dream(self), state, replay, key, stored)}

    # ------------------------------------------------------------------------------------------ networks

    def observation(self, params: Params) -> ObservationModel:
        """The observation model with these parameters."""
        return self.networks.merge("observation", params)

    def dynamics(self, params: Params) -> Dynamics:
        """The dynamics model with these parameters."""
        return self.networks.merge("dynamics", params)

    def critic(self, params: Params) -> Mlp | FramesMlp:
        """The critic with these parameters."""
        return self.networks.merge("critic", params)

    def actor(self, params: Params) -> Mlp | FramesMlp:
        """The actor with these parameters."""
        return self.networks.merge("actor", params)


def make_agent(config: Config, spec: EnvSpec) -> Agent:
    """TWM for one kind of environment.

    Raises:
      UserError: its actions are continuous, or its pictures are not one grey channel.
    """
    algorithm = config.algorithm
    assert isinstance(algorithm, TwmConfig)
    if not spec.discrete:
        raise UserError(f"TWM has discrete actions only: those of {config.game} are continuous")
    channels = spec.image_shape[-1]
    if channels != 1:
        raise UserError(
            f"TWM stacks grey frames: those of {config.game} have {channels} channels; where there is a "
            f"setting env.grayscale, it must be True"
        )
    twm = Twm(algorithm, spec, compute_dtype(config.precision))
    samples = algorithm.batch_size * algorithm.batch_length
    windows = partial(twm.sample_windows, algorithm.batch_size, algorithm.batch_length + 2)
    rollouts = partial(twm.sample_windows, algorithm.imagination_batch, algorithm.behavior_window)
    rollout_samples = algorithm.imagination_batch * algorithm.imagination_horizon
    phases = (
        ("observation", algorithm.pretrain_observation_samples, samples, twm.sample_frames),
        ("dynamics", algorithm.pretrain_dynamics_samples, samples, windows),
        ("behavior", algorithm.pretrain_behavior_samples, rollout_samples, rollouts),
    )
    return Agent(
        init=twm.init,
        init_carry=twm.init_carry,
        act=twm.act,
        act_evaluate=partial(twm.act, sample_actions=config.evaluation.sample_actions),
        sample=twm.sample,
        learn=twm.learn,
        report=twm.report,
        health=lambda state: state.health,
        parts=("sample", "world_model", "imagination", "actor_and_critic", "optimizers"),
        shared_sizes={
            f"algorithm.{name}": getattr(algorithm, name)
            for name in ("batch_size", "imagination_batch", "restart_frames")
        },
        min_replay_steps=algorithm.min_replay_steps,
        tokens_per_update=samples,
        headline="losses/decoder",
        dream=make_dream(twm),
        took=took,
        reads_reward=algorithm.model.policy_reads == "state",
        pretraining=tuple(
            Pretraining(sample, getattr(twm, f"pretrain_{name}"), name, -(-budget // per_update))
            for name, budget, per_update, sample in phases
            if budget
        ),
    )
