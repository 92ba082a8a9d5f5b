"""TWISTER's update in pieces; the order and the functions are those of `twister_jax.twister.agent`."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.pieces import Convolution, Piece, Pieces, convolution_layers, in_order
from benchmarks.subject import Subject
from twister_jax.agent import compute_dtype
from twister_jax.config import TwisterConfig
from twister_jax.nn.distributions import KeySampler
from twister_jax.optimizer import apply_gradients
from twister_jax.twister import behavior
from twister_jax.twister.agent import make_networks
from twister_jax.twister.contrastive import info_nce
from twister_jax.twister.world_model import IMAGE_SIZE, augment, features, to_float, world_model_loss

PUBLISHED_FLOPS = 1.714e12
"""Products of one update at the paper's setting."""

LOOP_OVERRIDES: dict[str, Any] = {}
"""What makes a short run of the loop get to its updates."""


def pieces(subject: Subject, key: jax.Array) -> Pieces:
    """From the replay to the new parameters."""
    algorithm, state = subject.config.algorithm, subject.state
    assert isinstance(algorithm, TwisterConfig)
    networks = make_networks(algorithm, subject.spec, compute_dtype(subject.config.precision))
    merge = networks.merge
    sound = jnp.ones((), bool)

    def sample(replay, key):
        return subject.agent.sample(replay, key)[0]  # the replay, not donated here, would be copied

    windows = yield Piece("replay sampling", sample, (subject.replay, key))

    def second_view(key, windows):
        return augment(key, windows, algorithm)

    augmented = yield Piece("augmentation", second_view, (key, windows))

    # The encoder, which reads both views in one pass, and the decoder.
    images = jax.jit(to_float)(windows.image)
    views = jnp.concatenate([images, augmented])

    def encode(params, images):
        return merge("world_model", params).encoder(images)

    def encoder_gradient(encoder, params, images):
        def loss(encoder):
            return jnp.sum(encode({**params, "encoder": encoder}, images) ** 2)

        return jax.grad(loss)(encoder)

    yield Piece("encoder forward", encode, (state.world_model, views), whole=False)
    yield Piece(
        "encoder forward+backward",
        encoder_gradient,
        (state.world_model["encoder"], state.world_model, views),
        whole=False,
    )

    # The world model.
    def world_model(params, windows, augmented, key):
        model = merge("world_model", params)
        return world_model_loss(model, windows, algorithm, KeySampler(key), augmented, key)

    out = yield Piece(
        "world model forward", world_model, (state.world_model, windows, augmented, key), whole=False
    )
    out = out[1]

    def decode(params, latent):
        return merge("world_model", params).decoder(latent)

    def decoder_gradient(decoder, latent, params, images):
        def loss(decoder, latent):
            return jnp.sum((decode({**params, "decoder": decoder}, latent) - images) ** 2)

        return jax.grad(loss, argnums=(0, 1))(decoder, latent)

    yield Piece("decoder forward", decode, (state.world_model, out.observed.latent), whole=False)
    yield Piece(
        "decoder forward+backward",
        decoder_gradient,
        (state.world_model["decoder"], out.observed.latent, state.world_model, images),
        whole=False,
    )

    def contrastive(heads, inputs, params, actions):
        def loss(heads, inputs):
            model = merge("world_model", {**params, "contrastive": heads})
            queries = model.contrastive.queries(inputs["features"], actions)
            return jnp.sum(info_nce(queries, model.contrastive.keys(inputs["view"]))[0])

        return jax.value_and_grad(loss, argnums=(0, 1))(heads, inputs)

    view = out.augmented.mode()
    inputs = {
        "features": features(out.observed.prior_latent, out.observed.deter),
        "view": view.reshape(*view.shape[:2], -1),
    }
    yield Piece(
        "contrastive part forward+backward",
        contrastive,
        (state.world_model["contrastive"], inputs, state.world_model, out.observed.actions),
        whole=False,
    )
    world_model_gradient = jax.grad(world_model, has_aux=True)
    gradients, out = yield Piece(
        "world model forward+backward",
        world_model_gradient,
        (state.world_model, windows, augmented, key),
    )

    def step_world_model(gradients, params, optimizer):
        return apply_gradients(algorithm.world_model_optimizer, gradients, params, optimizer, sound)

    yield Piece(
        "optimiser, world model",
        step_world_model,
        (gradients, state.world_model, state.world_model_optimizer),
    )

    # Imagination.
    def imagination(params, actor, observed, windows, key):
        model = merge("world_model", params)
        start = behavior.starts_of(model, observed, windows.is_first, windows.terminal)
        noise = jax.random.split(key, algorithm.imagination_horizon)
        return behavior.imagine(model, merge("actor", actor), start, noise, KeySampler), start.continues

    trajectory, continues = yield Piece(
        "imagination", imagination, (state.world_model, state.actor, out.observed, windows, key)
    )

    # Actor and critic.
    def actor_and_critic(state, trajectory, continues):
        model = merge("world_model", state.world_model)
        imagined = trajectory.features
        slow_mean = merge("critic", state.slow_critic)(imagined[:-1]).mean()

        def loss_of_critic(params):
            value = merge("critic", params)(imagined)
            targets = behavior.make_targets(
                model, value.mean(), trajectory, continues, state.return_scale, algorithm
            )
            value = jax.tree.map(lambda x: x[:-1], value)
            return behavior.critic_loss(value, slow_mean, targets, algorithm), targets

        critic, targets = jax.grad(loss_of_critic, has_aux=True)(state.critic)

        def loss_of_actor(params):
            policy = merge("actor", params)(imagined[:-1])
            return behavior.actor_loss(policy, trajectory.action, targets, algorithm)[0]

        return jax.grad(loss_of_actor)(state.actor), critic

    gradients = yield Piece("actor and critic", actor_and_critic, (state, trajectory, continues))

    def step_behavior(gradients, state):
        actor, critic = gradients
        rate = algorithm.slow_critic_rate
        new = apply_gradients(algorithm.critic_optimizer, critic, state.critic, state.critic_optimizer, sound)
        slow = jax.tree.map(lambda s, c: (1.0 - rate) * s + rate * c, state.slow_critic, new[0])
        return (
            slow,
            new,
            apply_gradients(algorithm.actor_optimizer, actor, state.actor, state.actor_optimizer, sound),
        )

    yield Piece("optimisers, actor and critic", step_behavior, (gradients, state))


def convolutions(subject: Subject) -> list[Convolution]:
    """Layers of the encoder, which reads two views of each of an update's frames, and of the decoder."""
    images, params = subject.agent.tokens_per_update, subject.state.world_model
    encoder, decoder = (in_order(params[part]["kernels"]) for part in ("encoder", "decoder"))
    return [
        *convolution_layers("encoder", False, 2 * images, IMAGE_SIZE, encoder, padding=1),
        *convolution_layers("decoder", True, images, IMAGE_SIZE // 16, decoder, padding=1),
    ]
