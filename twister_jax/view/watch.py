"""`python -m twister_jax watch`: full games as videos, the best, the middle and the worst among several."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twister_jax import envs
from twister_jax.training.progress import Progress
from twister_jax.view import drawing
from twister_jax.view.drawing import Picture
from twister_jax.view.games import Frame, Game, Games, Played
from twister_jax.view.policy import Policy

HEIGHT = 420
"""Of the pictures in a video, about."""
RATE = 15
"""Frames per second: real time where a step is four frames of sixty in a second."""
SLOW = 4
"""The same for games that would otherwise be over in an instant."""
SHORT = 60
"""Steps up to which a game is shown slowly."""
SHEET = 8
"""Pictures of a game on the contact sheet."""
REWARD = 0.05
"""From which on a reward is marked; those of a dream are never quite 0."""
TITLES = ("game", "what the agent sees")


def watch(
    policy: Policy,
    directory: Path,
    episodes: int,
    make_env: Any = envs.make_vector_env,
    stem: str = "watch",
    titles: Sequence[str] = TITLES,
) -> list[Path]:
    """Plays games and writes videos of some, and a contact sheet.

    Args:
      policy: who plays.
      directory: where the files go.
      episodes: games played.
      make_env: as `envs.make_vector_env`.
      stem: that the files' names begin with.
      titles: over the pictures of a frame; one alone leaves out what the agent sees.

    Returns:
      The files written, the contact sheet last.

    Raises:
      UserError: the environments fail, something is not installed, or a file cannot be written.
    """
    drawing.require_video()
    progress = Progress()
    try:
        games = Games(policy, episodes, make_env, progress)
    finally:
        progress.close()
    scores = [game.episode.score for game in games.ranked()]
    best, median, worst = map(drawing.number, (scores[0], float(np.median(scores)), scores[-1]))
    progress.say(f"{len(scores)} games: best {best}, median {median}, worst {worst}")
    files, rows = [], []
    for name, game in chosen(games.ranked()).items():
        shown = np.unique(np.linspace(0, game.stop - game.first - 1, SHEET).round().astype(int))
        kept: list[Picture] = []

        def frames(game: Game = game, shown: Any = shown, kept: list[Picture] = kept) -> Iterator[Picture]:
            played = games.played(game)
            for time, frame in enumerate(games.show(game)):
                if time in shown:
                    kept.append(drawing.enlarge(frame.screen, HEIGHT // 3))
                yield draw(policy, frame, time, played, titles)

        path = directory / f"{stem}-{name}.mp4"
        count = drawing.save_video(path, frames(), SLOW if game.episode.length <= SHORT else RATE)
        score = drawing.number(game.episode.score)
        progress.say(f"{name}: score {score}, {count:,} frames → {path}")
        files.append(path)
        title = f"{name}: score {score} after {game.episode.length:,} steps"
        rows += [drawing.heading(title), drawing.beside(kept, [f"step {time:,}" for time in shown])]
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


def draw(
    policy: Policy, frame: Frame, time: int, played: Sequence[Played], titles: Sequence[str] = TITLES
) -> Picture:
    """A frame of a video: the pictures, what happened, and the critic's values until now.

    Args:
      policy: who plays.
      frame: the step.
      time: its number in the game.
      played: all steps of the game; those with a reward are marked below the values.
      titles: of the pictures.
    """
    pictures = [drawing.enlarge(drawing.as_rgb(each), HEIGHT) for each in (frame.screen, frame.image)]
    action = "—" if frame.action is None else policy.action_name(frame.action)
    value = "" if frame.value is None else f"   value {frame.value:z.2f}"
    lines = [
        f"step {time:,}   action {action}",
        f"reward {frame.reward:+z.2f}   score {drawing.number(frame.score)}{value}",
    ]
    shown = drawing.beside(pictures[: len(titles)], titles, lines)
    values = [step.value for step in played if step.value is not None]
    if len(values) < len(played):  # of an agent without a world model to look into
        return shown
    rewarded = [index for index, step in enumerate(played) if abs(step.reward) >= REWARD]
    return drawing.stack([shown, drawing.trace("value", values, rewarded, time, shown.shape[1])])
