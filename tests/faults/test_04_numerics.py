"""4. What decides the numbers is recorded, and a resumption that cannot be exact says so."""

import json
import os
import subprocess
import sys

import jax
import pytest

from tests.faults.test_01_hostile_directory import forge
from tests.runs import config_of
from twister_jax.training import provenance
from twister_jax.training.load import load_run
from twister_jax.training.train import train

CORES = len(os.sched_getaffinity(0))


def another(name):
    """What decides the numbers, with one thing otherwise."""
    numerics = provenance.numerics

    def changed(precision):
        return {**numerics(precision), name: "another"}

    return changed


def test_another_number_of_cores_is_said(tmp_path, monkeypatch, capsys):
    assert train(config_of(tmp_path, 60)) == 0
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores | {1000})
    capsys.readouterr()
    assert train(config_of(tmp_path, 80)) == 0
    (note,) = load_run(tmp_path).counters.notes
    assert note in capsys.readouterr().out
    assert f"threads {CORES + 1} (was {CORES}): not bit for bit" in note
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["notes"] == [note]


def test_all_that_decides_the_numbers_is_recorded_and_compared(monkeypatch):
    now = provenance.numerics("float32")
    assert now["generator"] == "threefry2x32"
    assert (now["device"], now["devices"], now["threads"]) == (jax.devices()[0].device_kind, 1, CORES)
    assert (now["precision"], now["jax"]) == ("float32", jax.__version__)
    kept = {"device", "devices", "processor", "threads", "precision", "generator", "settings", "xla_flags"}
    assert now.keys() == kept | {"jax", "jaxlib"}
    for name in now:
        monkeypatch.setattr(provenance, "numerics", another(name))
        was = str(now[name])[:40] or "none"
        assert provenance.different_numerics(now, "float32") == f"{name} another (was {was})"
        monkeypatch.undo()
    assert not provenance.different_numerics(json.loads(json.dumps(now)), "float32")
    assert provenance.different_numerics(None, "float32")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("jax_default_prng_impl", "rbg", "generator rbg (was threefry2x32)"),
        ("jax_threefry_partitionable", False, "settings jax_threefry_partitionable=False (was none)"),
        ("jax_random_seed_offset", 7, "settings jax_random_seed_offset=7 (was none)"),
        (
            "jax_default_matmul_precision",
            "highest",
            "settings jax_default_matmul_precision=highest (was none)",
        ),
        ("jax_numpy_dtype_promotion", "strict", "settings jax_numpy_dtype_promotion=strict (was none)"),
        ("jax_disable_most_optimizations", True, "settings jax_disable_most_optimizations=True (was none)"),
    ],
)
def test_settings_of_jax_that_change_numbers_are_recorded(name, value, said):
    """As environment variables such as `JAX_DEFAULT_PRNG_IMPL` set them."""
    before, usual = provenance.numerics("float32"), jax.config.values[name]
    jax.config.update(name, value)
    try:
        assert provenance.different_numerics(before, "float32") == said
    finally:
        jax.config.update(name, usual)
    assert not provenance.different_numerics(before, "float32")


def test_threads_are_those_that_compute():
    """XLA obeys variables that most people do not know."""
    code = """
import os, jax
from twister_jax.training.provenance import numerics
x = jax.numpy.ones((600, 600))
(x @ x).block_until_ready()
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print(sum(name.endswith("XLAEigen") for name in names), numerics("float32")["threads"])
"""
    for variables in ({}, {"NPROC": "5"}, {"NPROC": "5", "PJRT_NPROC": "3"}):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True)
        computing, recorded = done.stdout.split()
        assert computing == recorded
        assert int(recorded) == int(variables.get("PJRT_NPROC", variables.get("NPROC", CORES)))


def test_what_an_older_version_did_not_record_is_no_difference():
    now = provenance.numerics("float32")
    before = {name: value for name, value in now.items() if name != "settings"}
    assert not provenance.different_numerics(before, "float32")


@pytest.mark.parametrize("was", ["\x1b[2J\n", ["a" * 10_000], 10**400])
def test_what_a_stranger_says_of_it_moves_no_cursor(tmp_path, was, capsys):
    assert train(config_of(tmp_path, 60)) == 0
    forge(lambda content, home: content["host"]["numerics"].update(threads=was))(tmp_path, None)
    assert train(config_of(tmp_path, 80)) == 0
    (note,) = load_run(tmp_path).counters.notes
    assert note.isprintable()
    assert "not bit for bit" in note
    assert len(note) < 200
