"""Both agents learn Catch, in either precision, by the command that the README names."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.learning


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("agent", ["twister", "twm"])
def test_catch_is_learned(agent, precision, tmp_path):
    """1 is the best mean score; a random player gets about -0.6."""
    command = [sys.executable, "-m", "twister_jax", "train", "--game", "Catch", "--agent", agent]
    command += ["--precision", precision, "--logdir", str(tmp_path / "run")]
    subprocess.run(command, check=True)
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["mean"] > 0.9
