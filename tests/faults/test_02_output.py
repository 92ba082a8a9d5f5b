"""2. Failing to print never ends or harms a run."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.parametrize("redirect", [">/dev/full 2>/dev/full", "| head -1", ">&- 2>&-"])
def test_failing_to_print_does_not_end_a_run(tmp_path, redirect):
    command = f"{sys.executable} -m tests.third train --agent minimal --game Catch --preset debug"
    shell = f"{command} --logdir {tmp_path / 'run'} {redirect}"
    subprocess.run(["sh", "-c", shell], cwd=ROOT, timeout=120)
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_terminal_that_knows_ascii_alone_is_written_to(tmp_path):
    """What it cannot show, the arrow for one, becomes a question mark."""
    command = [sys.executable, "-m", "tests.third", "train", "--agent", "minimal", "--game", "Catch"]
    command += ["--preset", "debug", "--logdir", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"? {tmp_path / 'run'}" in done.stdout.decode("ascii")
    assert b"Traceback" not in done.stderr
