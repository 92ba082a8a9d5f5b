"""Many processes that train one run: how they find one another, agree, and end when one of them is gone.

JAX's own runtime (`jax.distributed`) connects the devices. What the host loops of the processes must agree
on goes through its key-value store, and not through the devices, which are busy with the update.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from twister_jax.config import ParallelConfig
from twister_jax.errors import UserError

HEARTBEAT_SECONDS = 20
"""Seconds of silence after which a process counts as gone."""
START_SECONDS = 45
_WORKER = "TWISTER_JAX_SUPERVISED"
_PEER_GONE = 76
_CONNECTED = b"twister_jax: connected\n"


@dataclasses.dataclass
class Processes:
    """Which process of a run it is. With one process nothing is exchanged."""

    index: int = 0
    count: int = 1
    _rounds: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the files and prints, on behalf of all."""
        return self.index == 0

    def exchange(self, payload: Any) -> list[Any]:
        """What every process gave, in their order; all of them must call it in the same places."""
        if self.count == 1:
            return [payload]
        from jax._src.distributed import global_state  # as Orbax does: JAX has no public name for it

        store, self._rounds = global_state.client, self._rounds + 1
        assert store is not None
        key = f"twister_jax/{self._rounds}"
        store.key_value_set(f"{key}/{self.index}", json.dumps(payload))
        wait = 1000 * 3600 * 24  # one that is gone ends this process long before
        given = [json.loads(store.blocking_key_value_get(f"{key}/{i}", wait)) for i in range(self.count)]
        # Whoever has given to this round has read the one before.
        with contextlib.suppress(Exception):
            store.key_value_delete(f"twister_jax/{self._rounds - 1}/{self.index}")
        return given

    def of_first(self, payload: Any = None) -> Any:
        """What the first process gave."""
        return self.exchange(payload if self.first else None)[0]

    def share(self, count: int) -> slice:
        """The part of `count` things, environments say, that is this process's."""
        each = count // self.count
        return slice(self.index * each, (self.index + 1) * each)


ALONE = Processes()


def wanted(config: ParallelConfig) -> int:
    """How many processes this one belongs to, as its flags or its surroundings say.

    Raises:
      UserError: flags that contradict one another.
    """
    if config.coordinator or config.processes > 1 or config.process:
        if not config.coordinator or config.processes == 1:
            raise UserError(
                "parallel.coordinator, parallel.processes and parallel.process belong together: name all"
            )
        if not re.fullmatch(r"\S+:\d{1,5}", config.coordinator):
            raise UserError(f"parallel.coordinator = {config.coordinator}: must be HOST:PORT")
        if config.process >= config.processes:
            raise UserError(
                f"parallel.process = {config.process}: must be below parallel.processes = {config.processes}"
            )
        return config.processes
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if (value := os.environ.get(name, "")).isdigit():
            return int(value)
    return len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) or 1


def connect(config: ParallelConfig) -> Processes:
    """Connects to the other processes; call before JAX is used.

    Raises:
      UserError: the coordinator does not answer, or others do not come.
    """
    if wanted(config) == 1:
        return Processes()
    import jax

    _end_with_parent()
    try:
        named = bool(config.coordinator)
        jax.distributed.initialize(
            config.coordinator or None,
            config.processes if named else None,
            config.process if named else None,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=START_SECONDS,
        )
    except Exception as error:
        raise UserError(f"{_no_answer(config)} ({' '.join(str(error).split())[:80]})") from None
    os.write(2, _CONNECTED)
    # Programs that run beside one another may come in another order elsewhere, and a CPU's collectives would
    # then wait for one another.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return Processes(jax.process_index(), jax.process_count())


def _no_answer(config: ParallelConfig) -> str:
    return (
        f"{config.coordinator or 'the coordinator'} does not answer, or not all processes came within "
        f"{START_SECONDS} s: start all of them, process 0 on that host"
    )


# ------------------------------------------------------------------- ending when another one is gone


def supervised() -> bool:
    """Whether this process has a parent that watches it; see `supervise`."""
    return os.environ.pop(_WORKER, None) is not None


def supervise(config: ParallelConfig) -> int:
    """Runs this command in a child and says in one line what became of it.

    JAX aborts a process whose peers are gone, with a page of addresses; no exception can be caught. So the
    work is done in a child process, whose last words are left out where it was aborted.

    Returns:
      The exit code: the child's, or 76 where another process was gone.
    """
    command, env = [sys.executable, *sys.orig_argv[1:]], os.environ | {_WORKER: "1"}
    child = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: child.send_signal(number))
    connected = threading.Event()
    reader = threading.Thread(target=_pass_on, args=(child.stderr, connected), daemon=True)
    reader.start()
    code = child.wait()
    reader.join(timeout=5)
    if code >= 0:
        return code
    if code not in (-signal.SIGABRT, -signal.SIGSEGV):
        return 128 - code
    gone = (
        "another process of this run is gone; the same command, in all of them, goes on from where it saved"
    )
    print(f"twister_jax: {gone if connected.is_set() else _no_answer(config)}", file=sys.stderr)
    return _PEER_GONE


_PEER_LOST = re.compile(
    r"gloo|nccl.*(remote|network)|connection (reset|closed|refused)|heartbeat|coordination service", re.I
)
"""What JAX's errors say where the other side of a collective, or the coordinator, is gone."""


@contextlib.contextmanager
def ending_with_others(processes: Processes) -> Iterator[None]:
    """Aborts this process, as JAX itself does, where an error says that another one is gone.

    Which of the two happens is a matter of who looks first: the loop at a number that never came, or JAX at
    its coordinator. An ordinary exit would wait for the others.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if processes.count > 1 and _PEER_LOST.search(str(error)):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stdout.flush()
            os.abort()
        raise


_NOISE = re.compile(
    rb"[WEF]\d{4} |\*\*\* |PC: @|\s+@\s+0x|Fatal Python error|(Current t|T)hread 0x|  File \"|  \.\.\.|"
    rb"Extension modules|\s*$|\d+$|Aborted|terminate called|  what\(\)|\[Gloo\]|INTERNAL: |Barrier result|"
    rb"This suggests that|The tasks? ha|RPC: /|Additional GRPC|:UNKNOWN:"
)
"""Lines of JAX's about other processes, and the last words of a process that it aborts."""


def _pass_on(stream: Any, connected: threading.Event) -> None:
    """What a child says on its standard error stream, without JAX's log of other processes."""
    for line in stream:
        if line == _CONNECTED:
            connected.set()
        elif not _NOISE.match(line):
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.buffer.write(line)
                sys.stderr.flush()


def _end_with_parent() -> None:
    """A child whose parent was killed ends too (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
