"""TWISTER's behaviour: actor and critic, learned in imagination (section 3.4).

From every posterior state of the batch the world model imagines H steps under the policy; λ-returns over
them train the critic, and REINFORCE with the normalised advantage trains the actor.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from twister_jax.agents.twister.config import TwisterConfig, TwisterModelConfig
from twister_jax.agents.twister.world_model import Observed, WorldModel, features
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.distributions import Policy, Sampler, SymlogTwoHot, policy_distribution
from twister_jax.nn.layers import Head, cast_kernels, logits_init
from twister_jax.nn.transformer import KeyValueCache


class Actor(nnx.Module):
    """π(a | z, h)."""

    def __init__(self, config: TwisterModelConfig, spec: EnvSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.discrete = spec.discrete
        self.uniform_mix = config.uniform_mix
        outputs = spec.num_actions if spec.discrete else 2 * spec.num_actions
        self.head = Head(
            config.feature_size, config.hidden_size, outputs, output_init=logits_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, features: Float[Array, "*batch feature"]) -> Policy:
        return policy_distribution(self.head(features), self.discrete, self.uniform_mix)


class Critic(nnx.Module):
    """v(z, h), a distribution over returns."""

    def __init__(self, config: TwisterModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.head = Head(
            config.feature_size,
            config.hidden_size,
            config.num_bins,
            output_init=zeros,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, features: Float[Array, "*batch feature"]) -> SymlogTwoHot:
        return SymlogTwoHot(self.head(features))


@struct.dataclass
class StartStates:
    """States that imagination starts from, one per sequence."""

    latent: Float[Array, "sequence latent"]
    deter: Float[Array, "sequence hidden"]
    cache: KeyValueCache
    continues: Float[Array, " sequence"]
    """1 − terminal, the truth about the start state."""


def start_states(
    model: WorldModel,
    observed: Observed,
    is_first: Bool[Array, "batch time"],
    terminal: Bool[Array, "batch time"],
) -> StartStates:
    """All B·L posterior states of a training pass, batch-major and detached, with their context."""
    observed = jax.lax.stop_gradient(observed)
    sequences = is_first.size
    return StartStates(
        latent=observed.latent.reshape(sequences, -1),
        deter=observed.deter.reshape(sequences, -1),
        cache=model.transformer.window_caches(observed.cache, is_first),
        continues=1.0 - terminal.reshape(sequences).astype(jnp.float32),
    )


@struct.dataclass
class Trajectory:
    """Imagined states 0…H and the actions 0…H−1 between them. State 0 is the start."""

    latent: Float[Array, "states sequence latent"]
    deter: Float[Array, "states sequence hidden"]
    action: Float[Array, "steps sequence action"]

    @property
    def features(self) -> Float[Array, "states sequence feature"]:
        """(z, h) of every state."""
        return features(self.latent, self.deter)


def imagine(
    model: WorldModel,
    actor: Actor,
    start: StartStates,
    noise: Any,
    sampler: Callable[[Any], Sampler],
) -> Trajectory:
    """Rolls the world model forward under the policy.

    Args:
      model: the world model, used without dropout.
      actor: the policy.
      start: states and context.
      noise: pytree whose leading axis is the number of steps H; one slice feeds each step.
      sampler: makes of one slice of `noise` the sampler of that step; it draws "action" and "prior".
    """
    model, actor = cast_kernels(model), cast_kernels(actor)
    position_table = model.transformer.position_table()

    def step(carry, noise):
        latent, deter, cache = carry
        draw = sampler(noise)
        action = draw("action", actor(features(latent, deter)))
        deter, cache = model.step(latent, action, cache, position_table)
        prior = model.prior(deter)
        latent = draw("prior", prior)
        latent = latent.reshape(*latent.shape[:-2], -1)
        return (latent, deter, cache), (latent, deter, action)

    start_carry = (start.latent, start.deter, start.cache)
    _, (latent, deter, action) = jax.lax.scan(step, start_carry, noise)
    return Trajectory(
        latent=jnp.concatenate([start.latent[None], latent]),
        deter=jnp.concatenate([start.deter[None], deter]),
        action=action,
    )


def lambda_returns(
    reward: Float[Array, "steps sequence"],
    discount: Float[Array, "steps sequence"],
    value: Float[Array, "steps sequence"],
    gae_lambda: float,
) -> Float[Array, "steps sequence"]:
    """R_t = r_t + d_t·((1 − λ)·v_t + λ·R_{t+1}), bootstrapped with the last value (eq. 8).

    All three belong to the state that step t arrives in.
    """
    chex.assert_equal_shape([reward, discount, value])

    def step(future, inputs):
        reward, discount, value = inputs
        future = reward + discount * ((1.0 - gae_lambda) * value + gae_lambda * future)
        return future, future

    return jax.lax.scan(step, value[-1], (reward, discount, value), reverse=True, unroll=True)[1]


@struct.dataclass
class ReturnScale:
    """Moving averages of two quantiles of the returns."""

    low: Float[Array, ""]
    high: Float[Array, ""]

    @classmethod
    def zero(cls) -> "ReturnScale":
        """Before any return was seen."""
        return cls(jnp.zeros(()), jnp.zeros(()))

    def update(self, returns: Array, quantiles: tuple[float, float], decay: float) -> "ReturnScale":
        """One step of the moving averages."""
        low, high = jnp.quantile(returns, jnp.asarray(quantiles))
        return ReturnScale(decay * self.low + (1.0 - decay) * low, decay * self.high + (1.0 - decay) * high)

    @property
    def scale(self) -> Float[Array, ""]:
        """S = max(1, high − low): small returns are not blown up."""
        return jnp.maximum(1.0, self.high - self.low)


@struct.dataclass
class Targets:
    """What actor and critic learn from; nothing here carries a gradient."""

    returns: Float[Array, "steps sequence"]
    value: Float[Array, "states sequence"]
    reward: Float[Array, "states sequence"]
    continues: Float[Array, "states sequence"]
    weight: Float[Array, "states sequence"]
    """Product of the discounts up to and including a state, divided by one discount."""
    return_scale: ReturnScale


def make_targets(
    model: WorldModel,
    value: Float[Array, "states sequence"],
    trajectory: Trajectory,
    start_continues: Float[Array, " sequence"],
    return_scale: ReturnScale,
    config: TwisterConfig,
) -> Targets:
    """Predicted rewards and ends of an imagined trajectory, its λ-returns and weights."""
    imagined = trajectory.features
    reward = model.reward(imagined).mean()
    continues = jnp.concatenate([start_continues[None], model.continues(imagined[1:]).mode()])
    chex.assert_equal_shape([reward, continues, value])
    discount = config.discount * continues
    returns = lambda_returns(reward[1:], discount[1:], value[1:], config.gae_lambda)
    targets = Targets(
        returns=returns,
        value=value,
        reward=reward,
        continues=continues,
        weight=jnp.cumprod(discount, axis=0) / config.discount,
        return_scale=return_scale.update(returns, config.return_quantiles, config.return_scale_decay),
    )
    return jax.lax.stop_gradient(targets)


def actor_loss(
    policy: Policy,
    action: Float[Array, "steps sequence action"],
    targets: Targets,
    config: TwisterConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """REINFORCE with normalised advantages and an entropy bonus (eq. 10). Returns loss and mean entropy."""
    advantage = (targets.returns - targets.value[:-1]) / targets.return_scale.scale
    entropy = policy.entropy()
    log_prob = policy.log_prob(jax.lax.stop_gradient(action))
    chex.assert_equal_shape([advantage, entropy, log_prob, targets.weight[:-1]])
    objective = log_prob * advantage + config.entropy_scale * entropy
    return -jnp.mean(targets.weight[:-1] * objective), jnp.mean(entropy)


def critic_loss(
    value: SymlogTwoHot,
    slow_mean: Float[Array, "steps sequence"],
    targets: Targets,
    config: TwisterConfig,
) -> Float[Array, ""]:
    """Two-hot cross-entropy to the λ-returns and to the slow critic's mean (eq. 9)."""
    log_prob = value.log_prob(targets.returns) + config.slow_critic_scale * value.log_prob(
        jax.lax.stop_gradient(slow_mean)
    )
    chex.assert_equal_shape([log_prob, targets.weight[:-1]])
    return -jnp.mean(targets.weight[:-1] * log_prob)
