"""TWM against a fixture of the published formulation: same weights, inputs and samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from twister_jax.config import TwmConfig, TwmModelConfig
from twister_jax.nn.distributions import GivenSampler
from twister_jax.parity import LOSS_TOLERANCE, Fixture, Row, gradient_rows, relative_error
from twister_jax.twm.agent import make_networks
from twister_jax.twm.behavior import Start, actor_loss, critic_loss, imagine
from twister_jax.twm.interop import load_published, to_published
from twister_jax.twm.windows import Windows
from twister_jax.twm.world_model import starts, world_model_loss

NETWORKS = ("observation", "dynamics", "actor", "critic")


def config_of(sizes: dict[str, Any]) -> TwmConfig:
    """The configuration a fixture was made with."""
    return TwmConfig(
        batch_size=sizes["batch_size"],
        batch_length=sizes["sequence_length"],
        imagination_batch=sizes["ac_batch_size"],
        imagination_horizon=sizes["horizon"],
        restart_threshold=sizes["discount_threshold"],
        model=TwmModelConfig(
            cnn_channels=sizes["obs_channels"],
            stoch_groups=sizes["z_categoricals"],
            stoch_classes=sizes["z_categories"],
            hidden_size=sizes["embed_dim"],
            transformer_layers=sizes["num_layers"],
            attention_heads=sizes["num_heads"],
            head_size=sizes["head_dim"],
            feedforward_size=sizes["feedforward_dim"],
            memory_steps=sizes["memory_length"],
            dropout=0.0,
            latent_head=tuple(sizes["z_head_dims"]),
            reward_head=tuple(sizes["reward_head_dims"]),
            discount_head=tuple(sizes["discount_head_dims"]),
            actor=tuple(sizes["actor_dims"]),
            critic=tuple(sizes["critic_dims"]),
        ),
    )


def compare(sizes: dict[str, Any], fixture: Fixture, dtype: DTypeLike) -> list[Row]:
    """Every loss, listed output and gradient of the fixture, with matrix products in `dtype`."""
    config = config_of(sizes)
    num_actions = sizes["num_actions"]
    networks = make_networks(config, num_actions, jnp.dtype(dtype))
    published = {
        name.removeprefix("param/"): value for name, value in fixture.items() if name.startswith("param/")
    }
    params = load_published(published, config.model)
    rows: list[Row] = []

    def agree(name: str, ours: Any) -> None:
        rows.append(Row(name, relative_error(ours, fixture[name]), LOSS_TOLERANCE))

    # World model.
    windows = Windows(
        frames=jnp.moveaxis(jnp.asarray(fixture["in/observation"]), 2, -1),
        action=jax.nn.one_hot(fixture["in/action"], num_actions),
        reward=jnp.asarray(fixture["in/reward"]),
        terminated=jnp.asarray(fixture["in/terminated"]),
        truncated=jnp.asarray(fixture["in/truncated"]),
    )
    sampler = GivenSampler(
        {
            "posterior": jnp.asarray(fixture["out/wm/z_sample"]),
            "context": jnp.asarray(fixture["out/wm/context_z_sample"]),
        }
    )

    @jax.jit
    def train_world_model(observation, dynamics):
        def loss(observation, dynamics):
            models = networks.merge("observation", observation), networks.merge("dynamics", dynamics)
            return world_model_loss(*models, windows, config, sampler, None)

        gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(observation, dynamics)
        first = networks.merge("observation", observation).decoder(out.latent[:, 1:2])
        return gradients, out, first

    gradients, out, first = train_world_model(params["observation"], params["dynamics"])
    losses, dynamics_losses = out.observation, out.dynamics
    agree("out/wm/z_logits_normalised", out.posterior.logits)
    agree("out/wm/recon_first_step", jnp.moveaxis(first, -1, 2))
    agree("out/wm/hidden", out.hidden)
    agree("out/wm/pred_z_logits_normalised", out.predictions.latent.logits)
    agree("out/wm/pred_reward", out.predictions.reward)
    agree("out/wm/pred_discount", jax.nn.sigmoid(out.predictions.discount.logit))
    agree("out/wm/z_hat_probs", out.predicted)

    groups, classes = sizes["z_categoricals"], sizes["z_categories"]
    metrics = {
        "dec_loss": config.decoder_scale * losses.decoder,
        "recon_mae": losses.reconstruction_error,
        "z_ent": losses.normalized_entropy * groups * np.log(classes),
        "z_norm_ent": losses.normalized_entropy,
        "z_entropy_loss": config.entropy_scale * losses.entropy,
        "enc_prior_ce": losses.consistency,
        "enc_prior_loss": config.consistency_scale * losses.consistency,
        "z_pred_ce": dynamics_losses.latent,
        "z_pred_loss": config.latent_scale * dynamics_losses.latent,
        "reward_loss": config.reward_scale * dynamics_losses.reward,
        "discount_loss": config.discount_scale * dynamics_losses.discount,
        "dyn_loss": out.dynamics_total,
        "obs_loss": out.observation_total,
        "h_norm": jnp.mean(jnp.linalg.norm(out.hidden, axis=-1)),
    }
    for name, value in metrics.items():
        agree(f"out/wm/metric/{name}", value)
    named: dict[str, np.ndarray] = {}
    for network, gradient in zip(NETWORKS, gradients, strict=False):
        named |= to_published(network, gradient, config.model)
    rows += gradient_rows(fixture, "wm", named, dtype)

    # Imagination.
    start = Start(
        latents=jnp.asarray(fixture["out/im/start_z"]),
        action=jax.nn.one_hot(fixture["out/im/start_action"][:, 0], num_actions),
        reward=jnp.asarray(fixture["out/im/start_reward"][:, 0]),
        last=jnp.asarray((fixture["out/im/start_terminated"] | fixture["out/im/start_truncated"])[:, 0]),
    )
    rows.append(Row("out/im/start_*", _start_error(start, starts(out.latent, windows)), 0.0))
    draws = {
        "action": jnp.swapaxes(jax.nn.one_hot(fixture["out/im/action"], num_actions), 0, 1),
        "latent": jnp.swapaxes(jnp.asarray(fixture["out/im/z_prior_sample"]), 0, 1),
    }

    @jax.jit
    def train_behavior(params):
        imagined, hidden = imagine(
            networks.merge("dynamics", params["dynamics"]),
            networks.merge("actor", params["actor"]),
            start,
            jnp.asarray(fixture["out/im/restart_z"]),
            draws,
            GivenSampler,
            config,
        )

        def loss_of_critic(critic):
            return critic_loss(networks.merge("critic", critic), imagined, config.gae_lambda)

        critic, critic_gradient = jax.value_and_grad(loss_of_critic, has_aux=True)(params["critic"])

        def loss_of_actor(actor):
            return actor_loss(networks.merge("actor", actor), imagined, critic[1].advantages, config)

        actor, actor_gradient = jax.value_and_grad(loss_of_actor, has_aux=True)(params["actor"])
        return imagined, hidden, critic, critic_gradient, actor, actor_gradient

    imagined, hidden, critic, critic_gradient, actor, actor_gradient = train_behavior(params)
    agree("out/im/z", imagined.latent)
    agree("out/im/hidden", hidden)
    agree("out/im/action", jnp.argmax(imagined.action, -1))
    agree("out/im/reward", imagined.reward)
    agree("out/im/discount", imagined.discount)
    agree("out/im/done", imagined.done)
    agree("out/im/weight", imagined.weight)
    agree("out/ac/returns", critic[1].returns)
    agree("out/ac/advantages", critic[1].advantages)
    agree("out/ac/actor_loss", actor[0])
    agree("out/ac/critic_loss", critic[0])
    agree("out/ac/norm_ent", actor[1].normalized_entropy)
    named = to_published("actor", actor_gradient, config.model)
    named |= to_published("critic", critic_gradient, config.model)
    rows += gradient_rows(
        fixture, "ac", {name.removeprefix("ac."): value for name, value in named.items()}, dtype
    )
    return rows


def _start_error(start: Start, candidates: Start) -> float:
    """How far the fixture's start states are from the nearest ones that the batch offers."""
    ours, theirs = (
        np.concatenate([np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1) for leaf in tree], axis=1)
        for tree in (candidates, start)
    )
    return float(np.abs(theirs[:, None] - ours).sum(-1).min(-1).max())
