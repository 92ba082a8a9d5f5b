"""Policies as one file: arrays and a few words about them in safetensors, and nothing that could be run."""

import dataclasses
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax import files, foreign_json, presets
from twister_jax.agents.base import State, acting_part
from twister_jax.config import Config
from twister_jax.envs.base import EnvSpec
from twister_jax.errors import UserError
from twister_jax.files import UnsafePathError, UnusableError, printable
from twister_jax.training import state_files
from twister_jax.training.load import spec_of
from twister_jax.view import tensors
from twister_jax.view.drawing import save

KEY = "twister_jax"
"""Of the one entry of the file's metadata, a JSON object."""
FORMAT = 1


def write(path: Path, state: State, about: Mapping[str, Any]) -> None:
    """Writes what acting and dreaming need of a state; `about` must have `config` and `spec`.

    Raises:
      UserError: the file cannot be written.
    """
    fetched = state_files.fetch(acting_part(state))
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in fetched.items()}
    metadata = {KEY: json.dumps({"format": FORMAT, **about})}
    save(path, tensors.dump(arrays, metadata))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Arrays by name, and what `write` said about them; None of a file that it did not write.

    Raises:
      UserError: the file is neither .safetensors nor .npz, or is damaged.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise UserError(f"{path} is no policy: expected a run directory, a .safetensors or an .npz file")
    try:
        if path.suffix == ".npz":
            return files.read_archive(path), None
        with files.open_named(path) as file:
            # Mapped and not read: nothing is in memory before its size is known to be right.
            empty = os.fstat(file.fileno()).st_size == 0
            data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays, metadata = tensors.parse(data)
    except UnsafePathError:
        raise
    except UnusableError as error:
        raise UserError(f"{path} cannot be read as .npz: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    if KEY not in metadata:
        return arrays, None
    try:
        about = foreign_json.parse(metadata[KEY])
        found = about["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not say what it holds: it is damaged") from None
    if found != FORMAT:
        shown = printable(str(found))
        raise UserError(f"{path} has format {shown}; this version reads {FORMAT}: update twister_jax")
    return arrays, about


def settings(path: Path, about: Mapping[str, Any]) -> tuple[Config, EnvSpec]:
    """The configuration and the environment's specification that a file was written with.

    Raises:
      UserError: they are missing, of another version, or cannot work.
    """
    config = presets.from_dict(about.get("config"), str(path))
    try:
        presets.validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return dataclasses.replace(config, logdir=""), spec_of(about.get("spec"), path)


def fill(path: Path, like: State, arrays: Mapping[str, np.ndarray]) -> State:
    """A state with these arrays; `like` has its shapes.

    Raises:
      UserError: the arrays are those of another agent or model size, or not finite.
    """
    part = acting_part(like)
    state_files.compare(path, state_files.describe(arrays), part)
    check_finite(path, arrays)
    leaves = [jnp.asarray(arrays[name]) for name in state_files.named_leaves(part)]
    return jax.tree.unflatten(jax.tree.structure(part), leaves)


def check_finite(path: Path, arrays: Mapping[str, Any]) -> None:
    """Raises `UserError` naming the first array with infinities or with what is no number at all."""
    for name, array in arrays.items():
        if not np.isfinite(np.asarray(array)).all():
            raise UserError(
                f"{path}: {printable(name)} has numbers that are not finite: nothing can be played with it"
            )
