"""What a run says to people while it goes on."""

import contextlib
import sys
import time
from typing import Any


class Progress:
    """A status line that rewrites itself on a terminal, and a plain line now and then elsewhere.

    Failing to print never ends a run: what cannot be written is dropped.
    """

    def __init__(self, every_seconds: float = 15.0):
        """`every_seconds`: time between lines where there is no terminal."""
        self._live = sys.stdout is not None and sys.stdout.isatty()
        self._every = 0.5 if self._live else every_seconds
        self._next = 0.0
        self._status: Any = None
        self._last = ""

    def due(self) -> bool:
        """Whether it is time for another line."""
        return time.monotonic() >= self._next

    def update(self, line: str) -> None:
        """Shows where the run stands."""
        self._next = time.monotonic() + self._every
        if not self._live:
            if line != self._last:
                say(line)
            self._last = line
            return
        from rich.console import Console
        from rich.markup import escape

        try:
            if self._status is None:
                self._status = Console().status("", spinner="dots")
                self._status.start()
            self._status.update(escape(line))
        except OSError:
            self._live = False

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._status is None:
            say(line)
            return
        try:
            self._status.console.print(line, markup=False, highlight=False, soft_wrap=True)
        except OSError:
            self._live = False

    def close(self) -> None:
        """Releases the terminal."""
        status, self._status = self._status, None
        if status is not None:
            try:
                status.stop()
            except OSError:
                self._live = False


def say(line: str) -> None:
    """Prints a line if that is possible: a full disk or a reader that went away is no reason to stop."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full or gone; closed; None
        print(line, flush=True)


def duration(seconds: float) -> str:
    """`2h13m`, `4m05s` or `12s`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
