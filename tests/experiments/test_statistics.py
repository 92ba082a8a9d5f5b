"""Aggregates and intervals against closed forms, and against what others have published."""

import json
import statistics as standard

import numpy as np
import pytest

from experiments import aggregate, scores
from experiments.statistics import (
    aggregates,
    estimates,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)

WITH_SEEDS = [name for name in scores.published_names() if scores.published(name).per_seed]


@pytest.mark.parametrize("name", WITH_SEEDS)
def test_published_scores_give_the_published_aggregates_and_intervals_hold_them(name):
    expected = json.loads(scores.PUBLISHED.read_text())["sets"][name]["aggregates"]
    found = aggregate.aggregates(scores.published(name))
    assert {key: round(found[key].value, 3) for key in found} == expected
    for estimate in found.values():
        assert estimate.low < estimate.value < estimate.high


def test_known_numbers():
    two_games = [np.array([0.0, 0.2, 0.4]), np.array([1.0, 2.0, 3.0])]
    found = {name: float(value) for name, value in aggregates(two_games).items()}
    assert found["mean"] == pytest.approx(1.1)
    assert found["median"] == pytest.approx(1.1)
    assert found["iqm"] == pytest.approx((0.2 + 0.4 + 1.0 + 2.0) / 4)  # of six, one is cut at either end
    assert found["optimality_gap"] == pytest.approx((1.0 + 0.8 + 0.6) / 6)
    assert interquartile_mean(np.array([5.0])) == 5.0


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    """The bootstrap variance of the mean over games is Σ var_g / n_g / G²."""
    generator = np.random.default_rng(0)
    games = [generator.normal(size=40) for _ in range(10)]
    found = estimates(lambda games: {"mean": aggregates(games)["mean"]}, games)["mean"]
    half = 1.959964 * np.sqrt(sum(game.var() / len(game) for game in games)) / len(games)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    assert (found.high + found.low) / 2 == pytest.approx(found.value, abs=0.05 * half)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        games = [generator.normal(size=10) for _ in range(10)]
        found = estimates(aggregates, games, resamples=200, seed=trial)["mean"]
        held += found.low <= 0 <= found.high
    assert 170 <= held <= 198  # 95% of 200, less what ten seeds make an interval too narrow


def test_the_seed_decides_the_interval():
    games = scores.published("twm").normalized()
    assert estimates(aggregates, games, seed=3) == estimates(aggregates, games, seed=3)
    assert estimates(aggregates, games, seed=3) != estimates(aggregates, games, seed=4)


def test_games_may_have_different_numbers_of_seeds():
    games = [np.array([1.0]), np.array([0.0, 1.0]), np.array([2.0, 2.0, 2.0])]
    found = estimates(aggregates, games)
    assert found["mean"].value == pytest.approx((1 + 0.5 + 2) / 3)
    assert found["mean"].low == pytest.approx((1 + 0 + 2) / 3)
    assert found["mean"].high == pytest.approx((1 + 1 + 2) / 3)


def test_single_scores_have_no_interval():
    found = estimates(aggregates, [np.array([1.0]), np.array([3.0])])
    assert found["mean"] == (2.0, None, None)


def test_probability_of_improvement_is_that_of_mann_whitney():
    ours, theirs = [np.array([3.0, 1.0])], [np.array([2.0, 1.0, 0.0])]
    # 3 beats all three; 1 loses to 2, ties with 1, beats 0.
    assert probability_of_improvement(ours, theirs) == pytest.approx((3 + 0 + 0.5 + 1) / 6)
    assert probability_of_improvement(theirs, ours) == pytest.approx(1 - 4.5 / 6)


def test_a_profile_counts_runs_above_and_its_interval_is_the_bootstraps():
    generator = np.random.default_rng(0)
    games = [generator.normal(size=8) for _ in range(6)]
    found = performance_profile(games, np.array([-9.0, 0.0, 9.0]), resamples=20_000)
    assert found.value[0] == 1
    assert found.value[2] == 0
    share = standard.fmean((game > 0).mean() for game in games)
    assert found.value[1] == pytest.approx(share)
    resampled = estimates(
        lambda games: {"": (np.concatenate(games, -1) > 0).mean(-1)}, games, resamples=20_000, seed=1
    )[""]
    assert (found.low[1], found.high[1]) == pytest.approx((resampled.low, resampled.high), abs=0.0211)
