"""`python -m experiments.tethered REGISTER COMMAND …`: twister_jax's command line, tied to who started it.

The parent holds the other end of the standard input. When the parent is gone, however it ended, reading gives
nothing more, and the run is asked to save and stop: nothing goes on training that nobody waits for.
"""

import os
import signal
import sys
import threading


def _stop_when_alone() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    from experiments.suite import register
    from twister_jax import cli

    register(sys.argv.pop(1))
    cli.run()
