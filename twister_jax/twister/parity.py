"""TWISTER against a fixture of the published formulation: same weights, inputs and samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from twister_jax.agent import Transition
from twister_jax.config import TwisterConfig, TwisterModelConfig
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.distributions import GivenSampler
from twister_jax.parity import LOSS_TOLERANCE, Fixture, Row, gradient_rows, relative_error
from twister_jax.twister.agent import make_networks
from twister_jax.twister.augment import crop_and_resize
from twister_jax.twister.behavior import (
    ReturnScale,
    actor_loss,
    critic_loss,
    imagine,
    make_targets,
    starts_of,
)
from twister_jax.twister.interop import load_published, to_published
from twister_jax.twister.world_model import loss_scales, to_float, world_model_loss

LOSS_NAMES = {
    "model_image": "image",
    "model_reward": "reward",
    "model_discount": "continue",
    "kl_prior": "dynamics",
    "kl_post": "representation",
}
"""Published names of the losses, the contrastive ones aside."""


def config_of(sizes: dict[str, Any]) -> TwisterConfig:
    """The configuration a fixture was made with."""
    return TwisterConfig(
        batch_size=sizes["batch_size"],
        batch_length=sizes["batch_length"],
        imagination_horizon=sizes["imagination_horizon"],
        model=TwisterModelConfig(
            hidden_size=sizes["hidden_size"],
            cnn_channels=sizes["cnn_channels"],
            stoch_groups=sizes["stoch_groups"],
            stoch_classes=sizes["stoch_classes"],
            transformer_blocks=sizes["transformer_blocks"],
            attention_heads=sizes["attention_heads"],
            attention_context=sizes["attention_context"],
            contrastive_steps=sizes["contrastive_steps"],
            contrastive_size=sizes["contrastive_size"],
            dropout=0.0,
        ),
    )


def compare(sizes: dict[str, Any], fixture: Fixture, dtype: DTypeLike) -> list[Row]:
    """Every loss, listed output and gradient of the fixture, with matrix products in `dtype`."""
    config = config_of(sizes)
    spec = EnvSpec(image_shape=(64, 64, 3), num_actions=sizes["num_actions"])
    networks = make_networks(config, spec, jnp.dtype(dtype))
    weights = {
        name.removeprefix("param/"): value.astype(np.float32)
        for name, value in fixture.items()
        if name.startswith("param/")
    }
    params = load_published(weights, config.model, spec)
    rows: list[Row] = []

    def agree(name: str, ours: Any) -> None:
        rows.append(Row(name, relative_error(ours, fixture[name]), LOSS_TOLERANCE))

    crops = crop_and_resize(
        to_float(_channels_last(fixture["crop/image"])),
        jnp.asarray(fixture["crop/box_top_left_height_width"], jnp.int32),
    )
    agree("crop/output", _channels_first(crops))

    # World model.
    windows = Transition(
        image=jnp.asarray(_channels_last(fixture["in/image"])),
        action=jnp.asarray(fixture["in/action"]),
        reward=jnp.asarray(fixture["in/reward"]),
        terminal=jnp.asarray(fixture["in/done"]) > 0,
        is_first=jnp.asarray(fixture["in/is_first"]) > 0,
    )
    sampler = GivenSampler(
        {
            "posterior": jnp.asarray(fixture["out/wm/post_sample"]),
            "prior": jnp.asarray(fixture["out/wm/prior_sample"]),
            "augmented": jnp.asarray(fixture["out/wm/aug_post_sample"]),
        }
    )
    augmented = to_float(jnp.asarray(_channels_last(fixture["in/aug_image"])))

    @jax.jit
    def train_world_model(tree):
        def loss(tree):
            model = networks.merge("world_model", tree)
            total, out = world_model_loss(model, windows, config, sampler, augmented, None)
            logits = {
                "post_logits": model.encoder(to_float(windows.image)),
                "aug_post_logits": model.encoder(augmented),
                "prior_logits": model.prior_logits(out.observed.deter),
            }
            return total, (out, logits, model.initial_latent())

        return jax.value_and_grad(loss, has_aux=True)(tree)

    (total, (out, logits, initial)), gradients = train_world_model(params["world_model"])
    agree("out/wm/total_loss", total)
    scales = loss_scales(config)
    names = LOSS_NAMES | {
        f"model_contrastive_{k}": f"contrastive_{k}" for k in range(config.model.contrastive_steps)
    }
    for theirs, ours in names.items():
        agree(f"out/wm/loss/{theirs}", out.losses[ours])
        agree(f"out/wm/weight/{theirs}", scales[ours])
    for name, value in logits.items():
        agree(f"out/wm/{name}", value.reshape(fixture[f"out/wm/{name}"].shape))
    seen = out.observed
    agree("out/wm/deter", seen.deter)
    agree("out/wm/reward_logits", out.reward.logits)
    agree("out/wm/reward_mean", out.reward.mean()[..., None])
    agree("out/wm/continue_logits", out.continues.logit[..., None])
    agree("out/wm/recon_first_two_steps", _channels_first(out.decoded[:, :2]))
    agree("out/wm/initial_deter", params["world_model"]["initial_deter"].reshape(1, 1, -1))
    agree("out/wm/initial_stoch", initial.reshape(fixture["out/wm/initial_stoch"].shape))
    rows += gradient_rows(fixture, "wm", to_published("world_model", gradients, config.model), dtype)

    # Behaviour, with the same weights.
    noise = {
        "action": jnp.swapaxes(fixture["out/ac/img_action"], 0, 1)[:-1],
        "prior": jnp.swapaxes(fixture["out/ac/img_stoch"], 0, 1)[1:],
    }

    @jax.jit
    def train_behavior(params, seen, post_logits):
        model = networks.merge("world_model", params["world_model"])
        actor = networks.merge("actor", params["actor"])
        start = starts_of(model, seen, windows.is_first, windows.terminal)
        trajectory = imagine(model, actor, start, noise, GivenSampler)
        states = trajectory.features
        slow_mean = networks.merge("critic", params["slow_critic"])(states[:-1]).mean()

        def loss_of_critic(tree):
            value = networks.merge("critic", tree)(states)
            targets = make_targets(
                model, value.mean(), trajectory, start.continues, ReturnScale.zero(), config
            )
            loss = critic_loss(jax.tree.map(lambda x: x[:-1], value), slow_mean, targets, config)
            return loss, targets

        critic, critic_gradients = jax.value_and_grad(loss_of_critic, has_aux=True)(params["critic"])
        targets = critic[1]

        def loss_of_actor(tree):
            policy = networks.merge("actor", tree)(states[:-1])
            return actor_loss(policy, trajectory.action, targets, config)[0]

        actor_value, actor_gradients = jax.value_and_grad(loss_of_actor)(params["actor"])
        # As published: the logits of the first latent are the posterior's, and its continue is predicted.
        prior_logits = model.prior_logits(trajectory.deter[1:])
        start_logits = post_logits.reshape(1, *prior_logits.shape[1:])
        imagined = {
            "img_stoch": trajectory.latent,
            "img_deter": trajectory.deter,
            "img_logits": jnp.concatenate([start_logits, prior_logits]),
            "img_policy_logits": actor(states).logits,
            "img_reward": targets.reward,
            "img_value": targets.value,
            "img_continue": model.continues(states).mode(),
            "returns": targets.returns,
            "weights": targets.weight,
        }
        return critic, critic_gradients, actor_value, actor_gradients, imagined

    (critic, targets), critic_gradients, actor_value, actor_gradients, imagined = train_behavior(
        params, seen, logits["post_logits"]
    )

    def batch_major(x: Any, name: str) -> Any:
        return jnp.swapaxes(x, 0, 1).reshape(fixture[name].shape)

    for name, value in imagined.items():
        agree(f"out/ac/{name}", batch_major(value, f"out/ac/{name}"))
    agree("out/ac/perc_low", targets.return_scale.low)
    agree("out/ac/perc_high", targets.return_scale.high)
    agree("out/ac/actor_loss", actor_value)
    agree("out/ac/critic_loss", critic)
    rows += gradient_rows(fixture, "actor", to_published("actor", actor_gradients, config.model), dtype)
    rows += gradient_rows(fixture, "critic", to_published("critic", critic_gradients, config.model), dtype)
    return rows


def _channels_last(images: Any) -> Any:
    return jnp.moveaxis(jnp.asarray(images), -3, -1)


def _channels_first(images: Any) -> Any:
    return jnp.moveaxis(images, -1, -3)
