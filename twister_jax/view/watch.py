"""`python -m twister_jax watch`: full games as videos, the best, the middle and the worst among several."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twister_jax import envs
from twister_jax.training.progress import Progress
from twister_jax.view import drawing
from twister_jax.view.drawing import Picture
from twister_jax.view.games import Frame, Game, Games
from twister_jax.view.policy import Policy

HEIGHT = 420
"""Of the pictures in a video, about."""
RATE = 15
"""Frames per second: real time where a step is four frames of sixty in a second."""
SLOW = 4
"""The same for games that would otherwise be over in the twinkling of an eye."""
SHORT = 60
"""Steps up to which a game is shown slowly."""
SHEET = 8
"""Pictures of a game on the contact sheet."""
GAP = 6
"""Pixels between them."""


def watch(
    policy: Policy,
    directory: Path,
    episodes: int,
    make_env: Any = envs.make_vector_env,
    stem: str = "watch",
) -> list[Path]:
    """Plays games and writes videos of some, and a contact sheet.

    Args:
      policy: who plays.
      directory: where the files go.
      episodes: games played.
      make_env: as `envs.make_vector_env`.
      stem: that the files' names begin with.

    Returns:
      The files written, the contact sheet last.

    Raises:
      UserError: the environments fail, something is not installed, or a file cannot be written.
    """
    progress = Progress()
    try:
        games = Games(policy, episodes, make_env, progress)
    finally:
        progress.close()
    scores = [game.episode.score for game in games.ranked()]
    progress.say(
        f"{len(scores)} games: best {scores[0]:g}, median {np.median(scores):g}, worst {scores[-1]:g}"
    )
    files, rows = [], []
    for name, game in chosen(games.ranked()).items():
        shown = [0, *np.linspace(0, game.stop - game.first - 1, SHEET).round().astype(int)[1:]]
        kept: list[Picture] = []

        def frames(game: Game = game, shown: Any = shown, kept: list[Picture] = kept) -> Iterator[Picture]:
            for time, frame in enumerate(games.show(game)):
                if time in shown:
                    kept.append(drawing.enlarge(frame.screen, HEIGHT // 3))
                yield draw(policy, frame)

        path = directory / f"{stem}-{name}.mp4"
        count = drawing.save_video(path, frames(), SLOW if game.episode.length <= SHORT else RATE)
        progress.say(f"{name}: score {game.episode.score:g}, {count:,} frames → {path}")
        files.append(path)
        title = f"{name}: score {game.episode.score:g} after {game.episode.length:,} steps"
        gaps = [np.pad(picture, ((0, 0), (0, GAP), (0, 0))) for picture in kept]
        rows.append(drawing.beside([np.concatenate(gaps, axis=1)], [title]))
    files.append(directory / f"{stem}-sheet.png")
    drawing.save_png(files[-1], drawing.stack(rows))
    progress.say(f"contact sheet → {files[-1]}")
    return files


def chosen(ranked: list[Game]) -> dict[str, Game]:
    """The best, the middle and the worst of games, the best first; fewer where there are fewer."""
    places = {"best": 0, "worst": len(ranked) - 1, "median": (len(ranked) - 1) // 2}
    taken: dict[int, str] = {}
    for name, place in places.items():
        taken.setdefault(place, name)
    return {name: ranked[place] for place, name in sorted(taken.items())}


def draw(policy: Policy, frame: Frame) -> Picture:
    """A frame of a video."""
    screen, seen = drawing.enlarge(frame.screen, HEIGHT), drawing.as_rgb(frame.image)
    action = "" if frame.action is None else policy.action_name(frame.action)
    value = "" if frame.value is None else f"value {frame.value:8.2f}"
    lines = [f"action {action}", f"reward {frame.reward:+.2f}   score {frame.score:g}   {value}"]
    return drawing.beside([screen, drawing.enlarge(seen, HEIGHT)], ["game", "what the agent sees"], lines)
