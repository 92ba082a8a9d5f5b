"""Where an evaluation stands, on disk: a signal costs no game, and the same command goes on exactly there.

    evaluation.partial      a line of JSON, then the bytes of the arrays, one after the other

The file is used only for the very evaluation that it is of: same parameters, settings and seed. It may come
from a stranger, so types and ranges are checked, and one that does not fit is as good as none.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twister_jax import files, foreign_json
from twister_jax.envs.base import Episode, VectorEnv
from twister_jax.errors import UserError
from twister_jax.training.lock import LostError
from twister_jax.training.state import tree_bytes

_MOST_BYTES = 1 << 32
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


@dataclasses.dataclass
class Standing:
    """An evaluation between two steps.

    Attributes:
      count: steps taken.
      played: finished games of each environment.
      env: `VectorEnv.get_state()`.
      acting: (carry, observation) of the agent.
    """

    count: int
    played: list[list[Episode]]
    env: bytes
    acting: Any


def fingerprint(settings: Mapping[str, Any], state: Any) -> str:
    """Identifies an evaluation by everything that its games depend on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


class KeptGames:
    """The games that an earlier call finished, which this one need not play again.

    Args:
      directory: of the run.
      of: the evaluation's fingerprint.
      minutes: between two writes of the file when no signal comes.
      say: prints a line.
      check_held: raises `LostError` where the directory is not the run's any more.
    """

    def __init__(
        self,
        directory: Path,
        of: str,
        minutes: float,
        say: Callable[[str], None],
        check_held: Callable[[], None],
    ):
        self.path = directory / "evaluation.partial"
        self._of, self._seconds, self._say, self._check_held = of, 60 * minutes, say, check_held
        self._kept_at = time.monotonic()

    def find(self, env: VectorEnv, games: list[int], like: Any) -> Standing | None:
        """Where the evaluation stood, and `env` set to it; None where it has to begin.

        Args:
          env: the environments.
          games: that each of them is to play.
          like: (carry, observation) of the same shapes.

        Raises:
          UserError: the environments' state in the file is not of these environments.
        """
        standing = self._read(games, like)
        if standing is None:
            return None
        try:
            restarted = env.set_state(standing.env)
        except ValueError as error:
            raise UserError(
                f"{self.path} holds games of other environments ({files.one_line(error)}): move it away, and "
                "all games are played"
            ) from None
        unfinished = ", the unfinished ones from their start" if restarted else ""
        self._say(f"going on after {sum(map(len, standing.played))} of {sum(games)} games{unfinished}")
        return standing

    def due(self) -> bool:
        """Whether it is time to write the file, so that a kill costs little."""
        return time.monotonic() - self._kept_at > self._seconds

    def keep(self, standing: Standing) -> None:
        """Writes where the evaluation stands; the scores that cannot be written are printed."""
        self._kept_at = time.monotonic()
        data = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(standing.acting))
        header = {
            "of": self._of,
            "count": standing.count,
            "played": [[list(map(_plain, episode)) for episode in mine] for mine in standing.played],
            "env": standing.env.decode(),
            "crc32": zlib.crc32(data),
        }
        try:
            self._check_held()
            files.write_atomically(self.path, json.dumps(header).encode() + b"\n" + data)
        except (OSError, LostError) as error:
            scores = [float(episode.score) for mine in standing.played for episode in mine]
            self._say(f"the games so far cannot be kept ({error}); their scores: {scores}")

    def forget(self) -> None:
        """The evaluation is over: deletes the file if it is of this one."""
        with contextlib.suppress(*_UNREADABLE):
            if self._load()[0]["of"] == self._of:
                self.path.unlink()

    def _load(self) -> tuple[Any, bytes]:
        header, _, data = files.read(self.path, _MOST_BYTES).partition(b"\n")
        return foreign_json.parse(header), data

    def _read(self, games: list[int], like: Any) -> Standing | None:
        try:
            stored, data = self._load()
            if stored["of"] != self._of or stored["crc32"] != zlib.crc32(data):
                return None
            played = [[_episode(values, env) for values in mine] for env, mine in enumerate(stored["played"])]
            count, env = int(stored["count"]), stored["env"].encode()
            fits = [len(mine) <= most for mine, most in zip(played, games, strict=True)]
        except _UNREADABLE:
            return None
        if not all(fits) or not 0 <= count < 2**31 or len(data) != tree_bytes(like):
            return None
        leaves, at = [], 0
        for leaf in jax.tree.leaves(like):
            array = np.frombuffer(data, leaf.dtype, math.prod(leaf.shape), at)
            leaves.append(jnp.array(array.reshape(leaf.shape)))
            at += array.nbytes
        return Standing(count, played, env, jax.tree.unflatten(jax.tree.structure(like), leaves))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _episode(values: Any, env: int) -> Episode:
    index, score, length, truncated = values
    if index != env or not math.isfinite(score):
        raise ValueError(values)
    return Episode(env, float(score), int(length), bool(truncated))
