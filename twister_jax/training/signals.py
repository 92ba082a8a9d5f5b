"""Signals that end a run politely."""

import contextlib
import os
import signal
import sys
import threading
from typing import Any


class Interrupted(Exception):
    """A signal asked the run to end; raised only where everything is consistent."""


class Signals:
    """While entered, the first SIGTERM, SIGHUP or Ctrl-C is remembered and the second ends the process.

    A process that was told to ignore SIGHUP (`nohup`) goes on ignoring it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deaf = False
        """Whether `check` waits: until all processes of a run know of the signal."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.received or 0)

    @property
    def name(self) -> str:
        """Of the signal that came."""
        return signal.Signals(self.received).name if self.received else "none"

    def check(self) -> None:
        """Raises `Interrupted` if a signal came."""
        if self.received is not None and not self.deaf:
            raise Interrupted

    def _handle(self, number: int, frame: object) -> None:
        if self.received is not None:
            with contextlib.suppress(Exception):
                if sys.stdout.isatty():
                    os.write(1, b"\x1b[?25h\n")  # the status line had hidden the cursor
            os._exit(128 + number)
        self.received = number
