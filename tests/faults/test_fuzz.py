"""Random command lines, config.json, manifests, fixtures and policy files. None ends in a traceback.

Everything runs in this process, and stops where computing would begin. 25 cases of each kind in `make test`,
500 in `make test-faults`.
"""

import contextlib
import copy
import functools
import io
import json
import os
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import third
from tests.faults.test_23_policy_files import KEY, joined, policy_of, split
from tests.runs import config_of
from twister_jax import agents, cli, parity
from twister_jax.agents.twister import parity as twister_parity
from twister_jax.agents.twister import weights as twister_weights
from twister_jax.agents.twister.agent import Twister
from twister_jax.agents.twm import parity as twm_parity
from twister_jax.agents.twm import weights as twm_weights
from twister_jax.agents.twm.agent import Twm
from twister_jax.errors import UserError
from twister_jax.fields import describe
from twister_jax.presets import make_config
from twister_jax.training import evaluation, loop, manifest, run, train
from twister_jax.training.load import load_run
from twister_jax.training.run import Run
from twister_jax.training.rundir import RunDirectory
from twister_jax.view.export import export
from twister_jax.view.policy import load

FIXTURES = Path(__file__).parents[1] / "fixtures"

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))

numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from(
        [-1, 2**31 - 1, 2**31, 2**63, 10**9, 10**30, 10**400, 1e-320, 1.7e308, float("inf"), float("nan")]
    ),
    st.floats(allow_nan=True, allow_infinity=True),
)
texts = st.one_of(st.text(max_size=12), st.sampled_from(["", "..", "/", "\n", "\x1b[2J", "a" * 3000, "ä→"]))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=6,
)
changes = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "delete", "add"]), junk),
    min_size=1,
    max_size=3,
)


def places(tree, above=()):
    """The path of everything in a tree of dictionaries and lists."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in inside:
        yield (*above, name)
        yield from places(value, (*above, name))


def changed(tree, changes):
    """The tree with some of its values replaced, deleted or joined by others."""
    tree = copy.deepcopy(tree)
    for index, what, value in changes:
        paths = list(places(tree))
        if not paths:
            return value
        *above, name = paths[index % len(paths)]
        holder = tree
        for step in above:
            holder = holder[step]
        if what == "delete":
            del holder[name]
        elif what == "replace" or isinstance(holder, list):
            holder[name] = value
        else:
            holder[f"{name}x"] = value
    return tree


def damaged(data, index, what, value):
    """Bytes with some of them cut off, replaced or added."""
    at = index % (len(data) + 1)
    more = json.dumps(value, default=str).encode(errors="replace")
    return data[:at] + (b"" if what == "delete" else more) + (b"" if what == "replace" else data[at + 1 :])


@pytest.fixture(autouse=True)
def nothing_computes(monkeypatch):
    """What is accepted ends where training, playing or comparing would begin."""
    monkeypatch.setattr(train, "train", lambda *_, **__: 0)
    monkeypatch.setattr(train, "train_seeds", lambda *_, **__: 0)
    for name in ("supervise", "connect"):
        monkeypatch.setattr(cli.processes, name, lambda *_: cli.processes.ALONE)
    monkeypatch.setattr(evaluation, "evaluate_directory", lambda *_: 0)
    monkeypatch.setattr(loop, "learn_everything", lambda run: None)
    monkeypatch.setattr(run, "compile_programs", lambda *_: None)
    monkeypatch.setattr(Run, "evaluate", lambda self: None)
    monkeypatch.setattr(Run, "save", lambda self, wait=True: True)


# Building an agent is most of what a case would cost, and of one configuration it is the same every time.


@pytest.fixture(autouse=True)
def networks_are_built_once(monkeypatch):
    for module in (twister_parity, twister_weights):
        monkeypatch.setattr(module, "Twister", _twister)
    for module in (twm_parity, twm_weights):
        monkeypatch.setattr(module, "Twm", _twm)


_twister, _twm = functools.lru_cache(16)(Twister), functools.lru_cache(16)(Twm)
_built = functools.lru_cache(16)(agents.make_agent)


def built(config, spec):
    try:
        hash((config, spec))
    except TypeError:  # whatever a file said the environment was
        return agents.make_agent(config, spec)
    return _built(config, spec)


def in_one_line(call):
    """Calls what either works or is refused."""
    refusal = ""
    try:
        call()
    except UserError as error:
        refusal = str(error)
    assert refusal.isprintable(), refusal


def answer(arguments, capsys):
    """What a command answers: an exit code, and at most one line of ours on the error stream."""
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as end:  # after --help
        code = end.code
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("twister_jax: ")]
    assert code in (0, 2), (code, said.err)
    assert len(lines) == (code == 2), said.err
    assert "".join(lines).isprintable(), said.err
    assert "Traceback" not in said.err + said.out
    return code


# --------------------------------------------------------------------------------------- command lines

names = st.sampled_from([f"--{name.replace('_', '-')}" for name in describe(make_config())])
words = st.one_of(
    names,
    numbers.map(str),
    texts.filter(lambda text: "\0" not in text),
    st.sampled_from(
        ["--", "-h", "--help", "--game", "Pong", "--agent", "twm", "minimal", "--preset", "debug"]
    ),
    st.sampled_from(["--seeds", "0,1", "--seeds=2", "--out", "x.onnx", "--starts", "--license", "x.toml"]),
    st.sampled_from(["--logdir", "/nowhere", "--step", "--episodes", "--file", "1,000", "1e5", "True", "="]),
)
lines = st.tuples(
    st.sampled_from(["train", *sorted(cli.COMMANDS.keys() - {"doctor"}), "trian"]),
    st.lists(st.one_of(words, st.tuples(names, words).map("=".join)), max_size=7),
).map(lambda line: [line[0], *line[1]])


def fuzz_command_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(line):
        answer(line, capsys)
        assert os.listdir(tmp_path) == []

    return given(lines)(check)


# ----------------------------------------------------------------------------------------- config.json


def fuzz_configurations(tmp_path, capsys):
    sound = config_of(tmp_path).to_dict()
    path = tmp_path / "config.json"

    def check(changes, raw):
        data = json.dumps(changed(sound, changes)).encode(errors="replace")
        path.write_bytes(damaged(data, *changes[0]) if raw else data)
        answer(["evaluate", "--logdir", str(tmp_path)], capsys)
        for config in (sound, changed(sound, changes[:1])):
            in_one_line(lambda config=config: RunDirectory(tmp_path).check_config(config, ["train"]))

    return given(changes, st.booleans())(check)


# ------------------------------------------------------------------------------------------- manifests


def fuzz_manifests(tmp_path, undisturbed):
    copied = tmp_path / "run"
    config = config_of(copied, **{"env.num_envs": 2})
    newest = max(path.name for path in (undisturbed / "checkpoints").glob("0*"))
    ignored = shutil.ignore_patterns("pictures", "events*")

    def check(changes, raw, inside):
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(undisturbed, copied, ignore=ignored)
        path = copied / "checkpoints" / newest / "manifest.json"
        content = json.loads(path.read_text())["content"]
        if inside:  # what only the run itself can check
            content["host"] = changed(content["host"], changes)
        else:
            content = changed(content, changes)
        text = json.dumps([manifest.FORMAT, content], sort_keys=True).encode(errors="replace")
        whole = {"format": manifest.FORMAT, "crc32": zlib.crc32(text), "content": content}
        data = (json.dumps(whole, sort_keys=True, indent=1) + "\n").encode(errors="replace")
        path.write_bytes(damaged(data, *changes[0]) if raw else data)
        in_one_line(lambda: load_run(copied, make_agent=built))
        in_one_line(lambda: TRAIN(config, make_agent=built))

    return given(changes, st.booleans(), st.booleans())(check)


TRAIN = train.train

# -------------------------------------------------------------------------------------------- fixtures


class Reached(Exception):
    """Everything was accepted, and computing would begin."""


def fuzz_fixtures(tmp_path, monkeypatch):
    sound = {name: parity.load(FIXTURES / f"{name}_small.npz") for name in ("twister", "twm")}
    raw_bytes = io.BytesIO()
    np.savez(raw_bytes, config_json=json.dumps(sound["twm"][0]), **{"param/a": np.zeros(3)})
    path = tmp_path / "fixture.npz"
    load = parity.load

    def reached(*_, **__):
        raise Reached

    def changed_array(array, what, value):
        if what == "delete":
            return array[..., :-1] if array.ndim and array.shape[-1] else array.astype(str)
        return np.array([str(value)]) if what == "add" else array.reshape(-1)[:1]

    def check(name, changes, kind):
        sizes, arrays = sound[name]
        arrays = dict(arrays)
        if kind == "sizes":
            sizes = changed(sizes, changes)
        elif kind == "bytes":
            path.write_bytes(damaged(raw_bytes.getvalue(), *changes[0]))
        else:
            for index, what, value in changes:
                chosen = list(arrays)[index % len(arrays)]
                if kind == "missing":
                    del arrays[chosen]
                else:
                    arrays[chosen] = changed_array(arrays[chosen], what, value)
        monkeypatch.setattr(parity, "load", load if kind == "bytes" else lambda _: (sizes, arrays))
        with contextlib.suppress(Reached):
            in_one_line(lambda: parity.check(path))

    monkeypatch.setattr(jax, "jit", reached)
    kinds = st.sampled_from(["sizes", "bytes", "missing", "arrays"])
    return given(st.sampled_from(["twister", "twm"]), changes, kinds)(check)


# -------------------------------------------------------------------------------------- policy files


def fuzz_policies(tmp_path, monkeypatch):
    """The header, what it says of the policy, or the bytes."""
    path = tmp_path / "policy.safetensors"
    export(policy_of(third.AGENT), path, "MIT")
    header, rest = split(path.read_bytes())
    settings_in_it = json.loads(header["__metadata__"][KEY])
    monkeypatch.setattr(agents, "make_agent", built)

    def check(changes, kind):
        found = dict(header)
        if kind == "settings":
            text = json.dumps(changed(settings_in_it, changes), default=str)
            found["__metadata__"] = {KEY: text}
        elif kind == "header":
            found = changed(header, changes)
        data = joined(found, rest)
        path.write_bytes(damaged(data, *changes[0]) if kind == "bytes" else data)
        in_one_line(lambda: load(path))

    return given(changes, st.sampled_from(["settings", "settings", "header", "bytes"]))(check)


# ------------------------------------------------------------------------------------------- the tests


@pytest.fixture
def fuzzers(tmp_path, capsys, monkeypatch):
    return {
        "command lines": lambda: fuzz_command_lines(tmp_path, capsys, monkeypatch),
        "config.json": lambda: fuzz_configurations(tmp_path, capsys),
        "fixtures": lambda: fuzz_fixtures(tmp_path, monkeypatch),
        "policies": lambda: fuzz_policies(tmp_path, monkeypatch),
    }


KINDS = ["command lines", "config.json", "fixtures", "policies"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_input_is_answered_in_one_line(kind, fuzzers):
    FEW(fuzzers[kind]())()


def test_random_manifests_are_answered_in_one_line(tmp_path, undisturbed):
    FEW(fuzz_manifests(tmp_path, undisturbed))()


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_much_random_input_is_answered_in_one_line(kind, fuzzers):
    MANY(fuzzers[kind]())()


@pytest.mark.faults
def test_many_random_manifests_are_answered_in_one_line(tmp_path, undisturbed):
    MANY(fuzz_manifests(tmp_path, undisturbed))()
