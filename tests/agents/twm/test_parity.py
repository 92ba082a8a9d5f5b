from pathlib import Path

import numpy as np
import pytest

from twister_jax.agents.fixtures import published_weights
from twister_jax.agents.twm.config import TwmModelConfig
from twister_jax.agents.twm.parity import config_of
from twister_jax.agents.twm.weights import load_published, to_published, weights
from twister_jax.envs.base import EnvSpec
from twister_jax.errors import UserError
from twister_jax.parity import check, load

FIXTURE = Path(__file__).parents[2] / "fixtures" / "twm_small.npz"


@pytest.fixture
def published() -> dict[str, np.ndarray]:
    return published_weights(load(FIXTURE)[1])


@pytest.fixture(scope="module")
def config() -> TwmModelConfig:
    return config_of(load(FIXTURE)[0]).model


@pytest.fixture(scope="module")
def spec() -> EnvSpec:
    return EnvSpec(image_shape=(64, 64, 1), num_actions=load(FIXTURE)[0]["num_actions"])


def test_every_quantity_of_the_fixture_agrees():
    _, fixture = load(FIXTURE)
    rows = check(FIXTURE)
    assert [row for row in rows if not row.ok] == []
    compared = {row.name for row in rows}
    given = {"out/wm/context_z_sample", "out/wm/z_sample", "out/im/restart_z", "out/im/z_prior_sample"}
    results = {name for name in fixture if name.startswith(("out/", "grad/"))}
    assert {name for name in results - given - compared if not name.startswith("out/im/start_")} == set()


def test_published_weights_are_read_and_written_back_unchanged(published, config, spec):
    assert {weight.name for weight in weights(config)} == set(published)
    back = {}
    for network, params in load_published(published, config, spec).items():
        back |= to_published(network, params, config)
    for name, value in published.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_foreign_weights_are_refused(published, config, spec):
    del published["ac.actor_model.linear1.weight"]
    with pytest.raises(UserError, match=r"lack 'ac\.actor_model\.linear1\.weight'"):
        load_published(published, config, spec)


@pytest.mark.parametrize(
    "name",
    [
        "ac.actor_model.linear1.weight",
        "wm.obs_model.encoder.0.conv2.weight",
        "wm.obs_model.encoder.2.linear1.weight",
        "wm.dyn_model.prediction_net.transformer.v_bias",
        "wm.dyn_model.prediction_net.embeds.r.linear1.bias",
    ],
)
@pytest.mark.parametrize("change", ["one row more", "another axis", "as many numbers"])
def test_weights_of_other_sizes_are_refused_by_name(published, config, spec, name, change):
    value = published[name]
    published[name] = {
        "one row more": np.concatenate([value, value[:1]]),
        "another axis": value[None],
        "as many numbers": value.reshape(value.shape[0] // 2, -1, *value.shape[1:]),
    }[change]
    with pytest.raises(UserError, match=f"{name}' has shape"):
        load_published(published, config, spec)


def test_weights_for_another_number_of_actions_are_refused(published, config):
    more = EnvSpec(image_shape=(64, 64, 1), num_actions=17)
    with pytest.raises(UserError, match=r"embeds\.a\.weight' has shape"):
        load_published(published, config, more)
