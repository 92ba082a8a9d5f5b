"""TWM's update in pieces; the order and the functions are those of `twister_jax.twm.agent`."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.pieces import Convolution, Piece, Pieces, convolution_layers, in_order
from benchmarks.subject import Subject
from twister_jax.agent import compute_dtype
from twister_jax.config import TwmConfig
from twister_jax.nn.distributions import KeySampler
from twister_jax.optimizer import apply_gradients
from twister_jax.twm import behavior
from twister_jax.twm.agent import NETWORKS, make_networks
from twister_jax.twm.dynamics import dynamics_total
from twister_jax.twm.observation import IMAGE_SIZE, flat, to_float
from twister_jax.twm.world_model import dynamics_pass, starts, world_model_loss

PUBLISHED_FLOPS = 2.06e12
"""Products of one update at the paper's setting."""

LOOP_OVERRIDES: dict[str, Any] = {
    "algorithm.pretrain_observation_samples": 0,
    "algorithm.pretrain_dynamics_samples": 0,
    "algorithm.pretrain_behavior_samples": 0,
}
"""What makes a short run of the loop get to its updates."""


def pieces(subject: Subject, key: jax.Array) -> Pieces:
    """From the replay to the new parameters."""
    algorithm, state = subject.config.algorithm, subject.state
    assert isinstance(algorithm, TwmConfig)
    networks = make_networks(algorithm, subject.spec.num_actions, compute_dtype(subject.config.precision))
    merge = networks.merge
    params = state.params

    def sample(replay, key):
        return subject.agent.sample(replay, key)[0]  # the replay, not donated here, would be copied

    batch = yield Piece("replay sampling", sample, (subject.replay, key))
    windows = batch.windows

    # Encoder and decoder, on the steps that are trained on.
    trained = jax.jit(lambda windows: to_float(windows.frames[:, 1:-1]))(windows)

    def encode(observation, frames):
        return merge("observation", observation).encoder(frames).logits

    def decode(observation, latent):
        return merge("observation", observation).decoder(latent)

    def encoder_gradient(encoder, observation, frames):
        def loss(encoder):
            return jnp.sum(encode({**observation, "encoder": encoder}, frames) ** 2)

        return jax.grad(loss)(encoder)

    def decoder_gradient(decoder, latent, observation, frames):
        def loss(decoder, latent):
            return jnp.sum((decode({**observation, "decoder": decoder}, latent) - frames) ** 2)

        return jax.grad(loss, argnums=(0, 1))(decoder, latent)

    observation = params["observation"]
    yield Piece("encoder forward", encode, (observation, trained), whole=False)
    yield Piece(
        "encoder forward+backward",
        encoder_gradient,
        (observation["encoder"], observation, trained),
        whole=False,
    )

    # The world model.
    def world_model(observation, dynamics, windows, key):
        models = merge("observation", observation), merge("dynamics", dynamics)
        return world_model_loss(*models, windows, algorithm, KeySampler(key), key)

    world_model_args = (observation, params["dynamics"], windows, key)
    _, seen = yield Piece("world model forward", world_model, world_model_args, whole=False)
    yield Piece("decoder forward", decode, (observation, seen.latent[:, 1:]), whole=False)
    yield Piece(
        "decoder forward+backward",
        decoder_gradient,
        (observation["decoder"], seen.latent[:, 1:], observation, trained),
        whole=False,
    )

    def dynamics_gradient(dynamics, latent, posterior, windows, key):
        def loss(dynamics):
            model = merge("dynamics", dynamics)
            return dynamics_total(
                dynamics_pass(model, latent, posterior, windows, algorithm, key)[0], algorithm
            )

        return jax.grad(loss)(dynamics)

    yield Piece(
        "dynamics model forward+backward",
        dynamics_gradient,
        (params["dynamics"], seen.latent, seen.posterior, windows, key),
        whole=False,
    )
    gradients, seen = yield Piece(
        "world model forward+backward",
        jax.grad(world_model, argnums=(0, 1), has_aux=True),
        world_model_args,
    )

    def step(names):
        def apply(gradients, state):
            return [
                apply_gradients(
                    getattr(algorithm, f"{name}_optimizer"),
                    gradient,
                    state.params[name],
                    state.optimizers[name],
                    jnp.ones((), bool),
                )
                for name, gradient in zip(names, gradients, strict=True)
            ]

        return apply

    yield Piece("optimisers, world model", step(NETWORKS[:2]), (gradients, state))

    # Imagination.
    def imagination(params, latent, batch, key):
        candidates = starts(latent, batch.windows)
        chosen = jax.random.permutation(key, candidates.reward.shape[0])[: algorithm.imagination_batch]
        encoder = merge("observation", params["observation"]).encoder
        return behavior.imagine(
            merge("dynamics", params["dynamics"]),
            merge("actor", params["actor"]),
            jax.tree.map(lambda x: x[chosen], candidates),
            flat(encoder(to_float(batch.fresh)).draw(key)),
            jax.random.split(key, algorithm.imagination_horizon),
            KeySampler,
            algorithm,
        )[0]

    trajectory = yield Piece("imagination", imagination, (params, seen.latent, batch, key))

    # Actor and critic.
    def actor_and_critic(params, trajectory):
        def loss_of_critic(critic):
            return behavior.critic_loss(merge("critic", critic), trajectory, algorithm.gae_lambda)

        critic, seen = jax.grad(loss_of_critic, has_aux=True)(params["critic"])

        def loss_of_actor(actor):
            return behavior.actor_loss(merge("actor", actor), trajectory, seen.advantages, algorithm)[0]

        return critic, jax.grad(loss_of_actor)(params["actor"])

    gradients = yield Piece("actor and critic", actor_and_critic, (params, trajectory))
    yield Piece("optimisers, actor and critic", step(NETWORKS[2:]), (gradients, state))


def convolutions(subject: Subject) -> list[Convolution]:
    """Layers of the encoder and the decoder, on as many images as an update has tokens."""
    images, params = subject.agent.tokens_per_update, subject.state.params["observation"]
    encoder, decoder = (in_order(params[part]["kernels"]) for part in ("encoder", "decoder"))
    size = decoder[0].shape[0]  # the first transposed convolution reads one pixel and is a linear layer
    return [
        *convolution_layers("encoder", False, images, IMAGE_SIZE, encoder, padding=0),
        *convolution_layers("decoder", True, images, size, decoder[1:], padding=0),
    ]
