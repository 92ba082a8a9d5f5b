"""TWM's behaviour: imagined rollouts that restart, generalised advantages, actor and critic (section 2.3).

Policy and value read the latent z alone: acting needs the encoder but no transformer. Two ablations read
something else, `policy_reads`: the state (z, h), or frames.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from twister_jax.agents.base import Losses
from twister_jax.agents.twm.config import PolicyInput, TwmConfig, TwmModelConfig
from twister_jax.agents.twm.dynamics import Dynamics, Memory
from twister_jax.agents.twm.mlp import Mlp
from twister_jax.agents.twm.observation import Convolutions, flat, hinge
from twister_jax.nn.distributions import OneHot, Sampler
from twister_jax.nn.layers import cast_kernels
from twister_jax.nn.networks import Params
from twister_jax.parallel import whole

Network = Callable[[Array], Array]
"""Actor or critic."""
View = Callable[[Array, Array | None], Array]
"""(z [*batch, latent], h [*batch, hidden] or None) -> what policy and value read."""


def behavior_network(
    model: TwmModelConfig, widths: tuple[int, ...], outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> "Mlp | FramesMlp":
    """Actor or critic: orthogonal weights, zero biases."""
    if model.policy_reads == "frames":
        return FramesMlp(model, widths, outputs, dtype=dtype, rngs=rngs)
    inputs = model.latent_size + (model.hidden_size if model.policy_reads == "state" else 0)
    return _behavior_mlp([inputs, *widths, outputs], dtype=dtype, rngs=rngs)


def _behavior_mlp(widths: list[int], *, dtype: DTypeLike, rngs: nnx.Rngs) -> Mlp:
    return Mlp(
        widths,
        hidden_init=nnx.initializers.orthogonal(math.sqrt(2.0)),
        output_init=nnx.initializers.orthogonal(1.0),
        dtype=dtype,
        rngs=rngs,
    )


class FramesMlp(Convolutions):
    """Actor or critic that sees frames: the encoder's convolutions, with weights of its own, and an MLP."""

    def __init__(
        self,
        model: TwmModelConfig,
        widths: tuple[int, ...],
        outputs: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(model, dtype=dtype, rngs=rngs)
        self.mlp = _behavior_mlp([self.features, *widths, outputs], dtype=dtype, rngs=rngs)

    def __call__(self, frames: Float[Array, "*batch height width stack"]) -> Float[Array, "*batch outputs"]:
        """Of observations in [0, 1]."""
        return self.mlp(self.convolve(frames)).reshape(*frames.shape[:-3], -1)


def latent_alone(latent: Array, hidden: Array | None) -> Array:
    """The published view."""
    return latent


def latent_and_hidden(latent: Array, hidden: Array | None) -> Array:
    """The view of policies that read the state (z, h)."""
    assert hidden is not None
    return jnp.concatenate([latent, hidden], axis=-1)


def make_view(reads: PolicyInput, decoder: Network) -> View:
    """What policy and value read of the world model's state."""
    views: dict[str, View] = {
        "latent": latent_alone,
        "state": latent_and_hidden,
        "frames": lambda latent, hidden: decoder(latent),
    }
    return views[reads]


class StartStates(NamedTuple):
    """Two steps of replay that each rollout starts from: (z_0, a_0, r_0, d_0, z_1)."""

    latents: Float[Array, "rollout two latent"]
    """z_0 and z_1."""
    action: Float[Array, "rollout action"]
    """a_0, one-hot."""
    reward: Float[Array, " rollout"]
    last: Bool[Array, " rollout"]
    """Whether z_0 was its episode's last."""


class Trajectory(NamedTuple):
    """A batch of rollouts; H is the horizon."""

    latent: Float[Array, "rollout H_plus_1 latent"]
    """z_1 … z_{H+1}; where `done`, the latent after it belongs to a new rollout."""
    action: Float[Array, "rollout H action"]
    """Taken at z_1 … z_H, one-hot."""
    reward: Float[Array, "rollout H"]
    discount: Float[Array, "rollout H"]
    """Predicted mean discount g."""
    done: Bool[Array, "rollout H"]
    """The rollout was cut after this step."""
    weight: Float[Array, "rollout H"]
    """Cumulative predicted discount within a rollout, before this step."""
    view: Float[Array, "rollout H_plus_1 ..."] | None = None
    """What policy and value read at each latent; None: the latent itself."""

    @property
    def seen(self) -> Array:
        """What policy and value read at z_1 … z_{H+1}."""
        return self.latent if self.view is None else self.view


class _Carry(NamedTuple):
    memory: Memory
    episode: Int[Array, "rollout step"]
    latent: Float[Array, "rollout latent"]
    reward: Float[Array, " rollout"]
    done: Bool[Array, " rollout"]
    cumulative: Float[Array, " rollout"]
    restarted: Int[Array, ""]
    hidden: Float[Array, "rollout hidden"] | None
    """Of the step before, where the policy reads it; zeros where that belongs to another rollout."""


def without_ended(
    hidden: Float[Array, "*batch hidden"], ended: Bool[Array, "*batch"]
) -> Float[Array, "*batch hidden"]:
    """h of the step before each, in float32; zeros where an episode or a rollout ended with that step."""
    return jnp.where(ended[..., None], 0.0, hidden.astype(jnp.float32))


def imagine(
    dynamics: Dynamics,
    actor: Mlp | FramesMlp,
    start: StartStates,
    restarts: Float[Array, "H pool latent"],
    noise: Any,
    sampler: Callable[[Any], Sampler],
    config: TwmConfig,
    view: View = latent_alone,
) -> tuple[Trajectory, Float[Array, "rollout H_plus_1 hidden"]]:
    """Rolls the policy out in the dynamics model (section 2.3); no gradient is meant to flow through it.

    A rollout whose cumulative discount D falls under the threshold is cut, and goes on from a fresh latent:
    the k-th cut, counted by step and then by rollout, takes number k mod pool of its step's. Attention never
    looks back across a cut, just as it never looks across an episode's end.

    Args:
      dynamics: the dynamics model.
      actor: the policy.
      start: where the rollouts begin.
      restarts: latents of random replay frames, others for every step.
      noise: pytree whose leading axis is the number of steps H; one slice feeds each step.
      sampler: makes of one slice of `noise` the sampler of that step; it draws "action" and "latent".
      config: threshold, and what the policy reads.
      view: of latents and hidden states.

    Returns:
      the rollouts, and h of the start's own action token and of every imagined step.
    """
    dynamics, actor = cast_kernels(dynamics), cast_kernels(actor)
    rollouts = start.reward.shape[0]
    horizon = jax.tree.leaves(noise)[0].shape[0]
    pool = restarts.shape[1]
    reads_state = config.model.policy_reads == "state"
    chex.assert_equal_shape([start.reward, start.last])

    memory = dynamics.empty_memory(rollouts, horizon + 1)
    position_keys = dynamics.position_keys(memory.keys[0].shape[2])
    episode = jnp.zeros((rollouts, horizon + 1), jnp.int32)
    hidden_0, memory = dynamics.step(
        memory, position_keys, 0, None, start.latents[:, 0], start.action, episode
    )

    def body(carry: _Carry, inputs):
        step, noise, fresh = inputs
        draw = sampler(noise)
        # Numbering the step that is being written, and all later ones, after the episodes so far.
        later = jnp.arange(horizon + 1) >= step
        episode = carry.episode + (carry.done[:, None] & later)

        action = draw("action", OneHot.of(actor(view(carry.latent, carry.hidden))))
        hidden, memory = dynamics.step(
            carry.memory, position_keys, step, carry.reward, carry.latent, action, episode
        )
        predictions = dynamics.predict(hidden)
        discount = jax.nn.sigmoid(predictions.discount.logit)

        weight = jnp.where(carry.done, 1.0, carry.cumulative)
        cumulative = weight * discount
        done = cumulative < config.restart_threshold
        cuts = whole(done)
        order = whole(carry.restarted + jnp.cumsum(cuts) - 1)
        latent = jnp.where(done[:, None], fresh[order % pool], flat(draw("latent", predictions.latent)))
        chex.assert_equal_shape([latent, carry.latent])
        carry = _Carry(
            memory=memory,
            episode=episode,
            latent=latent,
            reward=predictions.reward,
            done=done,
            cumulative=cumulative,
            restarted=carry.restarted + jnp.sum(cuts),
            hidden=without_ended(hidden, done) if reads_state else None,
        )
        # In one array: each that a loop collects is a kernel of its own in every round.
        numbers = jnp.stack([predictions.reward, discount, done.astype(weight.dtype), weight], axis=-1)
        return carry, (latent, hidden, action, numbers)

    initial = _Carry(
        memory=memory,
        episode=episode,
        latent=start.latents[:, 1],
        reward=start.reward,
        done=start.last,
        cumulative=jnp.ones(rollouts),
        restarted=jnp.zeros((), jnp.int32),
        hidden=without_ended(hidden_0, start.last) if reads_state else None,
    )
    _, outputs = jax.lax.scan(body, initial, (jnp.arange(1, horizon + 1), noise, restarts))
    latent, hidden, action, numbers = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs)
    latent = jnp.concatenate([start.latents[:, 1:], latent], axis=1)
    hidden = jnp.concatenate([hidden_0[:, None], hidden], axis=1)
    reward, discount, done, weight = jnp.moveaxis(numbers, -1, 0)
    trajectory = Trajectory(latent, action, reward, discount, done > 0, weight)
    if config.model.policy_reads != "latent":
        ended = jnp.concatenate([start.last[:, None], trajectory.done], axis=1)
        trajectory = trajectory._replace(view=view(latent, without_ended(hidden, ended)))
    return trajectory, hidden


def generalized_advantages(
    reward: Float[Array, "rollout H"],
    discount: Float[Array, "rollout H"],
    done: Bool[Array, "rollout H"],
    value: Float[Array, "rollout H_plus_1"],
    gae_lambda: float,
) -> Float[Array, "rollout H"]:
    """A_t = δ_t + λ·c_t·A_{t+1} with δ_t = r_t + c_t·V_{t+1} − V_t and c_t = g_t·(1 − d_t).

    Generalised advantage estimation (Schulman et al. 2016, eq. 16) with predicted discounts.
    """
    chex.assert_equal_shape([reward, discount, done, value[:, 1:]])
    continues = jnp.where(done, 0.0, discount)
    delta = reward + continues * value[:, 1:] - value[:, :-1]

    def back(later, now):
        delta, factor = now
        advantage = delta + factor * later
        return advantage, advantage

    _, advantages = jax.lax.scan(
        back, jnp.zeros_like(delta[:, 0]), (delta.T, gae_lambda * continues.T), reverse=True, unroll=True
    )
    return advantages.T


class CriticOutput(NamedTuple):
    """What the actor and the logs need of the critic's pass."""

    returns: Float[Array, "rollout H"]
    advantages: Float[Array, "rollout H"]
    value: Float[Array, "rollout H_plus_1"]


class Behavior(NamedTuple):
    """Gradients and losses of critic and actor, and what they learned from."""

    gradients: dict[str, Params]
    losses: dict[str, Losses]
    critic: CriticOutput
    entropy: Float[Array, ""]


def critic_loss(
    critic: Network, trajectory: Trajectory, gae_lambda: float
) -> tuple[Float[Array, ""], CriticOutput]:
    """Mean of −weight · ln N(return; V(z), 1), the returns being A + V without gradient (eq. 7)."""
    value = critic(trajectory.seen)[..., 0]
    fixed = jax.lax.stop_gradient(value)
    advantages = generalized_advantages(
        trajectory.reward, trajectory.discount, trajectory.done, fixed, gae_lambda
    )
    returns = advantages + fixed[:, :-1]
    chex.assert_equal_shape([trajectory.weight, returns])
    negative_log_prob = 0.5 * (returns - value[:, :-1]) ** 2 + 0.5 * math.log(2 * math.pi)
    return jnp.mean(trajectory.weight * negative_log_prob), CriticOutput(returns, advantages, fixed)


def normalized_policy_entropy(actor: Network, seen: Array) -> Float[Array, ""]:
    """Mean entropy of the policy in what it sees, as a share of the largest possible one."""
    policy = OneHot.of(actor(seen))
    return jnp.mean(policy.entropy()) / math.log(policy.logits.shape[-1])


def actor_loss(
    actor: Network, trajectory: Trajectory, advantages: Float[Array, "rollout H"], config: TwmConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """REINFORCE with the given advantages, and a hinge that keeps the weighted entropy up (eq. 6).

    Returns:
      −mean(weight · ln π(a) · advantage) + scale · max(0, threshold − entropy), and that entropy as a share
      of the largest possible one.
    """
    policy = OneHot.of(actor(trajectory.seen[:, :-1]))
    log_prob = policy.log_prob(trajectory.action)
    chex.assert_equal_shape([log_prob, advantages, trajectory.weight])
    entropy = jnp.mean(trajectory.weight * policy.entropy()) / math.log(policy.logits.shape[-1])
    reinforce = -jnp.mean(trajectory.weight * log_prob * advantages)
    return reinforce + config.actor_entropy_scale * hinge(entropy, config.actor_entropy_threshold), entropy
