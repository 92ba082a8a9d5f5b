"""TWISTER's weights under the names and in the layouts of the authors' published checkpoints.

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
from twister_jax.agents.twister.agent import Twister, TwisterState
from twister_jax.agents.twister.behavior import ReturnScale
from twister_jax.agents.twister.config import TwisterConfig, TwisterModelConfig
from twister_jax.envs.base import IMAGE_SIZE, EnvSpec
from twister_jax.errors import UserError

Tree = dict[Any, Any]
Path = tuple[str | int, ...]
HEADS = {"actor": "policy_network", "critic": "value_network", "slow_critic": "v_target"}
"""Published names of the networks that are one head each."""


class Rule(NamedTuple):
    """One published array: where it lives here, and the change of layout there and back."""

    name: str
    path: Path
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _linear(name: str, path: Path, *, bias: bool = True) -> Iterator[Rule]:
    yield Rule(f"{name}.weight", (*path, "kernel"), _transpose, _transpose)
    if bias:
        yield Rule(f"{name}.bias", (*path, "bias"), _same, _same)


def _norm(name: str, path: Path) -> Iterator[Rule]:
    yield Rule(f"{name}.weight", (*path, "scale"), _same, _same)
    yield Rule(f"{name}.bias", (*path, "bias"), _same, _same)


def _head(name: str, path: Path) -> Iterator[Rule]:
    for i in (0, 1):
        yield from _linear(f"{name}.mlp.layers.{i}.0", (*path, "trunk", i, "linear"), bias=False)
        yield from _norm(f"{name}.mlp.layers.{i}.1", (*path, "trunk", i, "norm"))
    yield from _linear(f"{name}.linear_proj", (*path, "output"))


def _convolutions(config: TwisterModelConfig) -> Iterator[Rule]:
    side, channels = IMAGE_SIZE // 16, config.cnn_channels * 8

    def read(x: np.ndarray) -> np.ndarray:
        return x.transpose(2, 3, 1, 0)

    def write(x: np.ndarray) -> np.ndarray:
        return x.transpose(3, 2, 0, 1)

    for i in range(4):
        name, path = f"encoder_network.cnn.layers.{i}", ("encoder", "kernels", i)
        yield Rule(f"{name}.0.weight", path, read, write)
        yield from _norm(f"{name}.1", ("encoder", "norms", i))

    def to_channels_last(x: np.ndarray) -> np.ndarray:  # rows are a flat (channel, height, width)
        return x.reshape(channels, side, side, -1).transpose(1, 2, 0, 3).reshape(-1, x[0].size)

    def to_channels_first(x: np.ndarray) -> np.ndarray:
        return x.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(-1, x[0].size)

    name = "encoder_network.representation_network"
    logits = ("encoder", "logits")
    yield Rule(
        f"{name}.weight",
        (*logits, "kernel"),
        lambda x: to_channels_last(x.T),
        lambda x: to_channels_first(x).T,
    )
    yield Rule(f"{name}.bias", (*logits, "bias"), _same, _same)

    name = "decoder_network.proj"
    project = ("decoder", "project")
    yield Rule(
        f"{name}.weight",
        (*project, "kernel"),
        lambda x: to_channels_last(x).T,
        lambda x: to_channels_first(x.T),
    )
    yield Rule(
        f"{name}.bias",
        (*project, "bias"),
        lambda x: to_channels_last(x[:, None])[:, 0],
        lambda x: to_channels_first(x[:, None])[:, 0],
    )

    def read_transposed(x: np.ndarray) -> np.ndarray:
        return x.transpose(2, 3, 0, 1)

    for i in range(4):
        name, path = f"decoder_network.cnn.layers.{i}", ("decoder", "kernels", i)
        yield Rule(f"{name}.0.weight", path, read_transposed, read_transposed)
        if i < 3:
            yield from _norm(f"{name}.1", ("decoder", "norms", i))
    yield Rule("decoder_network.cnn.layers.3.0.bias", ("decoder", "bias"), _same, _same)


def _dynamics(config: TwisterModelConfig) -> Iterator[Rule]:
    yield Rule("rssm.weight_init", ("initial_deter",), _same, _same)
    for i in (0, 1):
        yield from _linear(f"rssm.action_mixer.layers.{i}.0", ("action_mixer", i, "linear"), bias=False)
        yield from _norm(f"rssm.action_mixer.layers.{i}.1", ("action_mixer", i, "norm"))
    for i in range(config.transformer_blocks):
        name, path = f"rssm.transformer.blocks.{i}", ("transformer", "blocks", i)
        yield from _norm(f"{name}.self_att_module.post_norm", (*path, "attention_norm"))
        attention = f"{name}.self_att_module.attention"
        yield Rule(f"{attention}.u", (*path, "u"), _same, _same)
        yield Rule(f"{attention}.v", (*path, "v"), _same, _same)
        yield from _linear(f"{attention}.output_layer", (*path, "output"))
        yield from _linear(f"{attention}.pos_layer", (*path, "position"))
        yield from _linear(f"{name}.ff_module.layers.0", (*path, "expand"))
        yield from _linear(f"{name}.ff_module.layers.3", (*path, "contract"))
        yield from _norm(f"{name}.ff_module.post_norm", (*path, "feedforward_norm"))
    yield from _linear("rssm.dynamics_predictor", ("prior_logits",))


def world_model_rules(config: TwisterModelConfig) -> list[Rule]:
    """Every published world-model array that one of ours is, alone.

    The others are joined: queries, keys and values of an attention, and the contrastive heads.
    """
    return [
        *_convolutions(config),
        *_dynamics(config),
        *_head("reward_network", ("reward_head",)),
        *_head("continue_network", ("continue_head",)),
    ]


def _get(tree: Tree, path: Path) -> np.ndarray:
    for part in path:
        tree = tree[part]
    return np.asarray(tree)


def _put(tree: Tree, path: Path, value: np.ndarray) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = jnp.asarray(value, jnp.float32)


_STACKED = [
    ("mlp_feats.layers.1.0.weight", "query_output", _transpose),
    ("mlp_feats.layers.0.0.bias", "query_bias", _same),
    ("mlp_feats.layers.1.0.bias", "query_output_bias", _same),
    ("mlp_embed.layers.0.0.weight", "key_latent", _transpose),
    ("mlp_embed.layers.0.0.bias", "key_bias", _same),
    ("mlp_embed.layers.1.0.weight", "key_output", _transpose),
    ("mlp_embed.layers.1.0.bias", "key_output_bias", _same),
]


def _read_contrastive(weights: dict[str, np.ndarray], config: TwisterModelConfig, actions: int) -> Tree:
    steps, size = config.contrastive_steps, config.contrastive_size
    tree: Tree = {}
    for name, ours, read in _STACKED:
        _put(
            tree, (ours,), np.stack([read(weights[f"contrastive_network.{k}.{name}"]) for k in range(steps)])
        )
    first = [weights[f"contrastive_network.{k}.mlp_feats.layers.0.0.weight"].T for k in range(steps)]
    _put(tree, ("query_features",), np.stack([kernel[: config.feature_size] for kernel in first]))
    if not config.contrastive_actions or steps == 1:
        return tree
    action_kernel = np.zeros((steps, steps - 1, actions, size), np.float32)
    for k, kernel in enumerate(first):
        action_kernel[k, :k] = kernel[config.feature_size :].reshape(k, actions, size)
    _put(tree, ("query_actions",), action_kernel)
    return tree


def _write_contrastive(tree: Tree, config: TwisterModelConfig) -> dict[str, np.ndarray]:
    published = {}
    for k in range(config.contrastive_steps):
        prefix = f"contrastive_network.{k}."
        for name, ours, write in _STACKED:
            published[prefix + name] = write(np.asarray(tree[ours])[k])
        first = np.asarray(tree["query_features"])[k]
        if "query_actions" in tree:
            actions = np.asarray(tree["query_actions"])[k, :k]
            first = np.concatenate([first, actions.reshape(-1, first.shape[-1])])
        published[prefix + "mlp_feats.layers.0.0.weight"] = first.T
    return published


def _attention(block: int) -> tuple[Path, list[str]]:
    """Where the first linear layer of an attention lives, and the published layers it joins."""
    attention = f"rssm.transformer.blocks.{block}.self_att_module.attention"
    return ("transformer", "blocks", block, "query_key_value"), [
        f"{attention}.{part}_layer" for part in ("query", "key", "value")
    ]


def _read_attention(tree: Tree, weights: dict[str, np.ndarray], config: TwisterModelConfig) -> None:
    for block in range(config.transformer_blocks):
        path, names = _attention(block)
        _put(tree, (*path, "kernel"), np.concatenate([weights[f"{name}.weight"].T for name in names], 1))
        _put(tree, (*path, "bias"), np.concatenate([weights[f"{name}.bias"] for name in names]))


def _write_attention(tree: Tree, config: TwisterModelConfig) -> dict[str, np.ndarray]:
    published: dict[str, np.ndarray] = {}
    for block in range(config.transformer_blocks):
        path, names = _attention(block)
        kernels = np.split(_get(tree, (*path, "kernel")), 3, axis=1)
        biases = np.split(_get(tree, (*path, "bias")), 3)
        for name, kernel, bias in zip(names, kernels, biases, strict=True):
            published |= {f"{name}.weight": kernel.T, f"{name}.bias": bias}
    return published


def load_published(
    weights: dict[str, np.ndarray], config: TwisterModelConfig, spec: EnvSpec
) -> dict[str, Tree]:
    """Parameters of world model, actor, critic and slow critic from published weights.

    Args:
      weights: published name -> array.
      config: the sizes the weights were trained with.
      spec: the environment they were trained in.

    Returns:
      {"world_model", "actor", "critic", "slow_critic"}: nested dictionaries of float32 parameters.

    Raises:
      UserError: a weight is missing or has another size than `config` says.
    """
    try:
        groups: dict[str, Tree] = {"world_model": {}}
        for rule in world_model_rules(config):
            _put(groups["world_model"], rule.path, rule.read(np.asarray(weights[rule.name])))
        _read_attention(groups["world_model"], weights, config)
        groups["world_model"]["contrastive"] = _read_contrastive(weights, config, spec.num_actions)
        for group, name in HEADS.items():
            groups[group] = {}
            for rule in _head(name, ("head",)):
                _put(groups[group], rule.path, rule.read(np.asarray(weights[rule.name])))
    except KeyError as error:
        raise UserError(f"the published weights lack {error}: are they TWISTER's?") from None
    except ValueError as error:
        raise UserError(f"the published weights do not have the configured sizes: {error}") from None
    for group, expected in expected_shapes(config, spec).items():
        found = jax.tree_util.tree_leaves_with_path(groups[group])
        for (path, ours), wanted in zip(found, jax.tree.leaves(expected), strict=True):
            if ours.shape != wanted.shape:
                raise UserError(
                    f"the published weights do not have the configured sizes: {group}"
                    f"{jax.tree_util.keystr(path)} is {ours.shape} and should be {wanted.shape}"
                )
    return groups


def state_of_published(weights: dict[str, np.ndarray], config: TwisterConfig, spec: EnvSpec) -> TwisterState:
    """What acting and dreaming need of a state, from published weights; see `load_published`."""
    groups = load_published(weights, config.model, spec)
    slow_critic, terms = groups.pop("slow_critic"), Twister(config, spec, jnp.float32).terms
    return TwisterState(Trained(groups, {}), slow_critic, ReturnScale.zero(), Health.sound(terms))


def expected_shapes(config: TwisterModelConfig, spec: EnvSpec) -> dict[str, Tree]:
    """The parameters that a model of these sizes has, as shapes."""
    twister = Twister(TwisterConfig(model=config), spec, jnp.float32)
    expected = jax.eval_shape(twister.networks.init, jax.random.key(0))
    return {**expected, "slow_critic": expected["critic"]}


def to_published(group: str, tree: Tree, config: TwisterModelConfig) -> dict[str, np.ndarray]:
    """Parameters or gradients of one group under their published names and in their published layouts."""
    if group == "world_model":
        published = {rule.name: rule.write(_get(tree, rule.path)) for rule in world_model_rules(config)}
        published |= _write_attention(tree, config)
        return published | _write_contrastive(tree["contrastive"], config)
    rules = _head(HEADS[group], ("head",))
    return {rule.name: rule.write(_get(tree, rule.path)) for rule in rules}
