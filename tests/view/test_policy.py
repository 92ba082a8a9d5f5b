"""Policies from run directories, exported files and published weights, and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import twister_jax
from tests.conftest import SPEC
from twister_jax import agents, parity
from twister_jax.agents.fixtures import published_weights
from twister_jax.cli import main
from twister_jax.envs.base import EnvSpec
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.view import extras
from twister_jax.view.export import export
from twister_jax.view.policy import load

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


def test_one_image_or_a_batch(policy):
    single, carry = policy.act(policy.carry(), images(1)[0])
    assert np.shape(single) == ()
    assert single in range(3)
    batch, _ = policy.act(policy.carry(), images(1))
    assert batch.shape == (1,)
    assert batch[0] == single
    _, carry = policy.act(carry, images(1, 1)[0])
    assert carry.steps == 2
    many, _ = policy.act(policy.carry(), images(5))
    assert many.shape == (5,)


def test_a_policy_says_in_one_line_what_it_is(policy):
    assert re.fullmatch(r"Policy\('\w+' on 'Catch', \d+ steps\)", repr(policy))


def test_the_three_lines_of_the_readme(run):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    lines = block.replace("runs/twister-Catch-cpu-seed0", str(run)).splitlines()
    assert len(lines) == 3
    names = {"tj": twister_jax, "image": images(1)[0]}
    exec("\n".join(lines), names)
    assert names["action"] in range(3)


def test_a_new_episode_begins_where_it_is_said(policy):
    _, carry = policy.act(policy.carry(), images(2))
    _, fresh = policy.act(policy.carry(), images(2, 1))
    _, told = policy.act(carry, images(2, 1), is_first=[True, False])
    memory, from_fresh, one_of_two = (c.carry["memory"] for c in (carry, fresh, told))
    action = carry.carry["action"][1]
    remembered = memory[1] + action @ np.arange(1.0, len(action) + 1)  # as `tests/third/agent.py` has it
    np.testing.assert_allclose(one_of_two[0], from_fresh[0], rtol=1e-6)
    np.testing.assert_allclose(one_of_two[1], from_fresh[1] + remembered / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((64, 64, 1), np.uint8), "shape (64, 64, 3)"),
        (np.zeros((64, 64, 3), np.float32), "uint8"),
        (np.zeros((1, 1, 64, 64, 3), np.uint8), "or a batch"),
    ],
)
def test_other_images_are_refused(policy, image, said):
    with pytest.raises(UserError, match=r"the policy takes") as refused:
        policy.act(policy.carry(), image)
    assert said in str(refused.value)


def test_a_batch_of_another_size_is_refused(policy):
    _, carry = policy.act(policy.carry(), images(2))
    with pytest.raises(UserError, match="2 environments, and the batch of 3"):
        policy.act(carry, images(3))


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def exported(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "policy.safetensors"
    assert "license MIT" in export(policy, path, "MIT")
    return path


def test_an_exported_policy_is_the_same_one(policy, exported):
    loaded = load(exported)
    assert loaded.spec == policy.spec
    assert loaded.config.algorithm == policy.config.algorithm
    carry, other = policy.carry(), loaded.carry()
    for seed in range(3):
        ours, carry = policy.act(carry, images(4, seed))
        theirs, other = loaded.act(other, images(4, seed))
        np.testing.assert_array_equal(ours, theirs)


def test_the_file_says_what_it_is(exported):
    about = load(exported).about
    assert about["license"] == "MIT"
    assert about["env_steps"] == 60
    assert about["evaluation"]["episodes"] == 5
    assert about["provenance"]["versions"]["jax"]
    assert about["config"]["logdir"] == "", "paths are nobody's business"


def test_the_evaluation_of_another_checkpoint_is_not_exported(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({**record, "env_steps": 59}))
    export(load(tmp_path / "run"), tmp_path / "policy.safetensors", "MIT")
    assert load(tmp_path / "policy.safetensors").about["evaluation"] is None


def damage(exported, path, how):
    data = exported.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "other arrays":
        arrays = load_file(exported)
        name = max(arrays, key=lambda each: arrays[each].size)
        arrays[name] = arrays[name][:-1]
        save_file(arrays, path, {"twister_jax": json.dumps(load(exported).about)})
    else:
        save_file(load_file(exported), path, {"twister_jax": how})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "damaged or no safetensors file"),
        ("other arrays", "another agent or model size"),
        ("{", "does not say what it holds"),
        ('{"format": 99}', "has format 99"),
        ('{"format": 1}', "not a configuration"),
    ],
)
def test_damaged_files_are_refused(exported, tmp_path, how, said):
    damage(exported, tmp_path / "policy.safetensors", how)
    with pytest.raises(UserError, match=said):
        load(tmp_path / "policy.safetensors")


def test_what_is_no_policy_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="no such run directory or file"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a run directory"):
        load(tmp_path)
    (tmp_path / "policy.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"expected a run directory, a \.safetensors or an \.npz"):
        load(tmp_path / "policy.pt")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="neither a policy that `export` wrote nor"):
        load(tmp_path / "other.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        load(tmp_path / "broken.npz")
    shutil.copy(run / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="train first"):
        load(tmp_path)


def test_a_missing_package_is_refused_with_the_line_that_installs_it(monkeypatch):
    with pytest.raises(UserError, match=r"pip install 'twister_jax\[view\]'"):
        extras.require("no_such_package_at_all", "view", "a policy file")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["watch"], "--logdir is missing"),
        (["dream", "--logdir", "/nowhere/at/all"], "is not a run directory"),
        (["report", "/nowhere/at/all"], "is not a run directory"),
        (["export", "--logdir", "RUN", "--out", "policy.txt"], "must end in .safetensors or .onnx"),
        (["export", "--logdir", "RUN", "--out", "policy.onnx"], "has no ONNX form (agents that have: twm)"),
        (["watch", "--logdir", "RUN", "--step", "7"], "no checkpoint of step 7"),
        (["dream", "--logdir", "RUN", "--starts", "1"], "starts = 1: must be between 4 and"),
    ],
)
def test_the_command_line_refuses_in_one_line(run, capsys, arguments, said):
    assert main([str(run) if each == "RUN" else each for each in arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


# ------------------------------------------------------------------------------------- published weights


@pytest.fixture(scope="module", params=["twister", "twm"])
def published(request):
    """The weights of a fixture, the settings that fit them, and an environment that fits those."""
    sizes, fixture = parity.load(FIXTURES / f"{request.param}_small.npz")
    weights = published_weights(fixture)
    algorithm = agents.package(request.param).function("parity", "config_of")(sizes)
    channels = 3 if request.param == "twister" else 1
    spec = EnvSpec((64, 64, channels), num_actions=sizes["num_actions"])
    config = make_config(request.param, "paper", "Pong", precision="float32")
    config = dataclasses.replace(config, algorithm=algorithm)
    return request.param, weights, config, spec


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_published_weights_are_loaded(published, tmp_path, kind):
    agent, weights, config, spec = published
    path = tmp_path / f"weights.{kind}"
    contiguous = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    np.savez(path, **contiguous) if kind == "npz" else save_file(contiguous, path)
    policy = load(path, config=config, spec=spec)
    write = agents.package(agent).function("weights", "to_published")
    for group, tree in policy.state.trained.params.items():
        for name, value in write(group, tree, config.algorithm.model).items():
            np.testing.assert_array_equal(value, weights[name], err_msg=name)


def test_published_weights_need_the_settings_they_were_trained_with(published, tmp_path):
    agent, weights, *_ = published
    np.savez(tmp_path / "weights.npz", **weights)
    with pytest.raises(UserError, match="does not say their sizes"):
        load(tmp_path / "weights.npz")
    other = make_config("twm" if agent == "twister" else "twister", "debug", "Pong")
    with pytest.raises(UserError, match="and the config is of"):
        load(tmp_path / "weights.npz", config=other, spec=SPEC)
