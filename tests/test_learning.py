"""Both agents learn Catch, in either precision, and TWISTER learns it with continuous actions too."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.learning

GAMES = [(agent, "Catch", precision) for agent in ("twister", "twm") for precision in ("float32", "bfloat16")]


@pytest.mark.parametrize(("agent", "game", "precision"), [*GAMES, ("twister", "ContinuousCatch", "float32")])
def test_catch_is_learned(agent, game, precision, tmp_path):
    """1 is the best mean score; a random player gets about -0.6."""
    command = [sys.executable, "-m", "twister_jax", "train", "--game", game, "--agent", agent]
    command += ["--precision", precision, "--logdir", str(tmp_path / "run")]
    subprocess.run(command, check=True)
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["mean"] > 0.9
