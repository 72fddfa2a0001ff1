"""Intervals: draws score as the metrics do, and in 200 simulated samples 95 % of the intervals hold the truth."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import special

from distilkit import metrics
from distilkit.records import Rows
from distilkit.report import intervals
from distilkit.report.intervals import DRAWS, Sample, interval, resample, sample


def predictions(size: int, *, seed: int, classes: int = 2) -> Rows:
    rng = np.random.default_rng(seed)
    gold = rng.integers(classes, size=size)
    said = np.where(rng.random(size) < 0.7, gold, rng.integers(classes, size=size))
    return Rows(ids=np.arange(size), gold=gold, said=said)


def numbers(size: int, *, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 11, size=size) / 2  # with ties, as STS-B has
    return Rows(ids=np.arange(size), gold=gold, said=np.round(gold + rng.normal(size=size), 1))


def summed(size: int) -> Rows:
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 9, size=size).astype(float)
    return Rows(ids=np.arange(size), sums={"nll": rng.random(size), "tokens": tokens, "exact_match": rng.random(size)})


def entities(size: int) -> Rows:
    counts = np.random.default_rng(6).integers(0, 3, size=(3, size)).astype(float)
    return Rows(ids=np.arange(size), sums=dict(zip(("tp", "said", "gold"), counts.cumsum(axis=0), strict=True)))


@pytest.mark.parametrize(
    ("metric", "rows"),
    [
        *((name, predictions(60, seed=1)) for name in ("accuracy", "f1", "matthews")),
        ("matthews", predictions(60, seed=1, classes=4)),
        *((name, numbers(60, seed=2)) for name in ("pearson", "spearman")),
        *((name, summed(60)) for name in ("perplexity", "exact_match")),
        ("f1", entities(60)),
    ],
)
def test_a_draw_scores_as_the_metric_does_on_the_drawn_rows(metric: str, rows: Rows) -> None:
    (found,) = resample([(rows, metric)])
    rng = np.random.default_rng(intervals.rows_id(rows))
    picked = rng.integers(60, size=(50, 60))
    assert found.shape == (DRAWS,)
    assert found[:50] == pytest.approx([metrics.score(metric, rows.take(index)) for index in picked], abs=1e-9)


def test_a_metric_that_is_no_sum_over_rows_is_taken_on_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(metric: str, rows: Rows) -> float:
        calls.append(metric)
        assert rows.said is not None
        return float(np.std(rows.said))

    calls: list[str] = []
    monkeypatch.setattr(intervals, "score", spread)
    (found,) = resample([(numbers(60, seed=2), "spread")])
    assert len(calls) == 200
    assert len(set(found)) == 200
    assert np.array_equal(found[:200], found[-200:])


def test_rows_that_all_get_one_class_score_zero_in_each_draw() -> None:
    rows = Rows(ids=np.arange(20), gold=np.array([1] * 15 + [0] * 5), said=np.ones(20, int))
    assert not resample([(rows, "matthews")]).any()
    flat = Rows(ids=np.arange(20), gold=np.arange(20.0), said=np.ones(20))
    assert not resample([(flat, "pearson"), (flat, "spearman")]).any()


def test_models_on_the_same_rows_are_paired_and_draws_are_the_same_again() -> None:
    one, other = predictions(100, seed=1), predictions(100, seed=1)
    first, second = resample([(one, "accuracy"), (other, "accuracy")])
    assert np.array_equal(first, second)
    assert np.array_equal(first, resample([(other, "accuracy")])[0])
    moved = Rows(ids=one.ids + 1, gold=one.gold, said=one.said)
    assert intervals.rows_id(moved) != intervals.rows_id(one)
    assert not np.array_equal(first, resample([(moved, "accuracy")])[0])


def shares(rng: np.random.Generator, size: int, seeds: int, spread: float) -> tuple[list[list[Rows]], list[float]]:
    """Classes said by a teacher and a student, and their true accuracies: rows have a difficulty, seeds a skill."""
    skill = np.array([1.2, 0.8])
    latent = skill[:, None, None] + rng.normal(size=size) + 0.7 * rng.normal(size=(2, 1, size))
    latent = latent + spread * rng.normal(size=(2, seeds, 1)) + 0.5 * rng.normal(size=(2, seeds, size))
    gold = rng.integers(2, size=size)
    said = np.where(latent > 0, gold, 1 - gold)
    true = special.ndtr(skill / math.sqrt(1 + 0.49 + spread**2 + 0.25))
    return [[Rows(ids=np.arange(size), gold=gold, said=each) for each in own] for own in said], list(true)


def f1s(rng: np.random.Generator, size: int, seeds: int, spread: float) -> tuple[list[list[Rows]], list[float]]:
    """The same with the F1 of balanced classes that are mistaken alike: it is the accuracy."""
    return shares(rng, size, seeds, spread)


def correlations(
    rng: np.random.Generator, size: int, seeds: int, spread: float
) -> tuple[list[list[Rows]], list[float]]:
    """Numbers said with noise of the row, of the model and of the seed; the gain of a seed varies."""
    gold, noise = rng.normal(size=size), np.array([0.4, 0.6])
    shared = 0.3 * rng.normal(size=size) + noise[:, None, None] * rng.normal(size=(2, 1, size))
    gains = 1 + spread * rng.normal(size=(2, seeds, 1))
    said = gains * gold + shared + 0.3 * rng.normal(size=(2, seeds, size))
    many = 1 + spread * np.random.default_rng(0).normal(size=(20_000, 1))
    true = (many / np.sqrt(many**2 + 0.18 + noise**2)).mean(axis=0)
    return [[Rows(ids=np.arange(size), gold=gold, said=each) for each in own] for own in said], list(true)


def sampled(runs: list[Rows], metric: str) -> Sample:
    scores = [metrics.score(metric, rows) for rows in runs]
    draws = resample([(rows, metric) for rows in runs])
    return sample(float(np.median(scores)), scores, draws, rows=(0,), seeded=True)


@pytest.mark.parametrize(
    ("make", "metric", "seeds", "spread"),
    [
        (shares, "accuracy", 3, 0.0),
        (shares, "accuracy", 3, 0.1),
        (shares, "accuracy", 5, 0.1),
        (f1s, "f1", 3, 0.1),
        (correlations, "pearson", 3, 0.1),
        (correlations, "pearson", 5, 0.1),
    ],
)
def test_in_200_samples_95_of_100_intervals_hold_the_truth(
    make: Callable[..., Any], metric: str, seeds: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 500)
    held = {"difference": 0, "share": 0}
    for trial in range(200):
        models, (teacher, student) = make(np.random.default_rng(trial), 1000, seeds, spread)
        both = [sampled(runs, metric) for runs in models]
        held["difference"] += interval(lambda a, b: b - a, *both).holds(student - teacher)
        held["share"] += interval(lambda a, b: 100 * b / a, *both).holds(100 * student / teacher)
    print(held)
    assert all(0.92 <= number / 200 <= 0.98 for number in held.values()), held


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])  # of seeds, in that of rows
def test_two_halves_of_the_seeds_of_one_model_rarely_differ(seeds: int, spread: float) -> None:
    rng, differ = np.random.default_rng(5), 0
    for _ in range(300):
        scores = 0.8 + 0.01 * (spread * rng.normal(size=(2, seeds)) + rng.normal(size=(2, seeds)))
        draws = scores[:, :, None] + 0.01 * rng.normal(size=(2, seeds, 500))
        both = [
            sample(float(np.median(own)), list(own), drawn, rows=(0,), seeded=True)
            for own, drawn in zip(scores, draws, strict=True)
        ]
        differ += not interval(lambda a, b: b - a, *both).holds(0)
    assert differ <= 18  # 6 %


def test_equal_models_whose_seeds_differ_by_chance_have_a_narrow_difference() -> None:
    scores = [0.6, 0.7]
    draws = np.array(scores)[:, None] + 0.1 * np.random.default_rng(0).normal(size=(2, 500))  # rows explain the seeds
    both = [sample(0.65, scores, draws + tiny, rows=(0,), seeded=True) for tiny in (0, 1e-16)]
    low, high = interval(lambda a, b: b - a, *both)
    assert -0.7 < low <= 0 <= high < 0.7
