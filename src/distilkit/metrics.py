"""Metrics of the rows of a split by name, in float64. Evaluation and the report score with the same code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from distilkit.errors import UserError

if TYPE_CHECKING:
    from distilkit.records import Array, Rows


def _nll(rows: Rows) -> float:
    return float(rows.sums["nll"].sum() / rows.sums["tokens"].sum())


def exp(nats: float) -> float:
    """Return a perplexity; a text without spaces has words whose perplexity exceeds the largest float."""
    return math.exp(min(nats, 700.0))


_OF_SUMS: dict[str, Callable[[Rows], float]] = {
    "perplexity": lambda rows: exp(_nll(rows)),
    "pseudo_perplexity": lambda rows: exp(_nll(rows)),
    "word_perplexity": lambda rows: exp(_nll(rows) * float(rows.sums["text_tokens"].sum() / rows.sums["words"].sum())),
    "masked_accuracy": lambda rows: float(rows.sums["masked_correct"].sum() / rows.sums["masked_tokens"].sum()),
    "masked_cross_entropy": lambda rows: float(rows.sums["masked_nll"].sum() / rows.sums["masked_tokens"].sum()),
    "entity_f1": lambda rows: _ratio(2 * rows.sums["tp"].sum(), rows.sums["said"].sum() + rows.sums["gold"].sum()),
}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def score(metric: str, rows: Rows) -> float:
    """Score rows by the metric of that name.

    A metric of ``rows.sums`` is a formula of their sums over rows, or the mean of the sums of its name. The others
    compare ``gold`` with ``said``.
    """
    if metric in _OF_SUMS and rows.sums:
        return _OF_SUMS[metric](rows)
    if metric in rows.sums:
        return float(rows.sums[metric].mean())
    if rows.gold is None or rows.said is None:
        raise UserError(f"metric {metric!r} cannot be taken from rows with sums of {', '.join(rows.sums) or 'nothing'}")
    return _of_predictions(metric, rows.gold, rows.said)


def _of_predictions(metric: str, gold: Array, said: Array) -> float:
    from scipy import stats
    from sklearn import metrics

    if metric == "accuracy":
        return float(np.mean(gold == said))
    if metric == "f1":
        return float(metrics.f1_score(gold, said, zero_division=0.0))
    if not (np.ptp(gold) and np.ptp(said)):
        return 0.0
    if metric == "matthews":
        return float(metrics.matthews_corrcoef(gold, said))
    return float(getattr(stats, f"{metric}r")(gold, said).statistic)


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
    student, teacher = (_log_softmax(each.logits) for each in (mine, theirs))
    return float((np.exp(teacher) * (teacher - student)).sum(axis=1).mean())


def _log_softmax(logits: Array) -> Array:
    from scipy.special import log_softmax

    return np.asarray(log_softmax(logits.astype(np.float64), axis=1))


def _of_the_same_rows(mine: Rows, theirs: Rows) -> bool:
    if (mine.gold is None) != (theirs.gold is None) or not np.array_equal(mine.ids, theirs.ids):
        return False
    return mine.gold is None or theirs.gold is None or np.array_equal(mine.gold, theirs.gold)
