"""The published figures, their tables, and the comparison with them."""

import dataclasses
import statistics
from typing import Any

import pytest

from benchmarks.published import TASKS, compare
from distilkit.report import published
from distilkit.report.published import MODELS
from scores import GLUE, WIKITEXT, by_row, gathered, glue, perplexity, result, scored, speed


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


@pytest.mark.parametrize("model", [model for model in published.MODELS if "glue" in model.figures])
def test_published_averages_are_the_means_of_their_tasks(model: published.Published) -> None:
    mean = statistics.fmean(model.figures[task] for task in GLUE)
    assert model.figures["glue"] == pytest.approx(mean, abs=0.051)


def test_only_the_scripts_mnli_gives_the_published_average_of_bert() -> None:
    (bert,) = (model for model in published.MODELS if model.name == "BERT-base")
    assert bert.figures["mnli"] == 84.7
    assert round(statistics.fmean(bert.figures[task] for task in GLUE), 1) == 79.5
    assert round(statistics.fmean({**bert.figures, "mnli": 86.7}[task] for task in GLUE), 1) != 79.5


def test_published_students_name_a_published_teacher_with_the_same_figures() -> None:
    names = {model.name: model for model in published.MODELS}
    for student in (model for model in published.MODELS if model.teacher):
        assert student.figures.keys() <= names[str(student.teacher)].figures.keys()


def test_published_rows_stand_beside_ours_for_the_same_tasks_alone() -> None:
    scores = gathered(
        [
            result("m", "squad", 0.8, scores={"exact_match": 0.75, "f1": 0.85}),
            result("m", "squad", 0.9, scores={"exact_match": 0.85, "f1": 0.95}, teacher={"name": "bert-squad"}),
            result("m", "xnli", 0.6, scores={"en/accuracy": 0.7, "de/accuracy": 0.5, "accuracy": 0.6}),
            perplexity("gpt", 30.0),
        ]
    )
    table = published.published_table(scores)
    rows = by_row(table)
    assert table is not None
    assert table.header[2:] == ["SQuAD EM", "SQuAD F1", "XNLI en", "XNLI de", "WikiText-103 perplexity"]
    assert [rows["m"][name] for name in table.header[1:]] == ["measured here", "75.0", "85.0", "70.0", "50.0", "-"]
    assert rows["m + 2nd distillation"]["SQuAD F1"] == "95.0"
    assert rows["gpt"]["WikiText-103 perplexity"] == "30.0"
    assert rows["DistilBERT + 2nd distillation"]["SQuAD EM"] == "79.1"
    assert rows["mBERT"]["XNLI de"] == "72.3"
    assert rows["GPT-2"]["source"] == "published, the original scripts' README"
    assert {"ELMo", "RoBERTa-base"}.isdisjoint(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"details": {"task": {"paths": None, "dataset": {**WIKITEXT, "name": "wikitext-2-raw-v1"}}}},
        {"details": {"task": {"paths": None, "dataset": {**WIKITEXT, "split": "train"}}}},
        {"details": {"task": {"paths": "wikitext-103.txt", "dataset": WIKITEXT}}},
        {"settings": {"max_tokens": 1000}},
        {"details": {"task": {}}, "settings": {"text": {"hub": {**WIKITEXT, "split": "train"}}}},  # as once recorded
    ],
)
def test_only_the_perplexity_on_all_of_wikitexts_test_split_stands_beside_the_published_one(changes: Any) -> None:
    table = published.published_table(gathered([perplexity("m", 30.0)]))
    assert table is not None
    assert "fine-tuned on it, as ours by task=wikitext103" in table.notes[1]
    old = {"details": {"task": {}}, "settings": {"text": {"hub": WIKITEXT}}}
    assert published.published_table(gathered([perplexity("m", 30.0, **old)])) is not None
    assert published.published_table(gathered([perplexity("m", 30.0, **changes)])) is None


def test_a_finetuned_perplexity_stands_beside_the_published_ones_before_a_zero_shot_one() -> None:
    tuned = perplexity("m", 21.5, task="wikitext103", details={"task": {"scored": {}}})
    for results in ([tuned, perplexity("m", 40.0)], [perplexity("m", 40.0), tuned]):
        assert by_row(published.published_table(gathered(results)))["m"]["WikiText-103 perplexity"] == "21.5"


def test_tasks_that_nobody_published_have_no_published_table() -> None:
    assert published.published_table(gathered([result("m", "my_task", 0.8)])) is None


def test_the_papers_timings_stand_beside_ours_alone() -> None:
    assert published.published_speed(gathered(glue())) is None
    rows = by_row(published.published_speed(gathered([speed("bert", 33.0)])))
    assert rows["DistilBERT"]["times as fast as the teacher, or BERT-base"] == "1.63"


def test_seconds_of_a_whole_pass_stand_beside_the_papers() -> None:
    timed = [speed("bert", 33.0, details={"pass_sentences": 1500}), speed("student", 20.0)]
    timed[0].scores["cpu/pass_seconds"] = 66.0
    timed[1] = dataclasses.replace(
        timed[1], details=timed[0].details, scores={**timed[1].scores, "cpu/pass_seconds": 40.0}
    )
    table = published.published_speed(gathered(timed))
    assert table is not None
    assert table.rows[:2] == [
        ["bert (teacher)", "measured here, 1,500 sentences", "110,000,000", "66", "1.00"],
        ["student", "measured here, 1,500 sentences", "66,000,000", "40", "1.65"],
    ]
