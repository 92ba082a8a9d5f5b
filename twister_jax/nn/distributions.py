"""Distributions over latents, actions, rewards and values. All arithmetic is float32.

Each is a frozen pytree around a network's output. `draw` gives a sample without gradient; `straight_through`
gives a sample the gradient of the probabilities.
"""

import zlib
from typing import Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Key, PRNGKeyArray

from twister_jax.randomness import uniform


def symlog(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sign(x)·ln(1 + |x|) (Hafner et al. 2023, arXiv:2301.04104, eq. 9)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The inverse of `symlog`: sign(x)·(exp(|x|) − 1)."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


@struct.dataclass
class OneHot:
    """Categorical distributions over the last axis, samples one-hot.

    `logits` are normalised log-probabilities, the uniform share already mixed in.
    """

    logits: Float[Array, "*batch classes"]

    @classmethod
    def of(cls, logits: Float[Array, "*batch classes"], uniform_mix: float = 0.0) -> "OneHot":
        """(1 − mix)·softmax(logits) + mix/classes."""
        logits = logits.astype(jnp.float32)
        if not uniform_mix:
            return cls(jax.nn.log_softmax(logits))
        probs = (1.0 - uniform_mix) * jax.nn.softmax(logits) + uniform_mix / logits.shape[-1]
        return cls(jnp.log(probs))

    @property
    def probs(self) -> Float[Array, "*batch classes"]:
        """Class probabilities."""
        return jnp.exp(self.logits)

    def draw(self, key: PRNGKeyArray) -> Float[Array, "*batch classes"]:
        """A one-hot sample, by inversion: one uniform number per variable, and no gradient."""
        probs = jax.lax.stop_gradient(self.probs)
        classes = probs.shape[-1]
        # A cumulative sum as a product with a triangular matrix: XLA's own is quadratic and unfused.
        triangle = np.triu(np.ones((classes, classes), probs.dtype))
        cumulative = jnp.matmul(probs, triangle, precision=jax.lax.Precision.HIGHEST)
        u = uniform(key, (*probs.shape[:-1], 1)) * cumulative[..., -1:]
        index = jnp.sum(cumulative <= u, axis=-1)
        return jax.nn.one_hot(jnp.minimum(index, classes - 1), classes, dtype=probs.dtype)

    def straight_through(self, sample: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
        """`sample`, with the gradient of the probabilities."""
        chex.assert_equal_shape([sample, self.logits])
        probs = self.probs
        return jax.lax.stop_gradient(sample - probs) + probs

    def mode(self) -> Float[Array, "*batch classes"]:
        """The most probable class, one-hot and without gradient."""
        return jax.nn.one_hot(jnp.argmax(self.logits, -1), self.logits.shape[-1], dtype=self.logits.dtype)

    def log_prob(self, sample: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
        """Log-probability of one-hot samples."""
        chex.assert_equal_shape([sample, self.logits])
        return jnp.sum(sample * self.logits, -1)

    def entropy(self) -> Float[Array, "*batch"]:
        """Entropy in nats."""
        return -jnp.sum(self.probs * self.logits, -1)

    def kl(self, other: "OneHot") -> Float[Array, "*batch"]:
        """KL(self ‖ other) in nats."""
        chex.assert_equal_shape([self.logits, other.logits])
        return jnp.sum(self.probs * (self.logits - other.logits), -1)


@struct.dataclass
class BoundedNormal:
    """Independent Gaussians for continuous control: mean tanh(raw), std 0.9·sigmoid(raw + 2) + 0.1."""

    mean: Float[Array, "*batch action"]
    std: Float[Array, "*batch action"]

    @classmethod
    def of(cls, raw: Float[Array, "*batch two_actions"]) -> "BoundedNormal":
        """From a network's output: means and standard deviations side by side on the last axis."""
        mean, std = jnp.split(raw.astype(jnp.float32), 2, axis=-1)
        return cls(jnp.tanh(mean), 0.9 * jax.nn.sigmoid(std + 2.0) + 0.1)

    def draw(self, key: PRNGKeyArray) -> Float[Array, "*batch action"]:
        """A sample without gradient; not clipped, the model clips what it reads."""
        noise = jax.random.normal(key, self.mean.shape)
        return jax.lax.stop_gradient(self.mean + self.std * noise)

    def mode(self) -> Float[Array, "*batch action"]:
        """The mean."""
        return self.mean

    def log_prob(self, sample: Float[Array, "*batch action"]) -> Float[Array, "*batch"]:
        """Log-density of the sample, summed over action dimensions."""
        chex.assert_equal_shape([sample, self.mean])
        standard = (sample - self.mean) / self.std
        return jnp.sum(-0.5 * standard**2 - jnp.log(self.std) - 0.5 * jnp.log(2 * jnp.pi), -1)

    def entropy(self) -> Float[Array, "*batch"]:
        """Entropy in nats, summed over action dimensions."""
        return jnp.sum(jnp.log(self.std) + 0.5 * jnp.log(2 * jnp.pi * jnp.e), -1)


@struct.dataclass
class SymlogTwoHot:
    """A scalar as a categorical over symlog bins linspace(−20, 20) (arXiv:2301.04104, eq. 10-12)."""

    logits: Float[Array, "*batch bins"]

    @property
    def _bins(self) -> Float[Array, " bins"]:
        return jnp.linspace(-20.0, 20.0, self.logits.shape[-1], dtype=jnp.float32)

    def mean(self) -> Float[Array, "*batch"]:
        """The symexp of the expected bin."""
        return symexp(jnp.sum(jax.nn.softmax(self.logits) * self._bins, -1))

    def log_prob(self, target: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Negative cross-entropy to symlog(target) split linearly between its two nearest bins."""
        chex.assert_shape(target, self.logits.shape[:-1])
        bins = self.logits.shape[-1]
        position = jnp.clip((symlog(target) + 20.0) / (40.0 / (bins - 1)), 0, bins - 1)
        # A hat function per bin gives the same two weights without gathers or scatters.
        weights = jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(bins)))
        return jnp.sum(weights * jax.nn.log_softmax(self.logits), -1)


@struct.dataclass
class Bernoulli:
    """One binary variable per entry."""

    logit: Float[Array, "*batch"]

    def log_prob(self, target: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Log-probability of targets in [0, 1], linear in between."""
        chex.assert_equal_shape([target, self.logit])
        return -(jax.nn.softplus(self.logit) - target * self.logit)

    def mode(self) -> Float[Array, "*batch"]:
        """1 where the probability is above one half."""
        return (self.logit > 0).astype(jnp.float32)


Policy = OneHot | BoundedNormal


def policy_distribution(raw: Float[Array, "*batch outputs"], discrete: bool, uniform_mix: float) -> Policy:
    """The policy that a head's output stands for: categorical for discrete actions, else Gaussian."""
    return OneHot.of(raw, uniform_mix) if discrete else BoundedNormal.of(raw)


@runtime_checkable
class Sampler(Protocol):
    """How a model draws: it asks for a sample by name. Training draws it with a key, parity looks it up."""

    def __call__(self, name: str, distribution: Policy) -> Float[Array, "*batch outcomes"]: ...


class KeySampler:
    """Draws with a key derived from the name of the draw."""

    def __init__(self, key: PRNGKeyArray):
        self._key = key

    def __call__(self, name: str, distribution: Policy) -> Array:
        return distribution.draw(jax.random.fold_in(self._key, _name_hash(name)))


class NamedKeys:
    """Draws as `KeySampler` does, with keys that were derived beforehand.

    In a loop deriving them would cost each round the many small operations of a random generator.
    """

    def __init__(self, keys: dict[str, PRNGKeyArray]):
        self._keys = keys

    @staticmethod
    def of_rounds(keys: Key[Array, " round"], *names: str) -> dict[str, Key[Array, " round"]]:
        """Of each round's key the keys of its draws."""
        return {name: jax.vmap(jax.random.fold_in, (0, None))(keys, _name_hash(name)) for name in names}

    def __call__(self, name: str, distribution: Policy) -> Array:
        return distribution.draw(self._keys[name])


class GivenSampler:
    """Returns the samples it was given."""

    def __init__(self, samples: dict[str, Array]):
        self._samples = samples

    def __call__(self, name: str, distribution: Policy) -> Array:
        return self._samples[name]


def _name_hash(name: str) -> int:
    return zlib.crc32(name.encode())
