"""The state of an agent on disk: its leaves by name, written and read by Orbax."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from twister_jax.errors import UserError
from twister_jax.files import UnusableError, one_line


def _not_of_orbax(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not ("never retrieved" in text and "tensorstore" in text)


# Orbax raises one of its errors and forgets the others, of which Python then logs a page each.
logging.getLogger("asyncio").addFilter(_not_of_orbax)


def fetch(state: Any) -> dict[str, np.ndarray]:
    """The leaves of a state on the host, by name."""
    for leaf in jax.tree.leaves(state):
        leaf.copy_to_host_async()
    return {name: host_copy(leaf) for name, leaf in named_leaves(state).items()}


def host_copy(x: jax.Array) -> np.ndarray:
    """A copy that outlives the array's donation: on the CPU NumPy would look at its very memory."""
    return np.array(x, copy=True) if next(iter(x.devices())).platform == "cpu" else np.asarray(x)


def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Type and shape ("float32[2,3]") of leaves, by name."""
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in leaves.items()}


def compare(path: Path, stored: Mapping[str, str], like: Any) -> None:
    """Raises `UserError` naming the first leaf in which the state stored in `path` and `like` differ."""
    here = describe(named_leaves(like))
    for name in (*here, *stored):
        if here.get(name) != stored.get(name):
            raise UserError(
                f"{path} holds another agent or model size: {name} is {stored.get(name, 'absent')} there "
                f"and {here.get(name, 'absent')} here; use the settings it was trained with, or name another "
                "LOGDIR"
            )


def write(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes what `fetch` gave; `path` must not be there yet.

    Raises:
      OSError: it could not be written. Threads of Orbax may then still be writing.
    """
    # Orbax refuses arrays without elements; their type and shape say all about them.
    tree = {name: leaf for name, leaf in state.items() if leaf.size}
    needed, free = sum(leaf.nbytes for leaf in tree.values()), shutil.disk_usage(path.parent).free
    if needed > free:  # found out now, and not after half of it was written
        text = f"{os.strerror(errno.ENOSPC)} ({needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free)"
        raise OSError(errno.ENOSPC, text, str(path.parent))
    try:
        with _orbax() as orbax:
            orbax.save(path, args=ocp.args.PyTreeSave(tree))
    except OSError:
        raise
    except Exception as error:  # Orbax says of a full disk: ValueError
        known = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)
        code = next((code for code in known if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, f"{os.strerror(code)} ({one_line(error)})") from error


def read(path: Path, like: Any) -> Any:
    """The state, on the default device; its files must have been checked.

    Raises:
      UnusableError: it cannot be read, or holds other arrays than `like`.
    """
    leaves = named_leaves(like)
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored}
    try:
        with _orbax() as orbax:
            # They may be too large to be read, whatever the manifest says.
            if describe(orbax.metadata(path).item_metadata.tree) != describe(stored):
                raise UnusableError("it holds other arrays than it should")
            arrays = orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        # One by one, so that the host copy of each goes before the next comes. They are not committed to a
        # device, like those of an undisturbed run: a resumed run compiles to the same program.
        restored = [
            jnp.array(arrays.pop(name)) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)
            for name, leaf in leaves.items()
        ]
    except Exception as error:  # whatever Orbax and its parts raise
        raise UnusableError(f"state cannot be read: {one_line(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(like), restored)


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Orbax, without the page of tracebacks that it logs for an error that it raises anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # Floats hardly compress; trying costs more than the disk does.
        here = jax.process_index()  # or Orbax would wait for the other processes of the run
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as orbax:
            yield orbax
    finally:
        logger.setLevel(level)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return named
