"""2. Failing to print never ends or harms a run."""

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
