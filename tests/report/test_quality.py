"""The quality tables and the plot of score against size."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from distilkit.records import Result
from distilkit.report import quality, retention
from scores import GLUE, by_row, gathered, glue, perplexity, result, said, speed, with_rows


def test_the_quality_table_has_medians_and_the_macro_average() -> None:
    table = quality.quality_table(gathered(glue()))
    rows = by_row(table)
    assert list(rows) == ["bert (teacher)", "student", "baseline"]
    assert table is not None
    assert table.header[:4] == ["model", "parameters", "GLUE average", "CoLA"]
    assert rows["student"]["CoLA"] == "51.0"
    assert rows["student"]["parameters"] == "66,000,000"
    averages = [row["GLUE average"] for row in rows.values()]
    assert averages == ["79.0", "76.6", "70.4"]  # 711 / 9, 689 / 9, 634 / 9
    assert table.notes[1] == "bert on CoLA and 26 more without interval, because there are no rows files."
    record = next(each for each in table.records if (each["model"], each["task"]) == ("student", "cola"))
    assert (record["seeds"], record["lowest"], record["highest"]) == (3, pytest.approx(0.49), pytest.approx(0.52))


def test_without_all_nine_tasks_the_average_is_over_those_that_all_rows_share() -> None:
    results = [each for each in glue() if not (each.name == "student" and each.task in GLUE[2:])]
    results = [each for each in results if each.task != "wnli"]
    results.append(result("student", "squad", 0.9, teacher={"name": "bert-squad"}))  # narrows nothing
    table = quality.quality_table(gathered(results))
    rows = by_row(table)
    assert rows["bert (teacher)"]["average of 2 tasks"] == "70.0"  # (56 + 84) / 2
    assert rows["student"]["average of 2 tasks"] == "66.5"
    assert rows["student + 2nd distillation"]["average of 2 tasks"] == "-"
    assert table is not None
    assert "average of 2 tasks: CoLA, MNLI." in table.notes[0]


def test_perplexities_keep_their_unit_and_stay_out_of_averages() -> None:
    results = [*glue(), *(perplexity(name, value) for name, value in (("bert", 16.3), ("student", 21.1)))]
    scores = gathered(results)
    rows = by_row(quality.quality_table(scores))
    assert rows["student"]["perplexity"] == "21.10"
    assert rows["student"]["GLUE average"] == "76.6"
    assert by_row(retention.retention_table(scores))["student"]["perplexity"] == "77.3"  # 16.3 / 21.1


def test_a_row_with_few_tasks_or_others_takes_no_average_from_the_rest() -> None:
    tasks = ("cola", "rte", "mrpc")
    given = [each for each in glue() if each.task in tasks and (each.name, each.task) != ("baseline", "mrpc")]
    given += [result("odd", "imdb", 0.9), result("one", "rte", 0.5)]
    table = quality.quality_table(gathered(given))
    assert table is not None
    assert table.header[2] == "average of 2 tasks"  # of all that teacher and baseline have
    assert [row[2] for row in table.rows] == ["62.5", "55.0", "-", "-", "42.5"]  # (56 + 69) / 2
    (line, *others) = retention.verdicts(gathered(given))
    assert line.startswith("On average of 2 tasks student keeps 88.0 % of bert")  # 110 / 125
    assert [other.partition(" keeps")[0] for other in others] == ["On RTE one"]


def test_what_was_scored_on_a_part_of_the_rows_is_said_to_be() -> None:
    part = {
        "settings": {"epochs": 1, "lr": 5e-5, "max_train_rows": 100},
        "details": {"rows": {"dev": 277}, "train_rows": 100},
    }
    whole = {"settings": {"epochs": 3, "lr": 5e-5}, "details": {"rows": {"dev": 277}, "train_rows": 2490}}
    scores = gathered(
        [result("m", "rte", 0.6, **part), result("n", "rte", 0.6, **whole), result("m", "cola", 0.5, **whole)]
    )
    said = "On a part of the rows: m on RTE (trained on 100, scored on 277 of dev)."
    table = quality.quality_table(scores)
    assert table is not None
    assert table.notes[-1] == said
    alike = gathered([result(name, "rte", 0.6, **part) for name in ("m", "n")])
    table = quality.quality_table(alike)
    assert table is not None
    assert table.notes[-1] == "On a part of the rows: RTE (trained on 100, scored on 277 of dev)."


def test_metrics_have_a_table_of_their_own() -> None:
    results = [
        result("m", "mnli", 0.82, seed=seed, scores={"matched/accuracy": value, "mismatched/accuracy": 0.83})
        for seed, value in enumerate((0.80, 0.82, 0.85))
    ]
    table = quality.metrics_table(gathered([*results, perplexity("m", 20.0)]))
    assert table is not None
    assert table.rows == [
        ["m", "MNLI", "matched/accuracy", "82.0", "3"],
        ["m", "MNLI", "mismatched/accuracy", "83.0", "3"],
        ["m", "perplexity", "perplexity", "20.00", "1"],
        ["m", "perplexity", "word_perplexity", "40.00", "1"],
    ]


def test_the_card_of_a_model_gets_its_scores() -> None:
    results = [each for each in glue() if each.name == "student" and each.task in ("rte", "cola")]
    text = quality.results_markdown([*results, perplexity("student", 21.0), speed("student", 20.0)])
    assert text.splitlines() == [
        "| task | score | seeds | metrics |",
        "| --- | ---: | ---: | --- |",
        "| CoLA | 51.0 | 3 | accuracy 51.0 |",
        "| RTE | 59.0 | 3 | accuracy 59.0 |",
        "| perplexity | 21.00 | 1 | perplexity 21.00, word_perplexity 42.00 |",
        "| average of 2 tasks | 55.0 | - | - |",
        "",
        "student on CoLA and 2 more without interval, because there are no rows files.",
    ]
    assert quality.results_markdown([]) == ""
    assert quality.results_markdown([speed("student", 20.0)]) == ""


def test_plots_and_tables_show_the_same_number_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [result(name, task, 0.6, parameters=n) for name in "ab" for task, n in (("cola", 1_000), ("rte", 9_000))]
    drawn: list[Any] = []
    monkeypatch.setattr(quality, "scatter", lambda panels, *args, **labels: drawn.extend(panels.values()) or Figure())
    quality.size_plot(gathered(results))
    assert [point.x for point in drawn[0]] == [1.0, 1.0]  # thousands, of CoLA, which is the table's first task
    table = quality.quality_table(gathered(results))
    assert table is not None
    assert table.rows[0][1] == "1,000"


def test_the_medians_for_a_model_card_are_those_of_its_own_fine_tunings() -> None:
    results = [each for each in glue() if each.name == "student" and each.task in ("rte", "cola")]
    second = result("student", "rte", 0.9, teacher={"name": "bert"})
    failed = result("student", "sst2", float("nan"))
    assert quality.medians([*results, second, failed, perplexity("student", 21.0)]) == {
        "cola": {"accuracy": pytest.approx(0.51)},
        "rte": {"accuracy": pytest.approx(0.59)},
        "perplexity": {"perplexity": 21.0, "word_perplexity": 42.0},
    }


def tuned(name: str, task: str, *, seeds: int = 2, lr: float = 2e-5, rows: int = 100) -> list[Result]:
    settings = {"epochs": 3, "lr": lr, "batch_size": 32, "max_length": 128, "precision": "32-true", "train_rows": rows}
    about = {"settings": settings, "details": {"rows": {"dev": 50}}}
    return [result(name, task, 0.6, seed=seed, **about) for seed in range(1, seeds + 1)]


def test_one_line_tells_how_all_models_were_fine_tuned_where_they_were_alike() -> None:
    results = [each for name in ("bert", "student") for task in ("rte", "cola") for each in tuned(name, task)]
    table = quality.finetuning_table(gathered(results))
    assert table is not None
    alike = ["all", "all", "3", "2e-05", "32", "128", "32-true", "1, 2", "1", "the same for all models"]
    assert table.rows == [alike]
    assert table.folded


def test_models_that_were_fine_tuned_differently_have_lines_of_their_own() -> None:
    results = [*tuned("bert", "rte"), *tuned("student", "rte", lr=5e-5, rows=20, seeds=1)]
    table = quality.finetuning_table(gathered(results))
    assert table is not None
    assert [[row[0], row[3], row[7], row[9]] for row in table.rows] == [
        ["bert", "2e-05", "1, 2", "trained on 100, scored on 50 of dev"],
        ["student", "5e-05", "1", "trained on 20, scored on 50 of dev"],
    ]
    assert quality.finetuning_table(gathered([perplexity("m", 20.0)])) is None


def test_the_best_value_of_each_column_is_marked_and_chance_is_a_row_of_its_own(tmp_path: Path) -> None:
    results = [with_rows(tmp_path, name, "sst2", said(share, seed=1)) for name, share in (("a", 0.9), ("b", 0.7))]
    results += [perplexity("a", 20.0), perplexity("b", 16.0)]
    table = quality.quality_table(gathered(results, teacher=None, baseline=None))
    assert table is not None
    assert set(table.best) == {(0, 2), (1, 3)}  # the higher share, the lower perplexity
    assert table.rows[-1] == ["majority class or no correlation", "-", "58.1", "-"]
    assert "a on SST-2 and 1 more with 1 seed, so that ± is over rows alone." in table.notes
