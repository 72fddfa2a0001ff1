"""Metrics by name, against scikit-learn and scipy, and where they are not defined."""

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge

from distilkit.errors import UserError
from distilkit.metrics import check_metrics, measure, score
from distilkit.records import Rows


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rows(gold: Any, said: Any, logits: Any = None) -> Rows:
    return Rows(ids=np.arange(len(gold)), gold=np.asarray(gold), said=np.asarray(said), logits=logits)


PAIRS = [  # of a row's class and what was said of it, in every case but for their order
    case
    for count in range(1, 5)
    for case in itertools.combinations_with_replacement(itertools.product((0, 1), repeat=2), count)
]


def test_metrics_of_two_classes_are_scikit_learns_in_every_case_of_up_to_four_rows() -> None:
    for case in PAIRS:
        gold, said = zip(*case, strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {
                "accuracy": sklearn.metrics.accuracy_score(gold, said),
                "f1": sklearn.metrics.f1_score(gold, said, zero_division=0.0),
                "matthews": sklearn.metrics.matthews_corrcoef(gold, said),
            }
        assert measure(list(expected), rows(gold, said)) == expected


@pytest.mark.parametrize(("count", "positive"), [(1043, 721), (1000, 990), (100, 95), (20, 19)])
def test_a_classifier_that_says_one_class_has_a_matthews_of_zero(count: int, positive: int) -> None:
    gold = np.arange(count) < positive
    for said in (0, 1):
        assert score("matthews", rows(gold.astype(int), np.full(count, said))) == 0


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_correlation_is_zero_with_a_constant_and_nan_with_a_prediction_that_is_not_finite(metric: str) -> None:
    gold, said = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert score(metric, rows(gold, said)) == getattr(stats, f"{metric}r")(gold, said).statistic
    for pair in ((gold, np.full(4, 0.1)), (np.full(4, 0.1), said), (gold[:1], said[:1])):
        assert score(metric, rows(*pair)) == 0
    for bad in (math.nan, math.inf):
        assert math.isnan(score(metric, rows(gold, np.array([1.0, bad, 2.0, 4.0]))))
    assert 0.99 < score(metric, rows(gold, 1e9 + 1e-3 * gold)) <= 1
    assert math.isnan(score(metric, rows(gold[:0], said[:0])))


@pytest.mark.parametrize(
    ("metric", "num_classes"),
    [
        *((name, 2) for name in ("roc_auc", "average_precision", "neg_log_loss", "precision", "neg_brier_score")),
        *((name, 3) for name in ("roc_auc_ovr", "roc_auc_ovo_weighted", "f1_weighted", "recall_macro")),
        *((name, classes) for name in ("f1_macro", "f1_micro", "balanced_accuracy") for classes in (2, 3)),
        *(
            (name, None)
            for name in ("r2", "neg_root_mean_squared_error", "neg_mean_absolute_error", "explained_variance")
        ),
    ],
)
def test_a_metric_of_scikit_learn_is_what_its_scorer_gives_a_trained_model(
    metric: str, num_classes: int | None
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 2))
    value = x[:, 0] + rng.normal(size=80)
    gold = value if num_classes is None else np.digitize(value, [-0.5, 0.5][: num_classes - 1])
    model = (Ridge() if num_classes is None else LogisticRegression()).fit(x, gold)
    expected = sklearn.metrics.get_scorer(metric)(model, x, gold)
    logits = None if num_classes is None else model.predict_log_proba(x)
    assert score(metric, rows(gold, model.predict(x), logits)) == pytest.approx(expected, rel=1e-12)
    check_metrics([metric], num_classes=num_classes)


def test_scores_without_a_scorer_are_functions_of_what_was_said() -> None:
    gold, said = [0, 1, 2, 2, 1, 0], [0, 1, 1, 2, 1, 2]
    expected = sklearn.metrics.cohen_kappa_score(gold, said)
    for name in ("cohen_kappa", "cohen_kappa_score"):
        check_metrics([name], num_classes=3)
        assert score(name, rows(gold, said)) == expected


def test_what_is_not_defined_is_nan() -> None:
    logits = np.zeros((3, 2), dtype=np.float16)
    assert math.isnan(score("roc_auc", rows([1, 1, 1], [0, 0, 0], logits)))
    assert math.isnan(score("neg_log_loss", rows([1, 1, 1], [0, 0, 0], logits)))


def test_sums_over_rows_are_means_perplexities_and_the_f1_of_entities() -> None:
    sums = {"exact_match": [1, 0, 1], "f1": [1, 0.5, 1], "nll": [2, 4, 6], "tokens": [1, 2, 3]}
    some = Rows(ids=np.arange(3), sums={name: np.array(part, dtype=np.float64) for name, part in sums.items()})
    assert measure(["exact_match", "f1"], some) == {"exact_match": 2 / 3, "f1": 2.5 / 3}
    assert score("perplexity", some) == math.exp(2)
    assert score("f1", some.take(np.array([1, 1]))) == 0.5
    sums = {"tp": [1, 0], "said": [2, 1], "gold": [1, 4]}
    entities = Rows(ids=np.arange(2), sums={name: np.array(part, dtype=np.float64) for name, part in sums.items()})
    assert measure(["f1", "precision", "recall"], entities) == {"f1": 2 / 8, "precision": 1 / 3, "recall": 1 / 5}
    with pytest.raises(UserError, match="'accuracy' cannot be taken from rows with sums of tp, said, gold"):
        score("accuracy", entities)
    with pytest.raises(UserError, match="'bleu' cannot be taken from these rows"):
        score("bleu", rows([0, 1], [0, 1]))


@pytest.mark.parametrize(
    ("name", "num_classes", "message"),
    [
        ("f1_marco", 2, "'f1_marco' is no metric; near it are f1_macro"),
        ("mean_squared_error", None, "near it are .*neg_mean_squared_error"),
        ("balanced_acuracy", 2, "near it are balanced_accuracy"),
        ("precision", 3, "precision cannot be taken from 3 classes: Target is multiclass but average='binary'"),
        ("neg_log_loss", None, "neg_log_loss cannot be taken from numbers"),
        ("silhouette", 2, "silhouette cannot be taken from 2 classes"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_with_names_near_it(
    name: str, num_classes: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_metrics([name], num_classes=num_classes)
