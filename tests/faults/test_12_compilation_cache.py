"""12. A truncated entry of the compilation cache is replaced by a sound one, and said once."""

import os
import subprocess
import sys

from tests.runs import ROOT

CODE = """
import logging, pathlib, sys, jax
from twister_jax import runtime
logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
runtime.keep_compiled_programs("cpu")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

def program(x):
    return (x * 3 + 1).sum()

def entries():
    return {path: path.stat().st_size for path in runtime.cache_directory("cpu").glob("*program*-cache")}

x = jax.numpy.arange(5.0)
for left in (None, 100, 0):
    for path in entries() if left is not None else ():
        with open(path, "r+b") as file:
            file.truncate(left)
    jax.clear_caches()
    print("result", jax.jit(program)(x), sorted(entries().values())[0] > 500)
jax.clear_caches()
print("result", jax.jit(program)(x))
"""


def test_a_truncated_program_is_compiled_and_written_anew(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TWISTER_JAX_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("result")] == ["result 35.0 True"] * 3 + ["result 35.0"]
    said = [line for line in lines if not line.startswith("result")]
    assert len(said) == 2
    assert all("jit_program" in line and "was damaged: compiling it anew" in line for line in said)
    assert "Error reading" not in done.stderr
