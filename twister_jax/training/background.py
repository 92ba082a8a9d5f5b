"""Signals that end a run politely, and compilation that does not make them wait."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from twister_jax.allocator import return_freed_memory


class Interrupted(Exception):
    """A signal asked the run to end; raised only where everything is consistent."""


class Signals:
    """While entered, the first SIGTERM or Ctrl-C is remembered and the second one ends the process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
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
        if self.received is not None:
            raise Interrupted

    def _handle(self, number: int, frame: object) -> None:
        if self.received is not None:
            with contextlib.suppress(Exception):
                if sys.stdout.isatty():
                    os.write(1, b"\x1b[?25h\n")  # the status line had hidden the cursor
            os._exit(128 + number)
        self.received = number


class Pending:
    """A function being compiled."""

    def __init__(self, name: str, traced: Any):
        self.name = name
        self._traced = traced
        self._done = threading.Event()
        self._compiled: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Compiles; called by the background thread."""
        try:
            self._compiled = self._traced.lower().compile()
        except BaseException as error:
            self._error = error
        finally:
            self._traced = None
            return_freed_memory()  # compiling takes gigabytes, and a run may last for days
            self._done.set()

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return self._done.is_set()

    def result(self, signals: Signals) -> Any:
        """The compiled function, as soon as it is there.

        Raises:
          Interrupted: a signal came first.
        """
        while not self._done.wait(0.1):
            signals.check()
        if self._error is not None:
            raise self._error
        return self._compiled


def compile_in_background(functions: Mapping[str, Any]) -> dict[str, Pending]:
    """Compiles traced functions one after the other in a thread, so that the main thread answers signals."""
    pending = {name: Pending(name, traced) for name, traced in functions.items()}

    def work() -> None:
        for each in list(pending.values()):
            each.run()

    # Not a daemon: an interpreter that ends under a compilation aborts. The program leaves by `exit_with`.
    threading.Thread(target=work, name="compile").start()
    return pending


def trace(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """`function` traced for arguments of these shapes; `out_info` of the result has the shapes it returns."""
    return jax.jit(function, donate_argnums=donate).trace(*args)


class Stopwatch:
    """Seconds a run has taken, over all its processes."""

    def __init__(self, before: float = 0.0):
        self._before = before
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Until now."""
        return self._before + time.monotonic() - self._started
