"""TWM's observation model: a variational autoencoder with categorical latents (section 2.1).

One observation is a stack of grey frames. The latent z is all that the rest of TWM ever sees of it.
"""

import math
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from twister_jax.agents.base import Losses, Metrics
from twister_jax.agents.twm.config import TwmConfig, TwmModelConfig
from twister_jax.agents.twm.mlp import Mlp, he_uniform
from twister_jax.nn.distributions import OneHot
from twister_jax.nn.kernels import bias_silu, conv2d, conv2d_transpose
from twister_jax.nn.layers import add_bias, uniform_fan_in

_CONVOLVED = 2  # height and width: 64 -> 31 -> 14 -> 6 -> 2
_TRANSPOSED_KERNELS = (5, 5, 6, 6)  # 1 -> 5 -> 13 -> 30 -> 64


def to_float(frames: UInt8[Array, "*batch height width stack"]) -> Float[Array, "*batch height width stack"]:
    """uint8 to [0, 1]."""
    return frames.astype(jnp.float32) / 255.0


def push_frame(
    frames: UInt8[Array, "env height width stack"],
    newest: UInt8[Array, "env height width 1"],
    is_first: Bool[Array, " env"],
) -> UInt8[Array, "env height width stack"]:
    """The newest frames, oldest first, after one more; an episode's first is repeated."""
    shifted = jnp.concatenate([frames[..., 1:], newest], axis=-1)
    return jnp.where(is_first[:, None, None, None], jnp.broadcast_to(newest, frames.shape), shifted)


class Convolutions(nnx.Module):
    """Four convolutions of frames, kernel 4 and stride 2 without padding, to features as one vector."""

    def __init__(self, config: TwmModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        widths = [config.frame_stack] + [config.cnn_channels * 2**i for i in range(4)]
        shapes = [(4, 4, a, b) for a, b in pairwise(widths)]
        self.kernels = nnx.List([nnx.Param(he_uniform(rngs.params(), shape)) for shape in shapes])
        self.biases = nnx.List([nnx.Param(jnp.zeros(width)) for width in widths[1:]])

    @property
    def features(self) -> int:
        """Width of the vector."""
        return self.biases[-1][...].shape[0] * _CONVOLVED**2

    def convolve(self, frames: Float[Array, "*batch height width stack"]) -> Float[Array, "flat features"]:
        """Features of observations in [0, 1]."""
        x = frames.reshape(-1, *frames.shape[-3:]).astype(self.dtype)
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            x = conv2d(x, kernel[...].astype(self.dtype), stride=2, padding=0, epilogue=bias_silu(bias[...]))
        return x.reshape(x.shape[0], -1)


class Encoder(Convolutions):
    """Convolutions, and an MLP to the latent's logits."""

    def __init__(self, config: TwmModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.latent = (config.stoch_groups, config.stoch_classes)
        self.mlp = Mlp([self.features, *config.encoder_hidden, config.latent_size], dtype=dtype, rngs=rngs)

    def __call__(self, frames: Float[Array, "*batch height width stack"]) -> OneHot:
        """Posterior of z, [*batch, group, class], of observations in [0, 1]."""
        logits = self.mlp(self.convolve(frames))
        return OneHot.of(logits.reshape(*frames.shape[:-3], *self.latent))


class Decoder(nnx.Module):
    """From the latent back to the observation: a linear layer and four transposed convolutions, stride 2."""

    def __init__(self, config: TwmModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        channels = config.cnn_channels
        widths = [16 * channels, 4 * channels, 2 * channels, channels, config.frame_stack]
        self.project = Mlp([config.latent_size, widths[0]], after=True, dtype=dtype, rngs=rngs)
        kernels, biases = [], []
        for size, (a, b) in zip(_TRANSPOSED_KERNELS, pairwise(widths), strict=True):
            # PyTorch's default of a transposed convolution, whose fan-in is counted over the outputs.
            init = uniform_fan_in(b * size**2)
            kernels.append(nnx.Param(init(rngs.params(), (size, size, a, b))))
            biases.append(nnx.Param(init(rngs.params(), (b,))))
        biases[-1] = nnx.Param(jnp.full(config.frame_stack, 0.5, jnp.float32))
        self.kernels = nnx.List(kernels)
        self.biases = nnx.List(biases)

    def __call__(self, latent: Float[Array, "*batch latent"]) -> Float[Array, "*batch height width stack"]:
        """Mean of the observation, float32."""
        x = self.project(latent.reshape(-1, latent.shape[-1]))
        # The first transposed convolution reads a single pixel: it is a linear layer.
        kernel = self.kernels[0][...].astype(self.dtype)
        x = bias_silu(self.biases[0][...])(jnp.einsum("nc,hwcd->nhwd", x, kernel))
        epilogues = [*(bias_silu(bias[...]) for bias in self.biases[1:-1]), None]
        for weight, epilogue in zip(self.kernels[1:], epilogues, strict=True):
            x = conv2d_transpose(x, weight[...].astype(self.dtype), stride=2, padding=0, epilogue=epilogue)
        x = add_bias(x, self.biases[-1][...])
        return x.astype(jnp.float32).reshape(*latent.shape[:-1], *x.shape[1:])


class ObservationModel(nnx.Module):
    """Encoder and decoder."""

    def __init__(self, config: TwmModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)


def flat(sample: Float[Array, "*batch group class"]) -> Float[Array, "*batch latent"]:
    """The latent as one vector."""
    return sample.reshape(*sample.shape[:-2], -1)


def decoder_loss(
    mean: Float[Array, "*batch height width stack"], frames: Float[Array, "*batch height width stack"]
) -> Float[Array, ""]:
    """The mean over observations of −ln N(frames; mean, 1), summed over an observation (eq. 4)."""
    chex.assert_equal_shape([mean, frames])
    per_frame = jnp.sum((frames - mean) ** 2, axis=(-3, -2, -1))
    pixels = math.prod(frames.shape[-3:])
    return 0.5 * jnp.mean(per_frame) + 0.5 * pixels * math.log(2 * math.pi)


def normalized_entropy(posterior: OneHot) -> Float[Array, ""]:
    """Mean entropy of the latents, as a share of the largest possible one."""
    groups, classes = posterior.logits.shape[-2:]
    return jnp.mean(jnp.sum(posterior.entropy(), -1)) / (groups * math.log(classes))


def hinge(value: Float[Array, ""], threshold: float) -> Float[Array, ""]:
    """Keeps an entropy from collapsing without pushing it further up: max(0, threshold − value)."""
    return jax.nn.relu(threshold - value)


def consistency_loss(posterior: OneHot, predicted: Float[Array, "*batch group class"]) -> Float[Array, ""]:
    """Cross-entropy from the dynamics model's prediction (no gradient) to the posterior (eq. 4)."""
    chex.assert_equal_shape([posterior.logits, predicted])
    cross_entropy = -jnp.sum(jax.lax.stop_gradient(predicted) * posterior.logits, axis=(-2, -1))
    return jnp.mean(cross_entropy)


def observation_losses(
    decoder: Decoder,
    posterior: OneHot,
    sample: Float[Array, "*batch group class"],
    frames: Float[Array, "*batch height width stack"],
    config: TwmConfig,
) -> tuple[Losses, Metrics]:
    """Decoder and entropy loss (eq. 4), unscaled, and what is logged with them.

    Args:
      decoder: the decoder whose parameters are trained.
      posterior: the encoder's distributions, with gradient.
      sample: draws from them; gradients pass straight through.
      frames: the observations, in [0, 1].
      config: threshold of the entropy.
    """
    mean = decoder(flat(posterior.straight_through(sample)))
    entropy = normalized_entropy(posterior)
    losses = {
        "decoder": decoder_loss(mean, frames),
        "entropy": hinge(entropy, config.entropy_threshold),
    }
    return losses, {
        "entropy/posterior": entropy,
        "reconstruction_error": jnp.mean(jnp.abs(frames - mean)),
    }
