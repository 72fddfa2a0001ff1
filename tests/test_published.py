"""The published figures, and the comparison with them."""

import dataclasses
from typing import Any

import pytest

from benchmarks.published import MODEL, TASKS, compare
from distilkit.published import MODELS
from distilkit.results import Result

RESULT = Result(
    name="distilbert-base-uncased",
    model=MODEL,
    sha256="x",
    model_type="distilbert",
    parameters=1,
    parameters_without_embeddings=1,
    task="rte",
    kind="finetuned",
    seed=1,
    settings={},
    scores={},
    score=0.6,
)


def results(**scores: list[float]) -> list[Any]:
    return [
        dataclasses.replace(RESULT, task=task, seed=seed, score=score)
        for task, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_medians_stand_beside_table_1_and_a_miss_is_a_miss() -> None:
    published = next(model.figures for model in MODELS if model.name == "DistilBERT")
    rows = compare(results(rte=[0.5, 0.59, 0.61], mrpc=[0.80, 0.82, 0.95], sst2=[0.95]), published, tolerance=2.0)
    assert [(task, round(ours, 6), paper, fits) for task, ours, paper, fits in rows] == [
        ("rte", pytest.approx(59.0), 59.9, True),
        ("mrpc", pytest.approx(82.0), 87.5, False),
        ("sst2", pytest.approx(95.0), 91.3, True),
    ]
    assert set(TASKS) <= set(published)
