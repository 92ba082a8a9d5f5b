"""TWM's weights under the names and in the layouts of the authors' published checkpoints.

Published linear weights are (out, in), convolutions (out, in, kh, kw), transposed convolutions
(in, out, kh, kw), and feature maps are flattened channel-major. `load_published` reads them into our
parameters; `to_published` writes any tree of our parameters, gradients too, back.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax.agents.base import Health, Trained
from twister_jax.agents.twm.agent import Twm, TwmState
from twister_jax.agents.twm.config import TwmConfig, TwmModelConfig
from twister_jax.envs.base import EnvSpec
from twister_jax.errors import UserError

Tree = dict[Any, Any]
Path = tuple[str | int, ...]


class Layout(NamedTuple):
    """How an array of ours is laid out in the published weights."""

    ours: Callable[[np.ndarray], np.ndarray]
    published: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(np.transpose, np.transpose)
CONVOLUTION = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
TRANSPOSED = Layout(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))


def flattened(channels: int, size: int) -> Layout:
    """A linear layer on flattened images: channel-major there, channel-minor here."""

    def ours(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, channels, size, size).transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

    def published(x: np.ndarray) -> np.ndarray:
        return x.reshape(size, size, channels, -1).transpose(3, 2, 0, 1).reshape(x.shape[1], -1)

    return Layout(ours, published)


class Weight(NamedTuple):
    """One published weight: its name, where it lives here (network first), and its layout."""

    name: str
    path: Path
    layout: Layout


def _affine(name: str, path: Path, layout: Layout = LINEAR) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (*path, "kernel"), layout)
    yield Weight(f"{name}.bias", (*path, "bias"), SAME)


def _mlp(name: str, path: Path, layers: int) -> Iterator[Weight]:
    for index in range(layers):
        yield from _affine(f"{name}.linear{index + 1}", (*path, "layers", index))


def weights(config: TwmModelConfig) -> Iterator[Weight]:
    """Every published weight of a model of this size."""
    encoder, decoder = ("observation", "encoder"), ("observation", "decoder")
    for index in range(4):
        name = f"wm.obs_model.encoder.0.conv{index + 1}"
        yield Weight(f"{name}.weight", (*encoder, "kernels", index), CONVOLUTION)
        yield Weight(f"{name}.bias", (*encoder, "biases", index), SAME)
    for index in range(len(config.encoder_hidden) + 1):
        layout = flattened(8 * config.cnn_channels, 2) if index == 0 else LINEAR
        yield from _affine(
            f"wm.obs_model.encoder.2.linear{index + 1}", (*encoder, "mlp", "layers", index), layout
        )
    yield from _mlp("wm.obs_model.decoder.0", (*decoder, "project"), 1)
    for index in range(4):
        name = f"wm.obs_model.decoder.2.conv_transpose{index + 1}"
        yield Weight(f"{name}.weight", (*decoder, "kernels", index), TRANSPOSED)
        yield Weight(f"{name}.bias", (*decoder, "biases", index), SAME)

    net, dynamics = "wm.dyn_model.prediction_net", ("dynamics",)
    yield from _mlp(f"{net}.embeds.z", (*dynamics, "embed_latent"), 1)
    yield Weight(f"{net}.embeds.a.weight", (*dynamics, "embed_action"), SAME)
    yield from _mlp(f"{net}.embeds.r", (*dynamics, "embed_reward"), 1)
    yield Weight(f"{net}.transformer.u_bias", (*dynamics, "content_bias"), SAME)
    yield Weight(f"{net}.transformer.v_bias", (*dynamics, "position_bias"), SAME)
    for index in range(config.transformer_layers):
        name, path = f"{net}.transformer.layers.{index}", (*dynamics, "blocks", index)
        yield Weight(f"{name}.self_attn.qkv_proj.weight", (*path, "query_key_value", "kernel"), LINEAR)
        yield Weight(f"{name}.self_attn.pos_proj.weight", (*path, "position", "kernel"), LINEAR)
        yield Weight(f"{name}.self_attn.out_proj.weight", (*path, "output", "kernel"), LINEAR)
        yield from _affine(f"{name}.linear1", (*path, "expand"))
        yield from _affine(f"{name}.linear2", (*path, "contract"))
        for norm, ours in (("norm1", "attention_norm"), ("norm2", "feedforward_norm")):
            yield Weight(f"{name}.{norm}.weight", (*path, ours, "scale"), SAME)
            yield Weight(f"{name}.{norm}.bias", (*path, ours, "bias"), SAME)
    yield from _mlp(f"{net}.out_heads.z", (*dynamics, "latent_head"), len(config.latent_head) + 1)
    yield from _mlp(f"{net}.out_heads.r", (*dynamics, "reward_head"), len(config.reward_head) + 1)
    yield from _mlp(f"{net}.out_heads.g", (*dynamics, "discount_head"), len(config.discount_head) + 1)

    yield from _mlp("ac.actor_model", ("actor",), len(config.actor) + 1)
    yield from _mlp("ac.critic_model", ("critic",), len(config.critic) + 1)


def load_published(
    published: dict[str, np.ndarray], config: TwmModelConfig, spec: EnvSpec
) -> dict[str, Tree]:
    """Parameters of every network from published weights.

    Args:
      published: published name -> array; names that this model does not have are left alone.
      config: the sizes the weights were trained with.
      spec: the environment they were trained in.

    Returns:
      {"observation", "dynamics", "actor", "critic"}: nested dictionaries of float32 parameters.

    Raises:
      UserError: a weight is missing or has another size than `config` says.
    """
    networks = Twm(TwmConfig(model=config), spec, jnp.float32).networks
    expected = jax.eval_shape(networks.init, jax.random.key(0))
    tree: Tree = {}
    for weight in weights(config):
        if weight.name not in published:
            raise UserError(f"the published weights lack {weight.name!r}: are they TWM's?")
        found = published[weight.name]
        wanted = weight.layout.published(np.zeros(_get(expected, weight.path).shape)).shape
        if found.shape != wanted:
            raise UserError(
                f"the published weight {weight.name!r} has shape {found.shape}; "
                f"the configured sizes make it {wanted}"
            )
        _put(tree, weight.path, jnp.asarray(weight.layout.ours(found), jnp.float32))
    return tree


def state_of_published(published: dict[str, np.ndarray], config: TwmConfig, spec: EnvSpec) -> TwmState:
    """What acting and dreaming need of a state, from published weights; see `load_published`."""
    twm = Twm(config, spec, jnp.float32)
    return TwmState(Trained(load_published(published, config.model, spec), {}), Health.sound(twm.terms))


def to_published(network: str, tree: Tree, config: TwmModelConfig) -> dict[str, np.ndarray]:
    """Parameters or gradients of one network under their published names and in their published layouts."""
    return {
        weight.name: weight.layout.published(np.asarray(_get(tree, weight.path[1:])))
        for weight in weights(config)
        if weight.path[0] == network
    }


def _get(tree: Tree, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _put(tree: Tree, path: Path, value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
