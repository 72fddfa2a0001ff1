"""Intervals of 95 % for scores, differences and ratios: a bootstrap over rows, with the spread over seeds on top.

A draw takes as many rows of a split as there are, with replacement, and the same ones for all models that were scored on
them, so that comparisons are paired (Efron and Tibshirani 1993; Koehn 2004, "Statistical significance tests for machine
translation evaluation"). Two to five seeds are too few to be drawn. They are a random effect: their variance, less the
part of it that rows explain, is added with a t distribution (Satterthwaite 1946), also where nothing is left to add.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from distilkit.metrics import score
from distilkit.records import Array, Rows

DRAWS = 2000
_SIDES = (0.025, 0.975)
_FEW = 200  # draws for metrics that are no function of sums over rows; they are repeated
_CHUNK = 50  # draws at once: 16 MB for 40,000 rows
_MAX_CELLS = 100  # of a confusion matrix, for Matthews


class Interval(NamedTuple):
    """A range that holds the truth in 95 of 100 samples of rows and seeds."""

    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of its width."""
        return (self.high - self.low) / 2

    def holds(self, value: float) -> bool:
        """Return whether a value lies in it."""
        return self.low <= value <= self.high


def ends(range_: Interval | None) -> dict[str, float]:
    """Return the ends of an interval by name, if there is one."""
    return range_._asdict() if range_ else {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A score with its draws over rows (``DRAWS``,), and the standard error that the choice of seeds adds.

    ``spread`` is the whole standard error over seeds, of which draws hold a part. ``seeds`` is 0 where nothing depends on
    a seed. ``rows`` names the rows: samples of the same rows are paired.
    """

    score: float
    draws: Array
    rows: tuple[int, ...]
    seeds: int = 0
    error: float = 0.0
    spread: float = 0.0


def rows_id(rows: Rows) -> int:
    """Return a number that is equal for rows with the same ids and gold."""
    parts = [np.ascontiguousarray(part) for part in (rows.ids, rows.gold) if part is not None]
    return zlib.crc32("".join(f"{part.dtype.kind}{part.tolist()}" for part in parts).encode())


def sample(shown: float, scores: Sequence[float], draws: Array, *, rows: tuple[int, ...], seeded: bool) -> Sample:
    """Combine the scores of seeds (seeds,) and their draws (seeds, ``DRAWS``) around the shown median."""
    seeds = len(scores)
    centred = shown + draws.mean(axis=0) - np.mean(scores)
    if not seeded or seeds < 2:
        return Sample(score=shown, draws=centred, rows=rows, seeds=int(seeded))
    between, drawn = float(np.var(scores, ddof=1)), float(draws.var(axis=0, ddof=1).mean())
    # Drawing rows adds their part to the variance between seeds once more, and the mean of draws holds it already. A
    # median varies more than a mean.
    whole = between * math.pi / (2 * seeds + math.pi - 2)
    error = math.sqrt(max(0.0, whole - max(0.0, drawn - between) / seeds))
    return Sample(score=shown, draws=centred, rows=rows, seeds=seeds, error=error, spread=math.sqrt(whole))


def interval(statistic: Callable[..., Any], *samples: Sample) -> Interval:
    """Return the interval of a function of scores, such as a difference; it takes numbers or arrays."""
    shown = [each.score for each in samples]
    point, draws = statistic(*shown), statistic(*(each.draws for each in samples))
    seeded = [(place, each) for place, each in enumerate(samples) if each.spread]

    def moved(place: int, by: float) -> float:
        return float(statistic(*shown[:place], shown[place] + by, *shown[place + 1 :]) - point)

    low, high = np.quantile(draws, _SIDES)
    if degrees := sum(moved(place, each.spread) ** 4 / (each.seeds - 1) for place, each in seeded):
        variance = sum(moved(place, each.error) ** 2 for place, each in seeded)
        noise = special.ndtri((np.arange(draws.size) + 0.5) / draws.size)
        low, high = np.quantile(draws + math.sqrt(variance) * np.random.default_rng(0).permutation(noise), _SIDES)
        freedom = max((variance + float(np.var(draws))) ** 2 / degrees, min(each.seeds for _, each in seeded) - 1)
        wider = special.stdtrit(freedom, _SIDES[1]) / special.ndtri(_SIDES[1])
        low, high = point + wider * (low - point), point + wider * (high - point)
    return Interval(float(low), float(high))


def resample(models: Sequence[tuple[Rows, str]]) -> Array:
    """Score the rows of several models by a metric each on the same draws of rows: (models, ``DRAWS``).

    All rows have the same ids in the same order. Draws are a function of the ids and the gold.
    """
    first, parts = models[0][0], [_parts(metric, rows) for rows, metric in models]
    size, ends = len(first), np.cumsum([0, *(columns.shape[1] for columns, _ in parts)])
    matrix = np.concatenate([columns for columns, _ in parts], axis=1)
    rng, found = np.random.default_rng(rows_id(first)), np.empty((len(models), DRAWS))
    for start in range(0, DRAWS, _CHUNK):
        picked = rng.integers(size, size=(_CHUNK, size))
        flat = (picked + size * np.arange(_CHUNK)[:, None]).ravel()
        weights = np.bincount(flat, minlength=_CHUNK * size).reshape(_CHUNK, size).astype(float)
        sums = weights @ matrix
        for place, ((rows, metric), (_, finish)) in enumerate(zip(models, parts, strict=True)):
            into = found[place, start : start + _CHUNK]
            if metric == "spearman":
                into[:] = _spearman(rows, weights)
            elif finish is not None:
                into[:] = finish(sums[:, ends[place] : ends[place + 1]])
            elif start < _FEW:
                into[:] = [score(metric, rows.take(index)) for index in picked]
            else:
                into[:] = found[place, start % _FEW : start % _FEW + _CHUNK]
    return found


def _parts(metric: str, rows: Rows) -> tuple[Array, Callable[[Array], Array] | None]:
    """Return columns (rows, parts) and the metric as a function of their sums (draws, parts), if there is one."""
    size, gold, said = len(rows), rows.gold, rows.said
    if metric in rows.sums and "tp" not in rows.sums:
        return rows.sums[metric][:, None], lambda sums: sums[:, 0] / size
    if rows.sums:
        names = list(rows.sums)

        def of_totals(sums: Array) -> Array:
            totals = (dict(zip(names, np.split(each, len(names)), strict=True)) for each in sums)
            return np.array([score(metric, Rows(ids=rows.ids[:1], sums=each)) for each in totals])

        return np.stack([rows.sums[name] for name in names], axis=1), of_totals
    if gold is not None and said is not None:
        if metric == "accuracy":
            return (gold == said).astype(float)[:, None], lambda sums: sums[:, 0] / size
        if metric == "f1":
            columns = [(gold == 1) & (said == 1), said == 1, gold == 1]
            return np.stack(columns, axis=1).astype(float), lambda sums: _ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])
        if metric == "pearson":
            x, y = gold - gold.mean(), said - said.mean()
            return np.stack([x, y, x * x, y * y, x * y], axis=1), lambda sums: _correlation(sums / size)
        cells, which = np.unique(np.stack([gold, said]), axis=1, return_inverse=True)
        if metric == "matthews" and cells.shape[1] <= _MAX_CELLS:
            columns = which.ravel()[:, None] == np.arange(cells.shape[1])
            return columns.astype(float), lambda sums: _matthews(sums, *cells)
    return np.empty((size, 0)), None


def _ratio(part: Array, whole: Array) -> Array:
    """Divide, with 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


def _correlation(means: Array) -> Array:
    """Return Pearson's correlation from the means of x, y, their squares and their product."""
    x, y, xx, yy, xy = means.T
    return _ratio(xy - x * y, np.sqrt(np.clip(xx - x * x, 0, None) * np.clip(yy - y * y, 0, None)))


def _matthews(sums: Array, gold: Array, said: Array) -> Array:
    """Return the correlation of Matthews from the cells of a confusion matrix: (draws, cells)."""
    size, right = sums.sum(axis=1), sums[:, gold == said].sum(axis=1)
    classes = np.union1d(gold, said)
    true, told = (sums @ (side[:, None] == classes) for side in (gold, said))
    free = [size**2 - (side**2).sum(axis=1) for side in (true, told)]
    return _ratio(right * size - (true * told).sum(axis=1), np.sqrt(free[0] * free[1]))


def _spearman(rows: Rows, weights: Array) -> Array:
    """Correlate the ranks that gold and said have within each draw."""
    size, centred = weights.shape[1], []
    for values in (rows.gold, rows.said):
        _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        order, starts = np.argsort(group, kind="stable"), np.cumsum(counts) - counts
        heights = np.add.reduceat(weights[:, order], starts, axis=1)
        ranks = np.cumsum(heights, axis=1) - (heights - 1) / 2  # the mean rank of equal values
        centred.append((ranks - (size + 1) / 2)[:, group])
    x, y = centred
    return _ratio((weights * x * y).sum(axis=1), np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1)))
