"""23. A policy file from a stranger: it is the policy of an agent of ours, or it is refused in one line."""

import copy
import dataclasses
import json
import os
import struct
import threading
import time

import jax
import numpy as np
import pytest

from tests import third
from twister_jax import agents, envs
from twister_jax.errors import UserError
from twister_jax.presets import make_config
from twister_jax.view.export import export
from twister_jax.view.policy import Policy, load

third.register()
KEY, LEAF = "twister_jax", "w"
NAN, INFINITY = float("nan"), float("inf")


def policy_of(agent):
    """As it was before it learned anything."""
    config = make_config(agent, "debug", "Catch", precision="float32")
    suite, name = envs.resolve(config.game)
    spec = suite.make(name, config.env, 0).spec
    made = agents.make_agent(config, spec)
    return Policy(config, spec, made, jax.jit(made.init)(jax.random.key(0)), {"env_steps": 5, "updates": 3})


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The header of a sound file, and what follows it."""
    path = tmp_path_factory.mktemp("sound") / "policy.safetensors"
    export(policy_of(third.AGENT), path, "MIT")
    return split(path.read_bytes())


def split(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, rest):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def refusal(path):
    """What is said: one line, soon, that moves no cursor and fits a screen."""
    started = time.process_time()
    with pytest.raises(UserError) as refused:
        load(path)
    said = str(refused.value)
    assert said.startswith(str(path)), said
    assert said.isprintable(), said
    assert len(said) < 1000 + len(str(path)), said
    assert time.process_time() < started + 20
    return said.removeprefix(str(path))


@pytest.fixture
def refused(tmp_path, sound):
    """Refused is what a function makes of the sound header and what follows it."""

    def check(make):
        path = tmp_path / "policy.safetensors"
        path.write_bytes(make(*copy.deepcopy(sound)))
        return refusal(path)

    return check


def entry(**changes):
    """The entry of an array says something else."""
    return lambda header, rest: joined(header | {LEAF: header[LEAF] | changes}, rest)


def about(**changes):
    """What the file says of itself, by dotted names (`__` for a dot)."""

    def make(header, rest):
        found = json.loads(header["__metadata__"][KEY])
        for name, value in changes.items():
            *above, last = name.split("__")
            inside = found
            for each in above:
                inside = inside[each]
            inside[last] = value
        return joined(header | {"__metadata__": {KEY: json.dumps(found)}}, rest)

    return make


def word(text):
    """The whole of what the file says of itself."""
    return lambda header, rest: joined(header | {"__metadata__": {KEY: text}}, rest)


def length(value):
    return lambda header, rest: value.to_bytes(8, "little") + joined(header, rest)[8:]


def renamed(name):
    """An array that contradicts itself, under another name."""
    return lambda header, rest: joined(
        {**header, name: header[LEAF] | {"shape": [1]}, LEAF: header["updates"]}, rest
    )


def twice(header, rest):
    again = json.dumps({LEAF: header[LEAF]})[1:]
    return joined(f"{json.dumps(header)[:-1]}, {again}".encode(), rest)


def first_number(value):
    """Of the weights."""

    def make(header, rest):
        at = header[LEAF]["data_offsets"][0]
        return joined(header, rest[:at] + struct.pack("<f", value) + rest[at + 4 :])

    return make


BRACKETS = 100_000
HEADERS = {
    "a length beyond all": (length(2**64 - 1), "does not begin with a header"),
    "a negative length": (length(2**64 - 8), "does not begin with a header"),
    "a length of one byte more": (
        lambda header, rest: length(len(joined(header, rest)) - 7)(header, rest),
        "does not begin with a header",
    ),
    "no length": (lambda header, rest: b"\1\2", "does not begin with a header"),
    "nothing": (lambda header, rest: b"", "does not begin with a header"),
    "text that is no UTF-8": (lambda header, rest: joined(b'{"\xff": 1}', rest), "header cannot be read"),
    "another encoding": (
        lambda header, rest: joined(json.dumps(header).encode("utf-16"), rest),
        "header cannot be read",
    ),
    "brackets": (lambda header, rest: joined(b"[" * BRACKETS, rest), "header cannot be read"),
    "objects": (lambda header, rest: joined(b'{"a":' * BRACKETS, rest), "header cannot be read"),
    "a list": (lambda header, rest: joined([header], rest), "header cannot be read"),
    "a key twice": (twice, "header cannot be read"),
    "words twice": (
        lambda header, rest: joined(b'{"__metadata__": {"a": "b", "a": "c"}}', rest),
        "header cannot be read",
    ),
    "words that are a number": (
        lambda header, rest: joined(header | {"__metadata__": 5}, rest),
        "header cannot be read",
    ),
    "overlapping arrays": (entry(data_offsets=[4, 196]), "contradicts itself"),
    "a gap": (
        lambda header, rest: entry(data_offsets=[8, 200])(header, b"12345678" + rest),
        "contradicts itself",
    ),
    "a negative offset": (entry(data_offsets=[-192, 0]), "contradicts itself"),
    "offsets that are no numbers": (entry(data_offsets=[NAN, 192]), "header cannot be read"),
    "offsets that are true": (entry(data_offsets=[False, 192]), "header cannot be read"),
    "an offset of 5,000 digits": (
        lambda header, rest: joined(
            entry(data_offsets=["?", 192])(header, b"")[8:].replace(b'"?"', b"9" * 5_000), rest
        ),
        "header cannot be read",
    ),
    "three offsets": (entry(data_offsets=[0, 192, 384]), "header cannot be read"),
    "another type": (entry(dtype="F64"), "contradicts itself about w"),
    "a type that moves the cursor": (entry(dtype="\x1b[2J\n" * 999), "which are not supported"),
    "another shape": (entry(shape=[3, 17]), "contradicts itself about w"),
    "a negative shape": (entry(shape=[-3, -16]), "contradicts itself about w"),
    "a shape of fractions": (entry(shape=[3.0, 16.0]), "header cannot be read"),
    "a shape of words": (entry(shape=["3", "16"]), "header cannot be read"),
    "a shape of a hundred axes": (entry(shape=[3, 16] + [1] * 98), "header cannot be read"),
    "an empty shape of 2^70": (entry(shape=[0, 2**70], data_offsets=[0, 0]), "header cannot be read"),
    "an empty shape of 2^62 twice": (
        entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
        "has a shape that no array has",
    ),
    "a name that moves the cursor": (renamed("\x1b[2J\n"), "contradicts itself about"),
    "a name of 100,000 letters": (renamed("a" * 100_000), "contradicts itself about"),
    "half a character": (renamed("\ud800"), "contradicts itself about"),
    "the end is missing": (lambda header, rest: joined(header, rest[:-1]), "ends in the midst of"),
    "more behind the end": (lambda header, rest: joined(header, rest + b"x"), "1 bytes follow"),
}

SETTINGS = {
    "words of brackets": (word("[" * BRACKETS), "does not say what it holds"),
    "settings of brackets": (word('{"format": 1, "config": ' + "[" * BRACKETS), "does not say what it holds"),
    "words that are a list": (word("[1]"), "does not say what it holds"),
    "words that are a number": (
        lambda header, rest: joined(header | {"__metadata__": {KEY: 5}}, rest),
        "does not say what it holds",
    ),
    "a format that moves the cursor": (about(format="\x1b[2J\n"), "has format"),
    "a format as long as a book": (about(format=["a" * 100_000]), "has format"),
    "no settings": (about(config=None), "not a configuration"),
    "settings that are a list": (about(config=[]), "not a configuration"),
    "an unknown game": (about(config__game="Pongg"), "unknown game 'Pongg'"),
    "a game that moves the cursor": (about(config__game="\x1b[2J\n"), "unknown game"),
    "an unknown suite": (about(config__game="os:system"), "unknown suite 'os'"),
    "an unknown agent": (about(config__agent="os"), "unknown agent 'os'"),
    "another agent": (about(config__agent="twister"), "unknown field algorithm."),
    "a preset that is no name": (about(config__preset=["paper"]), "not a configuration"),
    "a field that moves the cursor": (about(**{"config__\x1b[2J\n": 5}), "unknown field"),
    "a seed that is no number": (about(config__seed=NAN), "seed = nan: must be a whole number"),
    "a seed that is negative": (about(config__seed=-1), "seed = -1: must be between"),
    "infinite minutes": (about(config__train__checkpoint_minutes=INFINITY), "must be finite"),
    "minutes beyond all": (about(config__train__checkpoint_minutes=10**400), "too large a number"),
    "steps beyond all": (about(config__train__steps=2**70), "config.train.steps"[7:]),
    "a batch beyond all": (about(config__algorithm__batch_size=10**30), "algorithm.batch_size"),
    "games side by side beyond all": (about(config__evaluation__num_envs=10**6), "evaluation.num_envs"),
    "a precision that is none": (about(config__precision="float8"), "precision = float8"),
    "no environment": (about(spec=None), "does not say what its environments were like"),
    "pictures of a terabyte": (about(spec__image_shape=[10**6, 10**6, 1]), "does not say what"),
    "pictures of a gigabyte": (about(spec__image_shape=[10**5, 10**4, 1]), "does not say what"),
    "pictures of fractions": (about(spec__image_shape=[64.0, 64, 3]), "does not say what"),
    "pictures that are true": (about(spec__image_shape=[64, 64, True]), "does not say what"),
    "no actions": (about(spec__num_actions=0), "does not say what"),
    "actions that are true": (about(spec__num_actions=True), "does not say what"),
    "actions beyond all": (about(spec__num_actions=10**9), "does not say what"),
    "actions of which there are 100,000": (about(spec__num_actions=10**5), "another agent or model size"),
    "neither discrete nor not": (about(spec__discrete=[]), "does not say what"),
    "actions that move the cursor": (about(spec__action_names=["\x1b[2J\n"] * 3), "does not say what"),
    "actions that are lists": (about(spec__action_names=[[], {}, 5]), "does not say what"),
    "actions as long as a book": (about(spec__action_names=["a" * 10**6] * 3), "does not say what"),
    "a weight that is no number": (first_number(NAN), "w has numbers that are not finite"),
    "a weight that is infinite": (first_number(-INFINITY), "w has numbers that are not finite"),
    "a weight that is missing": (
        lambda header, rest: joined({name: e for name, e in header.items() if name != LEAF}, rest[192:]),
        "",
    ),
    "weights of another size": (
        lambda header, rest: entry(shape=[48])(header, rest),
        r"another agent or model size: w is float32[48] there and float32[3,16] here",
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(kind, refused):
    make, said = HEADERS[kind]
    assert said in refused(make)


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_and_weights_that_cannot_be_are_refused(kind, refused):
    make, said = SETTINGS[kind]
    assert said in refused(make)


def test_the_sound_file_is_sound(sound, tmp_path):
    (tmp_path / "policy.safetensors").write_bytes(joined(*sound))
    assert load(tmp_path / "policy.safetensors").config.agent == third.AGENT


# ---------------------------------------------------------------------------- what lies in a file's place


def sparse(path, header=b""):
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(1 << 40)


TERABYTE = {"dtype": "U8", "shape": [(1 << 40) - 92], "data_offsets": [0, (1 << 40) - 92]}
PLACES = {
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a terabyte of nothing": sparse,
    "a terabyte of header": lambda path: sparse(path, ((1 << 40) - 8).to_bytes(8, "little")),
    "a header of 17 MB": lambda path: path.write_bytes((17 << 20).to_bytes(8, "little") + b"[" * (17 << 20)),
    "an array of a terabyte": lambda path: sparse(path, joined({LEAF: TERABYTE}, b"")),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_refused(kind, suffix, tmp_path):
    """Nothing is waited for, and nothing is read that is not looked at."""
    path = tmp_path / f"policy{suffix}"
    PLACES[kind](path)
    ended = threading.Event()
    said = []

    def look():
        said.append(refusal(path))
        ended.set()

    threading.Thread(target=look, daemon=True).start()
    assert ended.wait(60), "it hangs"
    assert said


def test_a_name_that_is_too_long_is_refused(tmp_path):
    assert "no such run directory or file" in refusal(tmp_path / ("a" * 3000 + ".safetensors"))


def test_a_link_to_a_policy_is_the_users_own_choice(sound, tmp_path):
    (tmp_path / "policy.safetensors").write_bytes(joined(*sound))
    (tmp_path / "newest.safetensors").symlink_to("policy.safetensors")
    assert load(tmp_path / "newest.safetensors").config.agent == third.AGENT


# ----------------------------------------------------------------------------------- what it must not do


def test_no_code_that_it_names_is_imported(sound, tmp_path, monkeypatch):
    """Not even where Python would find it; `test_24_*` has what plays."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    header, rest = sound
    env = dataclasses.asdict(envs.suite("gym").settings)
    path = tmp_path / "policy.safetensors"
    path.write_bytes(about(config__game="gym:evil_module:Env-v0", config__env=env)(header, rest))
    policy = load(path)
    action, _ = policy.act(policy.carry(), np.zeros(policy.spec.image_shape, np.uint8))
    assert action in range(3)
    export(policy, tmp_path / "again.safetensors", "MIT")


def test_it_does_not_say_which_files_of_the_user_are_read(sound, tmp_path):
    """An export puts evaluation.json of the run directory beside the policy: not one of a file's choosing."""
    record = {"env_steps": 5, "updates": 3, "scores": ["private"]}
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    path = tmp_path / "policy.safetensors"
    path.write_bytes(about(config__logdir=str(tmp_path), evaluation={"mean": 1.0})(*sound))
    export(load(path), tmp_path / "again.safetensors", "MIT")
    assert b"private" not in (tmp_path / "again.safetensors").read_bytes()
    assert load(tmp_path / "again.safetensors").about["evaluation"] == {"mean": 1.0}
