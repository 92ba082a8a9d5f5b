"""A parity fixture whose numbers cannot be is refused in one line: nothing is computed, and nothing hangs."""

import json
from pathlib import Path

import numpy as np
import pytest

from twister_jax import cli, parity

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = {  # of sizes, and of an input, in the fixture of each agent
    "twister": {
        "heads": "attention_heads",
        "width": "hidden_size",
        "count": "batch_size",
        "steps": "batch_length",
        "input": "in/action",
    },
    "twm": {
        "heads": "num_heads",
        "width": "embed_dim",
        "count": "batch_size",
        "steps": "sequence_length",
        "input": "in/observation",
    },
}


def size(kind, value):
    return lambda sizes, arrays, names: sizes.update({names.get(kind, kind): value})


def without(kind):
    return lambda sizes, arrays, names: (sizes.pop(names.get(kind, kind), 0), arrays.pop(names.get(kind), 0))


def weight(change):
    """The largest weight is another one."""

    def make(sizes, arrays, names):
        name = max((name for name in arrays if name.startswith("param/")), key=lambda each: arrays[each].size)
        arrays[name] = change(arrays[name])

    return make


def given(change):
    return lambda sizes, arrays, names: arrays.update({names["input"]: change(arrays[names["input"]])})


KINDS = {
    "sizes that are no JSON": "{",
    "sizes of brackets": "[" * 100_000,
    "sizes that are nested deeply": '{"hidden_size": ' + "[" * 500 + "]" * 500 + "}",
    "sizes that are a list": "[]",
    "sizes that are a number": "7",
    "no sizes": "{}",
    "no heads": size("heads", 0),
    "a width that is lacking": without("width"),
    "a width that is text": size("width", "64"),
    "a width that is true": size("width", True),
    "a width that is a fraction": size("width", 16.5),
    "a width that is a list": size("width", [16]),
    "a negative width": size("width", -16),
    "a width of a billion": size("width", 10**9),
    "a width beyond all numbers": size("width", 10**400),
    "a width that no head divides": size("width", 17),
    "a batch of nothing": size("count", 0),
    "windows of a billion steps": size("steps", 10**9),
    "no actions": size("num_actions", 0),
    "actions that are text": size("num_actions", "4"),
    "a billion actions": size("num_actions", 10**9),
    "more actions": size("num_actions", 17),
    "weights that are text": weight(lambda x: np.full(x.shape, "a")),
    "weights of one more row": weight(lambda x: np.concatenate([x, x[:1]])),
    "a weight that is one number": weight(lambda x: x.reshape(-1)[0]),
    "a weight without elements": weight(lambda x: x[:0]),
    "an input that is lacking": without("input"),
    "an input that is text": given(lambda x: np.full(x.shape, "a")),
    "an input that is one number": given(lambda x: x.reshape(-1)[0]),
}


@pytest.fixture(scope="module")
def sound():
    return {agent: parity.load(FIXTURES / f"{agent}_small.npz") for agent in NAMES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("agent", NAMES)
def test_a_broken_fixture_is_refused_in_one_line(agent, kind, sound, tmp_path, capsys):
    sizes, arrays = json.loads(json.dumps(sound[agent][0])), dict(sound[agent][1])
    text, make = "", KINDS[kind]
    if callable(make):
        make(sizes, arrays, NAMES[agent])
    else:
        text = make
    np.savez(tmp_path / "broken.npz", config_json=text or json.dumps(sizes), **arrays)
    assert cli.main(["parity", str(tmp_path / "broken.npz")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("twister_jax: ")
    assert said.count("\n") == 1
    assert len(said) < 1_000
