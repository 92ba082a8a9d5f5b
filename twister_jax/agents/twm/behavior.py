"""TWM's behaviour: imagined rollouts that restart, generalised advantages, actor and critic (section 2.3).

Policy and value read the latent z alone: acting needs the encoder but no transformer.
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

from twister_jax.agents.twm.config import TwmConfig
from twister_jax.agents.twm.dynamics import Dynamics, Memory
from twister_jax.agents.twm.mlp import Mlp
from twister_jax.agents.twm.observation import flat, hinge
from twister_jax.nn.distributions import OneHot, Sampler
from twister_jax.nn.layers import cast_kernels


def behavior_network(
    latent: int, widths: tuple[int, ...], outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> Mlp:
    """Actor or critic: orthogonal weights, zero biases."""
    return Mlp(
        [latent, *widths, outputs],
        hidden_init=nnx.initializers.orthogonal(math.sqrt(2.0)),
        output_init=nnx.initializers.orthogonal(1.0),
        dtype=dtype,
        rngs=rngs,
    )


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


class _Carry(NamedTuple):
    memory: Memory
    episode: Int[Array, "rollout step"]
    latent: Float[Array, "rollout latent"]
    reward: Float[Array, " rollout"]
    done: Bool[Array, " rollout"]
    cumulative: Float[Array, " rollout"]
    restarted: Int[Array, ""]


def imagine(
    dynamics: Dynamics,
    actor: Mlp,
    start: StartStates,
    restarts: Float[Array, "H pool latent"],
    noise: Any,
    sampler: Callable[[Any], Sampler],
    config: TwmConfig,
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
      config: threshold.

    Returns:
      the rollouts, and h of the start's own action token and of every imagined step.
    """
    dynamics, actor = cast_kernels(dynamics), cast_kernels(actor)
    rollouts = start.reward.shape[0]
    horizon = jax.tree.leaves(noise)[0].shape[0]
    pool = restarts.shape[1]
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

        action = draw("action", OneHot.of(actor(carry.latent)))
        hidden, memory = dynamics.step(
            carry.memory, position_keys, step, carry.reward, carry.latent, action, episode
        )
        predictions = dynamics.predict(hidden)
        discount = jax.nn.sigmoid(predictions.discount.logit)

        weight = jnp.where(carry.done, 1.0, carry.cumulative)
        cumulative = weight * discount
        done = cumulative < config.restart_threshold
        order = carry.restarted + jnp.cumsum(done) - 1
        latent = jnp.where(done[:, None], fresh[order % pool], flat(draw("latent", predictions.latent)))
        chex.assert_equal_shape([latent, carry.latent])
        carry = _Carry(
            memory=memory,
            episode=episode,
            latent=latent,
            reward=predictions.reward,
            done=done,
            cumulative=cumulative,
            restarted=carry.restarted + jnp.sum(done),
        )
        return carry, (latent, hidden, action, predictions.reward, discount, done, weight)

    initial = _Carry(
        memory=memory,
        episode=episode,
        latent=start.latents[:, 1],
        reward=start.reward,
        done=start.last,
        cumulative=jnp.ones(rollouts),
        restarted=jnp.zeros((), jnp.int32),
    )
    _, outputs = jax.lax.scan(body, initial, (jnp.arange(1, horizon + 1), noise, restarts))
    latent, hidden, *rest = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs)
    latent = jnp.concatenate([start.latents[:, 1:], latent], axis=1)
    hidden = jnp.concatenate([hidden_0[:, None], hidden], axis=1)
    return Trajectory(latent, *rest), hidden


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


def critic_loss(
    critic: Mlp, trajectory: Trajectory, gae_lambda: float
) -> tuple[Float[Array, ""], CriticOutput]:
    """Mean of −weight · ln N(return; V(z), 1), the returns being A + V without gradient (eq. 7)."""
    value = critic(trajectory.latent)[..., 0]
    fixed = jax.lax.stop_gradient(value)
    advantages = generalized_advantages(
        trajectory.reward, trajectory.discount, trajectory.done, fixed, gae_lambda
    )
    returns = advantages + fixed[:, :-1]
    chex.assert_equal_shape([trajectory.weight, returns])
    negative_log_prob = 0.5 * (returns - value[:, :-1]) ** 2 + 0.5 * math.log(2 * math.pi)
    return jnp.mean(trajectory.weight * negative_log_prob), CriticOutput(returns, advantages, fixed)


def normalized_policy_entropy(actor: Mlp, latent: Float[Array, "*batch latent"]) -> Float[Array, ""]:
    """Mean entropy of the policy, as a share of the largest possible one."""
    policy = OneHot.of(actor(latent))
    return jnp.mean(policy.entropy()) / math.log(policy.logits.shape[-1])


def actor_loss(
    actor: Mlp, trajectory: Trajectory, advantages: Float[Array, "rollout H"], config: TwmConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """REINFORCE with the given advantages, and a hinge that keeps the weighted entropy up (eq. 6).

    Returns:
      −mean(weight · ln π(a) · advantage) + scale · max(0, threshold − entropy), and that entropy as a share
      of the largest possible one.
    """
    policy = OneHot.of(actor(trajectory.latent[:, :-1]))
    log_prob = policy.log_prob(trajectory.action)
    chex.assert_equal_shape([log_prob, advantages, trajectory.weight])
    entropy = jnp.mean(trajectory.weight * policy.entropy()) / math.log(policy.logits.shape[-1])
    reinforce = -jnp.mean(trajectory.weight * log_prob * advantages)
    return reinforce + config.actor_entropy_scale * hinge(entropy, config.actor_entropy_threshold), entropy
