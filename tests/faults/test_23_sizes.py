"""23. Policies whose settings no machine has room for, or whose published weights are others."""

import contextlib
import dataclasses
import time

import numpy as np
import pytest

from tests.faults.test_23_policy_files import about, policy_of, refusal, split
from twister_jax import agents
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.view.export import export
from twister_jax.view.policy import load


def sizes_of(agent):
    """All whole numbers and widths among an agent's settings, by dotted names."""
    for name, value in json_leaves(dataclasses.asdict(make_config(agent, "debug", "Catch").algorithm)):
        if isinstance(value, tuple) or (isinstance(value, int) and not isinstance(value, bool)):
            yield name, value


def json_leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from json_leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def with_sizes(header, rest, **sizes):
    return about(**{f"config__algorithm__{name.replace('.', '__')}": value for name, value in sizes.items()})(
        header, rest
    )


@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_settings_that_need_terabytes_are_refused(agent, tmp_path):
    """Nothing is allocated before the weights in the file are known to be as large as the settings say."""
    path = tmp_path / "policy.safetensors"
    export(policy_of(agent), path, "MIT")
    header, rest = split(path.read_bytes())
    everything = dict(sizes_of(agent))
    largest = {name: [10**5] * 3 if isinstance(value, tuple) else 10**5 for name, value in everything.items()}
    for sizes in (largest, {name: value for name, value in largest.items() if "hidden" in name}):
        path.write_bytes(with_sizes(header, rest, **sizes))
        refusal(path)


@pytest.mark.faults
@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_every_size_of_an_agent_may_be_anything(agent, tmp_path):
    """Each is used, or refused in one line, soon."""
    path = tmp_path / "policy.safetensors"
    export(policy_of(agent), path, "MIT")
    header, rest = split(path.read_bytes())
    for name, value in sizes_of(agent):
        numbers = (-1, 0, 1, 3, 99, 9_999, 10**5, 10**9, 2**63)
        for size in [[n] * 3 for n in numbers] + [[]] if isinstance(value, tuple) else numbers:
            path.write_bytes(with_sizes(header, rest, **{name: size}))
            started = time.process_time()
            with contextlib.suppress(UserError):
                load(path)
            assert time.process_time() < started + 60, (name, size)


@pytest.mark.parametrize("agent", ["twister", "twm"])
@pytest.mark.parametrize(
    "kind", ["words", "one number", "no axes", "another size", "not finite", "beyond float32"]
)
def test_published_weights_that_cannot_be_are_refused(agent, kind, tmp_path, published):
    config, spec, weights = published(agent)
    path = tmp_path / "weights.npz"
    name = max(weights, key=lambda each: weights[each].size)
    changed = {
        "words": np.array("abc"),
        "one number": np.zeros(1, np.float32),
        "no axes": np.float32(1),
        "another size": weights[name][:-1],
        "not finite": np.where(np.arange(weights[name].size) == 7, np.inf, 0.0).reshape(weights[name].shape),
        "beyond float32": np.full(weights[name].shape, 1e300),
    }[kind]
    np.savez(path, **{**weights, name: changed})
    with pytest.raises(UserError) as refused, np.errstate(over="ignore"):
        load(path, config=config, spec=spec)
    assert str(refused.value).isprintable()


@pytest.fixture(scope="module")
def published():
    """Weights under the authors' names, and the settings and environment that they fit."""

    def make(agent):
        policy = policy_of(agent)
        write = agents.package(agent).function("weights", "to_published")
        groups = dict(policy.state.trained.params)
        if agent == "twister":
            groups["slow_critic"] = policy.state.slow_critic
        weights = {}
        for group, tree in groups.items():
            weights |= write(group, tree, policy.config.algorithm.model)
        return policy.config, policy.spec, weights

    return make
