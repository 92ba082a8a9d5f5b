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


def _begin_on_terminal(folder, kind):
    """A run on a pseudo-terminal with `TERM=kind`, once it says `updates`: itself, our end, what it said."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tests.third", "train", "--agent", "minimal", "--game", "Catch"]
    command += ["--preset", "debug", "--steps", "150", "--logdir", str(folder)]
    environment = {**os.environ, "TERM": kind}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen = bytearray()
    end = time.monotonic() + 120
    while b"updates" not in seen and time.monotonic() < end:
        try:
            seen += os.read(ours, 1 << 16)
        except OSError:  # the run has ended and closed the terminal
            break
    assert b"updates" in seen, seen.decode(errors="replace")
    return process, ours, seen


def test_a_terminal_that_is_closed_does_not_end_a_run(tmp_path):
    """It goes while the status line rewrites itself; whoever ignores SIGHUP (`nohup`, `tmux`) is not told."""
    process, ours, seen = _begin_on_terminal(tmp_path / "run", "xterm")
    os.close(ours)
    assert process.wait(120) == 0
    assert b"\x1b[2K" in seen  # a line is cleared: it was the status line of a terminal
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_terminal_that_cannot_rewrite_a_line_gets_plain_ones(tmp_path):
    """`TERM=dumb`, as in an editor's shell: rich would show nothing there."""
    process, ours, seen = _begin_on_terminal(tmp_path / "run", "dumb")
    os.close(ours)
    assert process.wait(120) == 0
    assert b"\x1b" not in seen
