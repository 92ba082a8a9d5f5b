"""TWISTER's world model: what is in an image, what comes next, what it is worth (section 3.2).

z_t, the latent, is read from the image alone; h_t, the deterministic state, is the transformer's summary of
earlier latents and actions; the prior ẑ_t is predicted from h_t. Everything downstream reads (z, h).
"""

import dataclasses
import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from twister_jax.agents.base import Losses, weighted_sum
from twister_jax.agents.twister.augment import random_resized_crop
from twister_jax.agents.twister.config import TwisterConfig, TwisterModelConfig
from twister_jax.agents.twister.contrastive import ContrastiveHeads, info_nce, step_weights
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec
from twister_jax.nn.distributions import Bernoulli, OneHot, Sampler, SymlogTwoHot
from twister_jax.nn.kernels import conv2d, conv2d_transpose, norm_silu
from twister_jax.nn.layers import Head, Linear, NormedLinear, layer_norm, logits_init, trunk_init
from twister_jax.nn.transformer import KeysValues, KeyValueCache, Transformer
from twister_jax.replay.store import Transition


def to_float(
    images: UInt8[Array, "*batch height width channel"],
) -> Float[Array, "*batch height width channel"]:
    """uint8/255 − 0.5."""
    return images.astype(jnp.float32) / 255.0 - 0.5


class Encoder(nnx.Module):
    """Four convolutions, kernel 4 and stride 2, to the logits of the posterior."""

    def __init__(self, channels_in: int, config: TwisterModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.latent = (config.stoch_groups, config.stoch_classes)
        widths = [channels_in] + [config.cnn_channels * 2**i for i in range(4)]
        self.kernels = nnx.List(
            [nnx.Param(trunk_init(rngs.params(), (4, 4, a, b))) for a, b in itertools.pairwise(widths)]
        )
        self.norms = nnx.List([layer_norm(width, 1e-3, dtype=dtype, rngs=rngs) for width in widths[1:]])
        self.logits = Linear(
            widths[-1] * (IMAGE_SIZE // 16) ** 2,
            config.latent_size,
            kernel_init=logits_init,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array, "*batch height width channel"]
    ) -> Float[Array, "*batch group class"]:
        """Logits for images in [−0.5, 0.5]."""
        x = images.reshape(-1, *images.shape[-3:]).astype(self.dtype)
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = conv2d(x, kernel[...].astype(self.dtype), stride=2, padding=1, epilogue=norm_silu(norm))
        logits = self.logits(x.reshape(x.shape[0], -1)).astype(jnp.float32)
        return logits.reshape(*images.shape[:-3], *self.latent)


class Decoder(nnx.Module):
    """Back to the image, by four transposed convolutions: from the latent alone, or from (z, h)."""

    def __init__(self, channels_out: int, config: TwisterModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        widths = [config.cnn_channels * 2**i for i in (3, 2, 1, 0)] + [channels_out]
        self.start = (IMAGE_SIZE // 16, IMAGE_SIZE // 16, widths[0])
        self.project = Linear(
            config.feature_size if config.decoder_reads_state else config.latent_size,
            widths[0] * (IMAGE_SIZE // 16) ** 2,
            kernel_init=logits_init,
            dtype=dtype,
            rngs=rngs,
        )
        inits = [trunk_init] * 3 + [logits_init]
        self.kernels = nnx.List(
            [
                nnx.Param(init(rngs.params(), (4, 4, a, b)))
                for init, (a, b) in zip(inits, itertools.pairwise(widths), strict=True)
            ]
        )
        self.norms = nnx.List([layer_norm(width, 1e-3, dtype=dtype, rngs=rngs) for width in widths[1:-1]])
        self.bias = nnx.Param(jnp.zeros(channels_out))

    def __call__(self, inputs: Float[Array, "*batch input"]) -> Float[Array, "*batch height width channel"]:
        """Images in [−0.5, 0.5], float32."""
        x = self.project(inputs.reshape(-1, inputs.shape[-1])).reshape(-1, *self.start)
        for kernel, epilogue in zip(self.kernels, [*map(norm_silu, self.norms), None], strict=True):
            x = conv2d_transpose(x, kernel[...].astype(self.dtype), stride=2, padding=1, epilogue=epilogue)
        x = x.astype(jnp.float32) + self.bias[...]
        return x.reshape(*inputs.shape[:-1], *x.shape[1:])


class Observed(NamedTuple):
    """What the training pass over a batch of windows computed."""

    posterior: OneHot
    """[batch, time, group, class], from the image alone."""
    prior: OneHot
    """The same, predicted from h."""
    latent: Float[Array, "batch time latent"]
    """z: the posterior's sample, flat."""
    prior_latent: Float[Array, "batch time latent"]
    """ẑ: the prior's own sample, flat."""
    deter: Float[Array, "batch time hidden"]
    actions: Float[Array, "batch time action"]
    """As the model read them: zero wherever a sequence starts."""
    cache: KeysValues
    """Keys and values of every block, the context that imagination starts from."""


class WorldModel(nnx.Module):
    """Encoder, decoder, transformer state-space model, and the heads that are trained with them."""

    def __init__(self, config: TwisterModelConfig, spec: EnvSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = config.hidden_size
        latent = config.latent_size
        features = config.feature_size
        self.config = config
        self.encoder = Encoder(spec.image_shape[-1], config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(spec.image_shape[-1], config, dtype=dtype, rngs=rngs)
        self.initial_deter = nnx.Param(jnp.zeros(hidden))
        self.action_mixer = nnx.List(
            [
                NormedLinear(latent + spec.num_actions, hidden, dtype=dtype, rngs=rngs),
                NormedLinear(hidden, hidden, activate=False, dtype=dtype, rngs=rngs),
            ]
        )
        self.transformer = Transformer(
            hidden,
            config.transformer_blocks,
            config.attention_heads,
            config.attention_context,
            config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.prior_logits = Linear(hidden, latent, kernel_init=logits_init, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.reward_head = Head(features, hidden, config.num_bins, output_init=zeros, dtype=dtype, rngs=rngs)
        self.continue_head = Head(features, hidden, 1, output_init=logits_init, dtype=dtype, rngs=rngs)
        self.contrastive = ContrastiveHeads(
            features,
            latent,
            spec.num_actions if config.contrastive_actions else 0,
            config.contrastive_steps,
            config.contrastive_size,
            dtype=dtype,
            rngs=rngs,
        )

    def posterior(self, images: Float[Array, "*batch height width channel"]) -> OneHot:
        """Distribution of z given the image."""
        return OneHot.of(self.encoder(images), self.config.uniform_mix)

    def prior(self, deter: Float[Array, "*batch hidden"]) -> OneHot:
        """Distribution of ẑ given h."""
        logits = self.prior_logits(deter)
        shape = (*deter.shape[:-1], self.config.stoch_groups, self.config.stoch_classes)
        return OneHot.of(logits.reshape(shape), self.config.uniform_mix)

    def initial_latent(self) -> Float[Array, " latent"]:
        """z before the first step: the mode of h_init's prior, with the gradient of its log-probabilities."""
        prior = self.prior(self.initial_deter[...])
        return (prior.mode() + prior.logits - jax.lax.stop_gradient(prior.logits)).reshape(-1)

    def mix(
        self, latent: Float[Array, "*batch latent"], action: Float[Array, "*batch action"]
    ) -> Float[Array, "*batch hidden"]:
        """Transformer input of the transition that (z_{t−1}, a_t) makes."""
        magnitude = jnp.maximum(1.0, jnp.abs(action))
        x = jnp.concatenate([latent, action / jax.lax.stop_gradient(magnitude)], axis=-1)
        for layer in self.action_mixer:
            x = layer(x)
        return x

    def decode(
        self, latent: Float[Array, "*batch latent"], deter: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch height width channel"]:
        """Images in [−0.5, 0.5] of states; as published, h has no say in them."""
        return self.decoder(features(latent, deter) if self.config.decoder_reads_state else latent)

    def reward(self, features: Float[Array, "*batch feature"]) -> SymlogTwoHot:
        """Reward that came with a state."""
        return SymlogTwoHot(self.reward_head(features))

    def continues(self, features: Float[Array, "*batch feature"]) -> Bernoulli:
        """Whether the episode goes on after a state."""
        return Bernoulli(self.continue_head(features)[..., 0])

    def observe(
        self,
        posterior: OneHot,
        actions: Float[Array, "batch time action"],
        is_first: Bool[Array, "batch time"],
        sampler: Sampler,
        dropout_key: PRNGKeyArray | None,
    ) -> Observed:
        """The training pass over windows of replay (eq. 1), given the posterior of their images."""
        length = is_first.shape[1]
        latent = _sample(posterior, sampler, "posterior")

        starts = is_first | (jnp.arange(length) == 0)
        previous = jnp.concatenate([jnp.zeros_like(latent[:, :1]), latent[:, :-1]], axis=1)
        previous = jnp.where(starts[..., None], self.initial_latent(), previous)
        actions = jnp.where(starts[..., None], 0.0, actions)
        deter, cache = self.transformer(self.mix(previous, actions), is_first, dropout_key)

        prior = self.prior(deter)
        prior_latent = _sample(prior, sampler, "prior")
        chex.assert_equal_shape([latent, prior_latent])
        return Observed(posterior, prior, latent, prior_latent, deter, actions, cache)

    def step(
        self,
        latent: Float[Array, "sequence latent"],
        action: Float[Array, "sequence action"],
        cache: KeyValueCache,
        position_table: Float[Array, "block head two_slots size"],
    ) -> tuple[Float[Array, "sequence hidden"], KeyValueCache]:
        """One more transition of every sequence: its h, and the cache that holds it too."""
        return self.transformer.step(self.mix(latent, action), cache, position_table)

    def proceed(
        self,
        latent: Float[Array, "sequence latent"],
        action: Float[Array, "sequence action"],
        cache: KeyValueCache,
        is_first: Bool[Array, " sequence"],
    ) -> tuple[Float[Array, "sequence hidden"], KeyValueCache]:
        """`step` into a real step: where that is an episode's first, nothing earlier counts."""
        first = is_first[:, None]
        latent = jnp.where(first, self.initial_latent(), latent)
        cache = dataclasses.replace(cache, visible=cache.visible & ~first)
        action = jnp.where(first, 0.0, action)
        return self.step(latent, action, cache, self.transformer.position_table())


def features(latent: Float[Array, "*batch latent"], deter: Float[Array, "*batch hidden"]) -> Array:
    """The features (z, h), in the precision of h."""
    return jnp.concatenate([latent.astype(deter.dtype), deter], axis=-1)


def _sample(distribution: OneHot, sampler: Sampler, name: str) -> Float[Array, "*batch latent"]:
    sample = distribution.straight_through(sampler(name, distribution))
    return sample.reshape(*sample.shape[:-2], -1)


@struct.dataclass
class WorldModelOutput:
    """Losses by name, and what the rest of the update and the logs need."""

    losses: Losses
    """Unscaled terms, each a mean over batch and time."""
    observed: Observed
    contrastive_accuracy: Float[Array, " step"]
    augmented: OneHot
    decoded: Float[Array, "batch time height width channel"]
    reward: SymlogTwoHot
    continues: Bernoulli


def loss_scales(config: TwisterConfig) -> dict[str, float | Float[Array, ""]]:
    """The weight of every world-model loss."""
    weights = step_weights(config.model.contrastive_steps, config.contrastive_decay)
    return {
        "image": config.image_scale,
        "reward": config.reward_scale,
        "continue": config.continue_scale,
        "dynamics": config.dynamics_scale,
        "representation": config.representation_scale,
        **{f"contrastive_{k}": config.contrastive_scale * weights[k] for k in range(len(weights))},
    }


def world_model_loss(
    model: WorldModel,
    windows: Transition,
    config: TwisterConfig,
    sampler: Sampler,
    augmented: Float[Array, "batch time height width channel"],
    dropout_key: PRNGKeyArray | None,
) -> tuple[Float[Array, ""], WorldModelOutput]:
    """The world-model loss on replayed windows (eq. 5): the scaled sum, and its parts.

    Args:
      model: the world model whose parameters are trained.
      windows: [batch, time, ...] steps as stored.
      config: loss scales.
      sampler: draws "posterior", "prior" and "augmented".
      augmented: the second view of the images, in [−0.5, 0.5].
      dropout_key: key of the transformer's dropout; None switches it off.
    """
    images = to_float(windows.image)
    # Both views in one pass of the encoder.
    both = model.posterior(jnp.concatenate([images, augmented], axis=1))
    posterior, view = (jax.tree.map(lambda x, i=i: jnp.split(x, 2, axis=1)[i], both) for i in (0, 1))
    seen = model.observe(posterior, windows.action, windows.is_first, sampler, dropout_key)
    posterior_features = features(seen.latent, seen.deter)

    decoded = model.decode(seen.latent, seen.deter)
    reward = model.reward(posterior_features)
    continues = model.continues(posterior_features)

    stop = jax.lax.stop_gradient
    dynamics = jnp.sum(stop(seen.posterior).kl(seen.prior), -1)
    representation = jnp.sum(seen.posterior.kl(stop(seen.prior)), -1)

    queries = model.contrastive.queries(features(seen.prior_latent, seen.deter), seen.actions)
    keys = model.contrastive.keys(_sample(view, sampler, "augmented"))
    contrastive, accuracy = info_nce(queries, keys)

    losses = {
        "image": jnp.mean(jnp.sum((decoded - images) ** 2, axis=(-3, -2, -1))),
        "reward": -jnp.mean(reward.log_prob(windows.reward)),
        "continue": -jnp.mean(continues.log_prob(1.0 - windows.terminal)),
        "dynamics": jnp.mean(jnp.maximum(config.free_nats, dynamics)),
        "representation": jnp.mean(jnp.maximum(config.free_nats, representation)),
        **{f"contrastive_{k}": contrastive[k] for k in range(len(contrastive))},
    }
    total = weighted_sum(losses, loss_scales(config))
    return total, WorldModelOutput(losses, seen, accuracy, view, decoded, reward, continues)


def augment(key: PRNGKeyArray, windows: Transition, config: TwisterConfig) -> Array:
    """An independent random resized crop of every frame, in [−0.5, 0.5]."""
    images = to_float(windows.image)
    flat = images.reshape(-1, *images.shape[2:])
    return random_resized_crop(key, flat, config.crop_area, config.crop_aspect).reshape(images.shape)
