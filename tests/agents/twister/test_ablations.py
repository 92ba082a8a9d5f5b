"""Each ablation does what it says, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import SMALL, SPEC, filled_replay, random_steps
from twister_jax.agents import make_agent
from twister_jax.agents.twister.agent import Twister
from twister_jax.agents.twister.weights import load_published, to_published
from twister_jax.agents.twister.world_model import augment, loss_scales, to_float
from twister_jax.fields import replace
from twister_jax.training.checkpoint import Checkpointer
from twister_jax.training.save import Snapshot


def ablated(**changes):
    return replace(SMALL, {f"algorithm.{name.replace('__', '.')}": value for name, value in changes.items()})


def shapes(config):
    """Shapes of all parameters by their path."""
    twister = Twister(config.algorithm, SPEC, jnp.float32)
    found = jax.eval_shape(twister.networks.init, jax.random.key(0))
    return {
        jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }


def random_params(config):
    """Parameters of every network, none of them zero."""
    twister, rng = Twister(config.algorithm, SPEC, jnp.float32), np.random.default_rng(0)
    found = jax.eval_shape(twister.networks.init, jax.random.key(0))
    return twister, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), found)


def world_model(config):
    twister, params = random_params(config)
    return twister.world_model(params["world_model"])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"contrastive_scale": 0.0}, set()),
        ({"contrastive_decay": 1.0}, set()),
        ({"crop_area": (1.0, 1.0)}, set()),
        ({"model__attention_context": 1}, set()),
        ({"model__contrastive_steps": 1}, {"contrastive"}),
        ({"model__contrastive_actions": False}, {"contrastive"}),
        ({"model__decoder_reads_state": True}, {"decoder"}),
    ],
)
def test_only_the_part_in_question_has_other_parameters(changes, parts):
    before, after = shapes(SMALL), shapes(ablated(**changes))
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path.split("'")[3] for path in changed} == parts
    if "model__contrastive_actions" in changes:
        assert {path.split("'")[5] for path in changed} == {"query_actions"}
    if "model__decoder_reads_state" in changes:
        assert changed == {"['world_model']['decoder']['project']['kernel']"}


def test_without_the_contrastive_loss_all_other_weights_stay():
    before, after = (loss_scales(config.algorithm) for config in (SMALL, ablated(contrastive_scale=0.0)))
    for name in before:
        assert float(after[name]) == (0.0 if name.startswith("contrastive_") else float(before[name]))


def test_equal_weights_have_the_same_sum():
    scales = loss_scales(ablated(contrastive_decay=1.0).algorithm)
    weights = [float(scales[f"contrastive_{k}"]) for k in range(3)]
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_without_augmentation_the_second_view_is_the_frame_itself():
    windows = jax.tree.map(jnp.asarray, random_steps(5, 2))
    view = augment(jax.random.key(0), windows, ablated(crop_area=(1.0, 1.0)).algorithm)
    np.testing.assert_array_equal(view, to_float(windows.image))
    assert np.abs(augment(jax.random.key(0), windows, SMALL.algorithm) - view).max() > 0.1


def test_queries_read_actions_as_the_setting_says():
    features = jax.random.normal(jax.random.key(0), (2, 6, SMALL.algorithm.model.feature_size))
    actions = jax.random.normal(jax.random.key(1), (2, 6, SPEC.num_actions))
    for config, reads in ((SMALL, True), (ablated(model__contrastive_actions=False), False)):
        queries = jax.jit(world_model(config).contrastive.queries)
        assert (np.abs(queries(features, actions) - queries(features, 0 * actions)).max() > 0) == reads


def test_the_decoder_reads_h_as_the_setting_says():
    model = SMALL.algorithm.model
    latent = jnp.eye(model.latent_size)[:2]
    states = jax.random.normal(jax.random.key(0), (2, model.hidden_size))
    for config, reads in ((SMALL, False), (ablated(model__decoder_reads_state=True), True)):
        decode = jax.jit(world_model(config).decode)
        assert (np.abs(decode(latent, states) - decode(latent, 0 * states)).max() > 0) == reads


@pytest.mark.parametrize("changes", [{"model__contrastive_actions": False}, {"model__contrastive_steps": 1}])
def test_weights_travel_to_the_published_names_and_back(changes):
    algorithm = ablated(**changes).algorithm
    _, params = random_params(ablated(**changes))
    params["slow_critic"] = params["critic"]
    published = {}
    for group, tree in params.items():
        published |= to_published(group, tree, algorithm.model)
    back = load_published(published, algorithm.model, SPEC)
    jax.tree.map(np.testing.assert_array_equal, params["world_model"], back["world_model"])


@pytest.mark.slow
def test_all_of_them_together_learn_and_are_saved(tmp_path):
    config = ablated(
        contrastive_scale=0.5,
        contrastive_decay=1.0,
        crop_area=(1.0, 1.0),
        model__attention_context=1,
        model__contrastive_steps=1,
        model__contrastive_actions=False,
        model__decoder_reads_state=True,
    )
    agent = make_agent(config, SPEC)
    state, replay = jax.jit(agent.init)(jax.random.key(0)), filled_replay()
    before = jax.device_get(state)
    state, replay, metrics = jax.jit(agent.update)(state, replay, jax.random.key(1))
    assert all(np.all(np.isfinite(value)) for value in metrics.values())
    assert jax.jit(agent.report)(state, replay, jax.random.key(2))["open_loop"].std() > 0
    old, new = (x.trained.params["world_model"]["decoder"] for x in (before, state))
    assert all(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True))
    Checkpointer(tmp_path / "checkpoints").save(1, Snapshot(state, replay, b"", {}))
    found = Checkpointer(tmp_path / "checkpoints").restore(state, jax.tree.map(jnp.zeros_like, replay))
    jax.tree.map(np.testing.assert_array_equal, found.state, state)
