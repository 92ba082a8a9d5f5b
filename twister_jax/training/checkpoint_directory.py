"""The directory of a run's checkpoints: what lies in it, and what is cleared away. See `checkpoint`."""

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from twister_jax import files
from twister_jax.errors import UserError
from twister_jax.files import UnusableError
from twister_jax.replay import segments
from twister_jax.training import manifest as manifests
from twister_jax.training.manifest import CHECKPOINT_NAME, order

_TEMPORARY_NAME = re.compile(r"tmp-(\d{9,}|delete)-[0-9a-f]{8}", re.ASCII)
_UNUSABLE_NAME = re.compile(r"unusable-\d{9,}-\d+-[0-9a-f]{8}", re.ASCII)
_UNUSABLE_KEPT = 2

_log = logging.getLogger(__name__)


class CheckpointDirectory:
    """Finds checkpoints and deletes what is ours and no longer needed; `keep` of them stay.

    Where `shown` is given, `directory` leads through a descriptor, and messages call it `shown`.
    """

    def __init__(self, directory: Path, keep: int, shown: Path | None = None) -> None:
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.replay = self.directory / "replay"
        self._shown = shown or self.directory

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, usable or not, oldest first."""
        return sorted({step for step, _ in map(order, self.checkpoints())})

    def _paths(self, name: re.Pattern[str]) -> list[Path]:
        """What has such a name; nothing where the directory is missing."""
        for path in (self.directory, self.replay)[self.directory != self._shown :]:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                files.check_directory(path)
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if name.fullmatch(path.name)]

    def checkpoints(self) -> list[Path]:
        """Directories of complete checkpoints, oldest first."""
        return sorted(self._paths(CHECKPOINT_NAME), key=order)

    def refuse_if_any(self, unusable: Sequence[Path]) -> None:
        """Raises `UserError` if starting from scratch would hide unusable checkpoints."""
        if unusable:
            raise UserError(
                f"none of the {len(unusable)} checkpoints in {self.directory} is usable (reasons above): "
                "put back a sound copy, or name another LOGDIR to start anew"
            )
        known = re.compile(r"replay|(tmp|unusable)-.*|\..*")
        foreign = sorted(
            p.name for p in self._paths(re.compile(".*", re.DOTALL)) if not known.fullmatch(p.name)
        )
        if foreign and not self.checkpoints():
            raise UserError(
                f"{self.directory} holds {foreign[0]!r}, which is not a checkpoint of this program: "
                "name another LOGDIR, or move it away"
            )

    # Deleting. `shutil.rmtree` neither follows links nor deletes through them.

    def remove_temporaries(self) -> None:
        for path in self._paths(_TEMPORARY_NAME):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # what a save that failed left: see save.py

    def delete_superseded(self, newest: Path) -> None:
        """Deletes what is not among the newest `keep`; failing at it is no failure to save."""
        try:
            older = [path for path in self.checkpoints() if path != newest]
            for path in older[: max(0, len(older) - self.keep + 1)]:
                self._delete(path)
        except OSError as error:
            _log.warning("cannot delete an old checkpoint in %s: %s", self._shown, error.strerror)
            return
        self.delete_unneeded_segments()

    def _delete(self, path: Path) -> None:
        """Deletes a checkpoint: invisible first, so that no half of one is ever found."""
        hidden = path.with_name(f"tmp-delete-{secrets.token_hex(4)}")
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def set_aside(self, paths: Sequence[Path]) -> None:
        """Moves unusable checkpoints out of the way of those that the resumed run will write."""
        try:
            for path in paths:
                os.rename(path, path.with_name(f"unusable-{path.name}-{secrets.token_hex(4)}"))
            aside = sorted(self._paths(_UNUSABLE_NAME), key=lambda path: path.lstat().st_mtime)
            for path in aside[: max(0, len(aside) - _UNUSABLE_KEPT)]:
                self._delete(path)
        except OSError as error:
            _log.warning("cannot move an unusable checkpoint in %s away: %s", self._shown, error.strerror)

    def delete_unneeded_segments(self) -> None:
        """Deletes the segments that no checkpoint lists; none while one cannot be asked."""
        try:
            needed = {s.name for path in self.checkpoints() for s in manifests.read(path).segments}
            there = segments.on_disk(self.replay)
        except (UnusableError, UserError, OSError):
            return
        segments.delete(self.replay, there - needed)
