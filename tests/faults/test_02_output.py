"""2. Failing to print never ends or harms a run."""

import os
import pty
import subprocess
import sys
import time

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


def test_a_terminal_that_is_closed_does_not_end_a_run(tmp_path):
    """It goes while the status line rewrites itself; whoever ignores SIGHUP (`nohup`, `tmux`) is not told."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tests.third", "train", "--agent", "minimal", "--game", "Catch"]
    command += ["--preset", "debug", "--steps", "150", "--logdir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen = bytearray()
    end = time.monotonic() + 120
    while b"updates" not in seen and time.monotonic() < end:
        seen += os.read(ours, 1 << 16)
    os.close(ours)
    assert process.wait(120) == 0
    assert b"\x1b[2K" in seen  # a line is cleared: it was the status line of a terminal
    assert (tmp_path / "run" / "evaluation.json").exists()
