"""TWM against a fixture of the published formulation: same weights, inputs and samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from twister_jax.agents.base import weighted_sum
from twister_jax.agents.fixtures import (
    LOSS_TOLERANCE,
    Fixture,
    Row,
    checked,
    gradient_rows,
    published_weights,
    relative_error,
)
from twister_jax.agents.twm.agent import Twm
from twister_jax.agents.twm.behavior import StartStates
from twister_jax.agents.twm.config import TwmConfig, TwmModelConfig
from twister_jax.agents.twm.weights import load_published, to_published
from twister_jax.agents.twm.windows import Windows
from twister_jax.agents.twm.world_model import loss_scales, start_states
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec
from twister_jax.nn.distributions import GivenSampler


def config_of(sizes: dict[str, Any]) -> TwmConfig:
    """The configuration a fixture was made with."""
    config = TwmConfig(
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
    return checked(config, sizes["num_actions"])


def compare(sizes: dict[str, Any], fixture: Fixture, dtype: DTypeLike) -> list[Row]:
    """Every loss, listed output and gradient of the fixture, with matrix products in `dtype`."""
    config = config_of(sizes)
    spec = EnvSpec(image_shape=(IMAGE_SIZE, IMAGE_SIZE, 1), num_actions=sizes["num_actions"])
    twm = Twm(config, spec, jnp.dtype(dtype))
    params = load_published(published_weights(fixture), config.model, spec)
    rows: list[Row] = []

    def agree(name: str, ours: Any) -> None:
        rows.append(Row(name, relative_error(ours, fixture[name]), LOSS_TOLERANCE))

    # World model.
    windows = Windows(
        frames=jnp.moveaxis(jnp.asarray(fixture["in/observation"]), 2, -1),
        action=jax.nn.one_hot(fixture["in/action"], spec.num_actions),
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
    def train_world_model(params):
        gradients, out = twm.world_model_gradients(params, windows, sampler, None)
        decoded = twm.observation(params["observation"]).decoder(out.latent[:, 1:2])
        return gradients, out, decoded

    gradients, out, decoded = train_world_model(params)
    agree("out/wm/z_logits_normalised", out.posterior.logits)
    agree("out/wm/recon_first_step", jnp.moveaxis(decoded, -1, 2))
    agree("out/wm/hidden", out.hidden)
    agree("out/wm/pred_z_logits_normalised", out.predictions.latent.logits)
    agree("out/wm/pred_reward", out.predictions.reward)
    agree("out/wm/pred_discount", jax.nn.sigmoid(out.predictions.discount.logit))
    agree("out/wm/z_hat_probs", out.predicted)

    scales = loss_scales(config)
    observation, dynamics = (
        {term: scales[model][term] * loss for term, loss in out.losses[model].items()}
        for model in ("observation", "dynamics")
    )
    entropy = out.logged["entropy/posterior"]
    metrics = {
        "dec_loss": observation["decoder"],
        "recon_mae": out.logged["reconstruction_error"],
        "z_ent": entropy * config.model.stoch_groups * np.log(config.model.stoch_classes),
        "z_norm_ent": entropy,
        "z_entropy_loss": observation["entropy"],
        "enc_prior_ce": out.losses["observation"]["consistency"],
        "enc_prior_loss": observation["consistency"],
        "z_pred_ce": out.losses["dynamics"]["latent"],
        "z_pred_loss": dynamics["latent"],
        "reward_loss": dynamics["reward"],
        "discount_loss": dynamics["discount"],
        "dyn_loss": weighted_sum(out.losses["dynamics"], scales["dynamics"]),
        "obs_loss": weighted_sum(out.losses["observation"], scales["observation"]),
        "h_norm": jnp.mean(jnp.linalg.norm(out.hidden, axis=-1)),
    }
    for name, value in metrics.items():
        agree(f"out/wm/metric/{name}", value)
    rows += gradient_rows(fixture, "wm", _published(gradients, config.model), dtype)

    # Imagination.
    def actions(name: str) -> jax.Array:
        return jax.nn.one_hot(fixture[name], spec.num_actions)

    start = StartStates(
        latents=jnp.asarray(fixture["out/im/start_z"]),
        action=actions("out/im/start_action")[:, 0],
        reward=jnp.asarray(fixture["out/im/start_reward"][:, 0]),
        last=jnp.asarray((fixture["out/im/start_terminated"] | fixture["out/im/start_truncated"])[:, 0]),
    )
    rows.append(Row("out/im/start_*", _start_error(start, start_states(out.latent, windows)), 0.0))
    pool = jnp.asarray(fixture["out/im/restart_z"])  # one for all steps
    noise = {
        "action": jnp.swapaxes(actions("out/im/action"), 0, 1),
        "latent": jnp.swapaxes(jnp.asarray(fixture["out/im/z_prior_sample"]), 0, 1),
    }

    restarts = jnp.broadcast_to(pool, (len(noise["action"]), *pool.shape))

    @jax.jit
    def train_behavior(params):
        trajectory, hidden = twm.imagine(params, start, restarts, noise, GivenSampler)
        return trajectory, hidden, twm.behavior_gradients(params, trajectory)

    imagined, hidden, behavior = train_behavior(params)
    agree("out/im/z", imagined.latent)
    agree("out/im/hidden", hidden)
    agree("out/im/action", jnp.argmax(imagined.action, -1))
    agree("out/im/reward", imagined.reward)
    agree("out/im/discount", imagined.discount)
    agree("out/im/done", imagined.done)
    agree("out/im/weight", imagined.weight)
    agree("out/ac/returns", behavior.critic.returns)
    agree("out/ac/advantages", behavior.critic.advantages)
    agree("out/ac/actor_loss", behavior.losses["actor"]["actor"])
    agree("out/ac/critic_loss", behavior.losses["critic"]["critic"])
    agree("out/ac/norm_ent", behavior.entropy)
    published = {
        name.removeprefix("ac."): gradient
        for name, gradient in _published(behavior.gradients, config.model).items()
    }
    rows += gradient_rows(fixture, "ac", published, dtype)
    return rows


def _published(gradients: dict[str, Any], config: TwmModelConfig) -> dict[str, np.ndarray]:
    """Gradients of several networks under their published names."""
    return {
        name: gradient
        for network, tree in gradients.items()
        for name, gradient in to_published(network, tree, config).items()
    }


def _start_error(start: StartStates, candidates: StartStates) -> float:
    """How far the fixture's start states are from the nearest ones that the batch offers."""
    ours, theirs = (
        np.concatenate([np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1) for leaf in tree], axis=1)
        for tree in (candidates, start)
    )
    return float(np.abs(theirs[:, None] - ours).sum(-1).min(-1).max())
