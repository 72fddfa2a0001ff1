"""The published figures, and the comparison with them."""

import dataclasses

import pytest

from benchmarks.published import TASKS, compare
from distilkit.report.published import MODELS
from scores import scored


def test_medians_stand_beside_table_1_and_a_miss_is_a_miss() -> None:
    published = next(model.figures for model in MODELS if model.name == "DistilBERT")
    seeds = {"rte": [0.5, 0.59, 0.61, 0.2, 0.7], "mrpc": [0.8, 0.82, 0.95, 0.9, 0.3], "sst2": [0.95] * 5, "cola": [0.1]}
    rows = compare(scored(**seeds), published, tolerance=2.0)
    assert [(task, round(ours, 6), paper, fits) for task, ours, paper, fits in rows] == [
        ("rte", pytest.approx(59.0), 59.9, True),
        ("mrpc", pytest.approx(82.0), 87.5, False),
        ("sst2", pytest.approx(95.0), 91.3, True),
    ]
    assert set(TASKS) <= set(published)


def test_a_task_that_lacks_a_seed_is_missed_whatever_other_models_scored() -> None:
    published = next(model.figures for model in MODELS if model.name == "DistilBERT")
    found = scored(rte=[0.9] * 4, mrpc=[0.9] * 5)
    found += [dataclasses.replace(found[0], seed=5, model="another")]
    fits = {task: fits for task, *_, fits in compare(found, published, tolerance=2.0)}
    assert fits == {"rte": False, "mrpc": True, "sst2": False}


def test_of_two_scores_of_a_seed_the_later_counts() -> None:
    published = next(model.figures for model in MODELS if model.name == "DistilBERT")
    old = [dataclasses.replace(each, cost={"date": "2026-11-20"}) for each in scored(rte=[0.9] * 5)]
    new = [dataclasses.replace(each, cost={"date": "2026-11-21"}) for each in scored(rte=[0.3] * 5)]
    assert compare(new + old, published, tolerance=2.0)[0][1] == pytest.approx(30.0)
