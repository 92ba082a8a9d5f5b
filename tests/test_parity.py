"""Agreement with the published formulation, and that disagreement is noticed."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SPEC
from twister_jax import parity, runtime
from twister_jax.agents.fixtures import Row, published_weights, relative_error
from twister_jax.agents.twister.parity import config_of
from twister_jax.agents.twister.weights import load_published, to_published
from twister_jax.errors import UserError
from twister_jax.nn import cpu_convolutions, cpu_epilogues

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def twister():
    return parity.load(FIXTURES / "twister_small.npz")


def test_twister_agrees_in_everything_the_fixture_holds(capsys):
    assert parity.main(FIXTURES / "twister_small.npz") == 0
    printed = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in printed[:-1]}
    _, fixture = parity.load(FIXTURES / "twister_small.npz")
    given = {"post_sample", "prior_sample", "aug_post_sample", "img_action"}
    given |= {"start_is_first", "start_is_first_context"}
    expected = {n for n in fixture if n.startswith(("out/", "grad/")) and n.rsplit("/", 1)[1] not in given}
    assert expected <= names
    assert all(line.endswith("ok") for line in printed[:-1])


@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_the_formulation_of_accelerators_agrees_as_well(agent, monkeypatch):
    """Plain library calls, with their own gradients."""
    for module in (cpu_convolutions, cpu_epilogues):
        for name in ("conv2d", "conv2d_transpose", "apply"):
            monkeypatch.delattr(module, name, raising=False)
    with runtime.tracing_for("gpu"):
        rows = parity.check(FIXTURES / f"{agent}_small.npz")
    assert len(rows) >= 200
    assert [row for row in rows if not row.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_fixtures_agree_when_compiled_as_a_run_is(agent):
    """`-m slow` compiles with all of XLA's optimisations, unlike the default suite."""
    assert parity.main(FIXTURES / f"{agent}_small.npz") == 0


def test_a_wrong_weight_is_noticed(tmp_path, capsys):
    with np.load(FIXTURES / "twister_small.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = "param/rssm.transformer.blocks.1.self_att_module.attention.v"
    arrays[name] = arrays[name] + np.float16(0.25)
    np.savez(tmp_path / "wrong.npz", **arrays)
    assert parity.main(tmp_path / "wrong.npz") == 1
    printed = capsys.readouterr().out
    assert "OFF" in printed
    assert printed.splitlines()[-1].endswith("are off")


def test_importing_and_exporting_published_weights_are_inverse(twister):
    sizes, fixture = twister
    config = config_of(sizes).model
    weights = published_weights(fixture)
    spec = SPEC.__class__(image_shape=(64, 64, 3), num_actions=sizes["num_actions"])
    groups = load_published(weights, config, spec)
    exported = {}
    for group, tree in groups.items():
        exported |= to_published(group, tree, config)
    assert exported.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_published_weights_that_do_not_fit_are_refused(twister):
    sizes, fixture = twister
    config = config_of(sizes).model
    weights = published_weights(fixture)
    spec = SPEC.__class__(image_shape=(64, 64, 3), num_actions=sizes["num_actions"])
    narrow = weights | {"rssm.dynamics_predictor.weight": weights["rssm.dynamics_predictor.weight"][:, :-1]}
    with pytest.raises(UserError, match=r"prior_logits.*should be"):
        load_published(narrow, config, spec)
    del weights["rssm.weight_init"]
    with pytest.raises(UserError, match=r"rssm\.weight_init"):
        load_published(weights, config, spec)


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_files_that_are_no_fixture_are_refused(tmp_path, content):
    path = tmp_path / "file.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"file\.npz"):
        parity.check(path)


def test_an_archive_without_a_configuration_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="config_json"):
        parity.check(tmp_path / "other.npz")


def test_relative_error_never_broadcasts():
    assert relative_error(np.zeros(3), np.zeros((3, 1))) == float("inf")
    assert not Row("x", float("nan"), 1.0).ok
