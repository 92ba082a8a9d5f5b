"""TWISTER against a fixture of the published formulation: same weights, inputs and samples."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from twister_jax.agents.fixtures import (
    LOSS_TOLERANCE,
    Fixture,
    Row,
    checked,
    gradient_rows,
    published_weights,
    relative_error,
)
from twister_jax.agents.twister.agent import Twister
from twister_jax.agents.twister.augment import crop_and_resize
from twister_jax.agents.twister.behavior import ReturnScale
from twister_jax.agents.twister.config import TwisterConfig, TwisterModelConfig
from twister_jax.agents.twister.weights import load_published, to_published
from twister_jax.agents.twister.world_model import loss_scales, to_float
from twister_jax.envs.base import EnvSpec
from twister_jax.nn.distributions import GivenSampler, OneHot
from twister_jax.replay.store import Transition

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
    config = TwisterConfig(
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
    return checked(config, sizes["num_actions"])


def compare(sizes: dict[str, Any], fixture: Fixture, dtype: DTypeLike) -> list[Row]:
    """Every loss, listed output and gradient of the fixture, with matrix products in `dtype`."""
    config = config_of(sizes)
    spec = EnvSpec(image_shape=(64, 64, 3), num_actions=sizes["num_actions"])
    twister = Twister(config, spec, jnp.dtype(dtype))
    params = load_published(published_weights(fixture), config.model, spec)
    slow_critic = params.pop("slow_critic")
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
    view = to_float(jnp.asarray(_channels_last(fixture["in/aug_image"])))

    @jax.jit
    def train_world_model(tree):
        gradients, out = twister.world_model_gradients(tree, windows, view, sampler, None)
        model = twister.world_model(tree)
        logits = {
            "post_logits": model.encoder(to_float(windows.image)),
            "aug_post_logits": model.encoder(view),
            "prior_logits": model.prior_logits(out.observed.deter),
        }
        return gradients, out, logits, model.initial_latent()

    gradients, out, logits, initial = train_world_model(params["world_model"])
    scales = loss_scales(config)
    agree("out/wm/total_loss", sum(scales[name] * loss for name, loss in out.losses.items()))
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
    def train_behavior(params, slow_critic, seen, post_logits):
        start, trajectory = twister.imagine(params, seen, windows, noise, GivenSampler)
        behavior = twister.behavior_gradients(params, slow_critic, start, trajectory, ReturnScale.zero())
        model, states = twister.world_model(params["world_model"]), trajectory.features
        policy = twister.actor(params["actor"])(states)
        assert isinstance(policy, OneHot)
        # As published: the logits of the first latent are the posterior's, and its continue is predicted.
        prior_logits = model.prior_logits(trajectory.deter[1:])
        start_logits = post_logits.reshape(1, *prior_logits.shape[1:])
        imagined = {
            "img_stoch": trajectory.latent,
            "img_deter": trajectory.deter,
            "img_logits": jnp.concatenate([start_logits, prior_logits]),
            "img_policy_logits": policy.logits,
            "img_reward": behavior.targets.reward,
            "img_value": behavior.targets.value,
            "img_continue": model.continues(states).mode(),
            "returns": behavior.targets.returns,
            "weights": behavior.targets.weight,
        }
        return behavior, imagined

    behavior, imagined = train_behavior(params, slow_critic, seen, logits["post_logits"])
    for name, value in imagined.items():
        batch_major = jnp.swapaxes(value, 0, 1).reshape(fixture[f"out/ac/{name}"].shape)
        agree(f"out/ac/{name}", batch_major)
    agree("out/ac/perc_low", behavior.targets.return_scale.low)
    agree("out/ac/perc_high", behavior.targets.return_scale.high)
    for name in ("actor", "critic"):
        agree(f"out/ac/{name}_loss", behavior.losses[name])
    for name in ("actor", "critic"):
        published = to_published(name, behavior.gradients[name], config.model)
        rows += gradient_rows(fixture, name, published, dtype)
    return rows


def _channels_last(images: Any) -> Any:
    return jnp.moveaxis(jnp.asarray(images), -3, -1)


def _channels_first(images: Any) -> Any:
    return jnp.moveaxis(images, -1, -3)
