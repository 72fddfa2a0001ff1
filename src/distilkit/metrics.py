"""Metrics of the rows of a split by name, in float64. Evaluation and the report score with the same code."""

from __future__ import annotations

import difflib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from distilkit.errors import UserError
from distilkit.records import Array, Rows

OF_NUMBERS = ("pearson", "spearman")
_FEWEST = 8  # blocks that give an interval
_SAME_TEXT = 0.9  # of the blocks of two runs; other numbers of ranks leave out some
OWN = ("accuracy", "f1", "matthews", *OF_NUMBERS)


def _per(sums: dict[str, float], part: str, whole: str) -> float:
    return sums[part] / sums[whole] if sums[whole] else math.nan


def _perplexity(sums: dict[str, float], *, tokens_per_word: float = 1.0) -> float:
    """Return the exponent of the mean; a text without spaces has words whose perplexity exceeds the largest float."""
    return math.exp(min(_per(sums, "nll", "tokens") * tokens_per_word, 700.0))


_OF_SUMS: dict[str, Callable[[dict[str, float]], float]] = {  # of all rows
    "perplexity": _perplexity,
    "pseudo_perplexity": _perplexity,
    # Of the scored text: adjacent windows leave out their first tokens.
    "word_perplexity": lambda sums: _perplexity(sums, tokens_per_word=sums["text_tokens"] / max(1.0, sums["words"])),
    "masked_accuracy": lambda sums: _per(sums, "masked_correct", "masked_tokens"),
    "masked_cross_entropy": lambda sums: _per(sums, "masked_nll", "masked_tokens"),
}
_OF_ENTITIES: dict[str, Callable[[dict[str, float]], float]] = {  # sums tp, said and gold; 0 where nothing is said
    "f1": lambda sums: 2 * sums["tp"] / max(1.0, sums["said"] + sums["gold"]),
    "precision": lambda sums: sums["tp"] / max(1.0, sums["said"]),
    "recall": lambda sums: sums["tp"] / max(1.0, sums["gold"]),
}


def measure(metrics: Sequence[str], rows: Rows) -> dict[str, float]:
    """Score rows by several metrics."""
    return {metric: score(metric, rows) for metric in metrics}


def score(metric: str, rows: Rows) -> float:
    """Score rows by the metric of that name; NaN where it is not defined.

    With ``rows.sums`` it is a formula of their totals, such as a perplexity or the F1 of entities, or the mean of the
    sums of that name. Otherwise it compares ``gold`` with ``said``, or with the probabilities of ``logits`` where
    scikit-learn's metric takes them. A correlation with something constant is 0, as is the Matthews coefficient of a
    model that says one class.
    """
    if not len(rows):
        return math.nan
    formulas = _OF_ENTITIES if "tp" in rows.sums else _OF_SUMS
    if rows.sums and metric in formulas:
        return formulas[metric]({name: math.fsum(part) for name, part in rows.sums.items()})
    if metric in rows.sums:
        return math.fsum(rows.sums[metric]) / len(rows)
    measured = None if metric in OWN else _scikit_learn(metric)
    if rows.gold is None or rows.said is None or (metric not in OWN and measured is None):
        held = f"rows with sums of {', '.join(rows.sums)}" if rows.sums else "these rows"
        raise UserError(f"metric {metric!r} cannot be taken from {held}")
    if not all(np.isfinite(part).all() for part in (rows.gold, rows.said)):
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn and scipy, where a metric is not defined
        try:
            return _own(metric, rows.gold, rows.said) if measured is None else float(measured(rows))
        except ValueError:  # such as the area under a curve where there is only one class
            return math.nan


def _own(metric: str, gold: Array, said: Array) -> float:
    if metric == "accuracy":
        return float(np.mean(gold == said))
    if metric == "f1":  # of class 1, as in GLUE
        return 2 * float(np.sum((gold == 1) & (said == 1))) / max(1.0, float(np.sum(gold == 1) + np.sum(said == 1)))
    if not (np.ptp(gold) and np.ptp(said)):
        return 0.0
    if metric == "matthews":
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(gold, said))
    from scipy import stats

    return float(np.nan_to_num({"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric](gold, said).statistic))


@functools.cache
def _scikit_learn(metric: str) -> Callable[[Rows], Any] | None:
    """Return a scorer of scikit-learn, or a function as cohen_kappa_score, as a function of rows; None for no metric."""
    import sklearn.metrics

    if metric in sklearn.metrics.get_scorer_names():
        scorer = sklearn.metrics.get_scorer(metric)
        return lambda rows: scorer(_estimator()(rows), np.arange(len(rows)), rows.gold)
    function = getattr(sklearn.metrics, f"{metric.removesuffix('_score')}_score", None)
    return None if function is None else lambda rows: function(rows.gold, rows.said)


@functools.cache
def _estimator() -> Any:
    """Return a class whose objects predict for row numbers what rows say, as scorers ask it of a trained model."""
    from scipy.special import softmax
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Said(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
        def __init__(self, rows: Any = None) -> None:
            self.rows, self.classes_ = rows, np.arange(2 if rows.logits is None else rows.logits.shape[1])

        def predict(self, index: Array) -> Any:
            return self.rows.said[index]

        def predict_proba(self, index: Array) -> Any:
            return softmax(self.rows.logits[index].astype(np.float64), axis=1)

    return Said


def check_metrics(metrics: Sequence[str], *, num_classes: int | None) -> None:
    """Make sure that metrics have known names, and can be taken from so many classes, or from numbers for None."""
    from sklearn.metrics import get_scorer_names

    for metric in metrics:
        if metric not in OWN and _scikit_learn(metric) is None:
            near = difflib.get_close_matches(metric, [*OWN, *get_scorer_names()], n=5, cutoff=0.5)
            raise UserError(
                f"task.metrics={list(metrics)}, but {metric!r} is no metric"
                + (f"; near it are {', '.join(near)}" if near else "")
                + f". It takes {', '.join(OWN)} and scikit-learn's, such as f1_macro"
            )
    trial = _trial(num_classes)
    for metric in set(metrics) - set(OWN):
        measured: Any = _scikit_learn(metric)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reason = "" if math.isfinite(float(measured(trial))) else "it is not defined"
        except (ValueError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0]
        if reason:
            what = "numbers (task.labels=null)" if num_classes is None else f"{num_classes} classes"
            raise UserError(f"task.metrics={list(metrics)}, but {metric} cannot be taken from {what}: {reason}")


def _trial(num_classes: int | None) -> Rows:
    """Return rows on which every metric of their kind is defined."""
    if num_classes is None:
        gold = np.arange(1.0, 9.0)
        return Rows(ids=np.arange(8), gold=gold, said=gold + 0.25)
    gold = np.tile(np.arange(num_classes), 3)
    logits = np.random.default_rng(0).normal(size=(len(gold), num_classes)).astype(np.float16)
    return Rows(ids=np.arange(len(gold)), gold=gold, said=np.roll(gold, 1) * (gold > 0), logits=logits)


def agreement(mine: Rows, theirs: Rows) -> float | None:
    """Return the share of rows for which two models say the same class; None for other rows or numbers."""
    if not _of_the_same_rows(mine, theirs) or mine.said is None or theirs.said is None:
        return None
    if "f" in (mine.said.dtype.kind, theirs.said.dtype.kind):
        return None
    return float(np.mean(mine.said == theirs.said))


def kl(mine: Rows, theirs: Rows) -> float | None:
    """Return the mean KL divergence in nats from their classes to mine; None for other rows, or where there are none.

    ``theirs`` are a teacher's. Logits are read as float64, at temperature 1.
    """
    if not _of_the_same_rows(mine, theirs) or mine.logits is None or theirs.logits is None:
        return None
    if mine.logits.shape != theirs.logits.shape or mine.logits.shape[1] < 2:
        return None
    student, teacher = (_log_softmax(logits) for logits in (mine.logits, theirs.logits))
    return float((np.exp(teacher) * (teacher - student)).sum(axis=1).mean())


def _log_softmax(logits: Array) -> Array:
    from scipy.special import log_softmax

    return np.asarray(log_softmax(logits.astype(np.float64), axis=1))


def _of_the_same_rows(mine: Rows, theirs: Rows) -> bool:
    if (mine.gold is None) != (theirs.gold is None) or not np.array_equal(mine.ids, theirs.ids):
        return False
    return mine.gold is None or theirs.gold is None or np.array_equal(mine.gold, theirs.gold)


def ratio_of_sums(values: Array, sizes: Array) -> tuple[float, float | None]:
    """Return the ratio of two sums over blocks (blocks,), and half of its 95 % interval by linearisation."""
    quotient, count = float(values.sum() / sizes.sum()), len(values)
    if count < _FEWEST:
        return quotient, None
    error = np.sqrt(np.square(values - quotient * sizes).sum() * count / (count - 1)) / abs(sizes.sum())
    return quotient, float(special.stdtrit(count - 1, 0.975) * error)


def nats_below(other: Rows | None, rows: Rows) -> tuple[float, float | None] | None:
    """Return by how many nats a token ``rows`` are below ``other``, and half of the interval; None for other blocks."""
    if other is None:
        return None
    _, one, two = np.intersect1d(other.ids, rows.ids, return_indices=True)
    first, second = other.take(one).sums, rows.take(two).sums
    if len(one) < _SAME_TEXT * max(len(other), len(rows)) or not np.isfinite(first["nll"]).all():
        return None
    return ratio_of_sums(first["nll"] - second["nll"], second["tokens"])
