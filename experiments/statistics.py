"""Scores over games and seeds: aggregates, stratified bootstrap intervals, comparisons, performance profiles.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(arXiv:2108.13264). Scores of a game are one array [seed]; games may have different numbers of seeds. All
functions are pure, and a seed decides every random draw.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 5_000
"""Bootstrap resamples behind an interval."""
_BLOCK = 2_000_000  # resampled scores held at once

Scores = Sequence[Float[np.ndarray, "*batch seed"]]
"""One array per game; the batch is one axis of resamples, or none."""


class Estimate(NamedTuple):
    """A number with its interval; `low` and `high` are None where there is nothing to resample."""

    value: float
    low: float | None
    high: float | None


def interquartile_mean(scores: Float[np.ndarray, "*batch run"]) -> Float[np.ndarray, "*batch"]:
    """Mean of the middle half: a quarter of the runs, rounded down, is left out at either end."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, -1)[..., cut : scores.shape[-1] - cut].mean(-1)


def aggregates(scores: Scores) -> dict[str, Float[np.ndarray, "*batch"]]:
    """Mean and median over games of the seeds' mean; IQM and optimality gap over all runs together.

    Args:
      scores: normalised, so that 1 is the reference to reach.
    """
    games = np.stack([game.mean(-1) for game in scores], -1)
    runs = np.concatenate(scores, -1)
    return {
        "mean": games.mean(-1),
        "median": np.median(games, -1),
        "iqm": interquartile_mean(runs),
        "optimality_gap": (1 - np.minimum(runs, 1)).mean(-1),
    }


def probability_of_improvement(ours: Scores, theirs: Scores) -> Float[np.ndarray, "*batch"]:
    """How likely a run of ours beats a run of theirs on a game drawn at random; a tie counts half.

    Both have the same games in the same order.
    """
    wins = [
        ((mine[..., :, None] > other[..., None, :]) + 0.5 * (mine[..., :, None] == other[..., None, :])).mean(
            (-2, -1)
        )
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return np.mean(wins, 0)


def resample(scores: Scores, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Seeds drawn with replacement within each game: one array [count, seed] per game."""
    return [game[generator.integers(len(game), size=(count, len(game)))] for game in scores]


def _blocks(runs: int, resamples: int) -> Iterator[int]:
    """Resamples in portions that fit into memory."""
    most = max(1, _BLOCK // runs)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


def estimates(
    statistic: Callable[..., dict[str, np.ndarray]],
    *sets: Scores,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """Each value of `statistic(*sets)` with its percentile interval of the stratified bootstrap.

    Args:
      statistic: takes sets of scores with any leading axes, and gives named values with these axes.
      *sets: what it takes; each is resampled on its own.
      resamples: how often.
      seed: decides the resamples.
      confidence: share of the resamples that the interval holds.
    """
    point = {name: float(value) for name, value in statistic(*sets).items()}
    if all(len(game) < 2 for scores in sets for game in scores):
        return {name: Estimate(value, None, None) for name, value in point.items()}
    generator = np.random.default_rng(seed)
    runs = sum(len(game) for scores in sets for game in scores)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in point}
    for count in _blocks(runs, resamples):
        for name, values in statistic(*(resample(scores, count, generator) for scores in sets)).items():
            drawn[name].append(values)
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    found = {name: np.percentile(np.concatenate(values), tails) for name, values in drawn.items()}
    return {name: Estimate(point[name], float(low), float(high)) for name, (low, high) in found.items()}


class Profile(NamedTuple):
    """Share of the runs above each threshold, with pointwise intervals; all [threshold]."""

    thresholds: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def performance_profile(
    scores: Scores, thresholds: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Profile:
    """How large a share of all runs scores above each threshold.

    At one threshold, the resampled runs of a game that lie above it are binomially many, so they are drawn as
    such: the bootstrap's own distribution without the resampling.
    """
    above = np.array([(game[:, None] > thresholds).sum(0) for game in scores])  # [game, threshold]
    seeds = np.array([len(game) for game in scores])[:, None]
    generator = np.random.default_rng(seed)
    drawn = np.zeros((resamples, len(thresholds)))
    for game, count in zip(above, seeds[:, 0], strict=True):
        drawn += generator.binomial(count, game / count, size=drawn.shape)
    low, high = np.percentile(drawn / seeds.sum(), [2.5, 97.5], axis=0)
    return Profile(thresholds, above.sum(0) / seeds.sum(), low, high)
