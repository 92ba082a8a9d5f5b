"""Our safetensors files are those of the format's own library, and damaged ones are told apart."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, save

from twister_jax.view import tensors

ARRAYS = {
    "flags": np.array([True, False, True]),
    "kernel": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
    "count": np.array(7, np.int32),
    "nothing": np.zeros((0, 4), np.float32),
    "wide": np.arange(4, dtype=np.uint64).reshape(2, 2),
}


def header(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text, rest):
    return len(text).to_bytes(8, "little") + text + rest


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_library_reads_what_is_written():
    data = tensors.dump(ARRAYS, {"who": "we"})
    assert_same(load(data), ARRAYS)
    assert header(data)[0]["__metadata__"] == {"who": "we"}


def test_what_the_library_writes_is_read():
    arrays, metadata = tensors.parse(save(ARRAYS, {"who": "they"}))
    assert_same(arrays, ARRAYS)
    assert metadata == {"who": "they"}
    assert tensors.parse(save({"a": np.zeros(2)}))[1] == {}


def test_bfloat16_comes_back():
    half = {"half": np.arange(3).astype(jnp.bfloat16)}
    data = tensors.dump(half, {})
    assert header(data)[0]["half"]["dtype"] == "BF16"
    assert_same(tensors.parse(data)[0], half)


def change(**entries):
    found, rest = header(tensors.dump({"a": np.arange(4.0), "b": np.arange(2.0)}, {}))
    found["a"] |= entries
    return with_header(json.dumps(found).encode(), rest)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "does not begin with a header"),
        (b"import os\nos.system('ls')\n", "does not begin with a header"),
        (with_header(b"[1]", b""), "header cannot be read"),
        (with_header(b'{"a":' * 9_000, b""), "header cannot be read"),
        (with_header(b'{"a": {"data_offsets": [0, "x"]}, "b": {"data_offsets": [0, 1]}}', b""), "cannot be"),
        (change(dtype="C64"), "a has numbers of type C64"),
        (change(dtype=["F64"]), "a has numbers of type"),
        (change(shape=[5]), "contradicts itself about a"),
        (change(shape=[-2, -2]), "contradicts itself about a"),
        (change(shape=None), "header cannot be read"),
        (change(data_offsets=[0, 8, 32]), "header cannot be read"),
        (change(data_offsets=[0, float("inf")]), "header cannot be read"),
        (change(data_offsets=[8, 40]), "contradicts itself"),
        (change(data_offsets=[0, 2**50], shape=[2**47]), "ends in the midst of a"),
        (change()[:-1], "ends in the midst of b"),
        (change() + b"x", "1 bytes follow"),
    ],
)
def test_damaged_files_are_told_apart(data, said):
    with pytest.raises(ValueError, match=said):
        tensors.parse(data)
