"""From results to tables: which score counts, medians, averages and shares against sums done by hand."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distilkit.records import Result, read_results, write_results
from distilkit.report import medians, published, published_tables, run_tables, speed_tables, tables
from distilkit.report import page as pages
from distilkit.report.medians import choose
from distilkit.report.tables import Roles
from scores import (
    COST,
    GLUE,
    ROLES,
    WIKITEXT,
    ablated,
    glue,
    perplexity,
    result,
    run,
    speed,
)


def by_row(table: pages.Table | None) -> dict[str, dict[str, str]]:
    """Read a table's cells by row and column."""
    assert table is not None
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


# ------------------------------------------------------------------------ what counts


def test_a_score_is_the_median_of_its_seeds() -> None:
    (score,) = choose([result("m", "rte", value, seed=seed) for seed, value in enumerate((0.6, 0.9, 0.61, 0.2))])
    assert score.spread == (pytest.approx(0.605), 0.2, 0.9, 4)


def test_a_seed_that_has_no_number_is_not_passed_over() -> None:
    (score,) = choose([result("m", "stsb", value, seed=seed) for seed, value in enumerate((0.6, math.nan, 0.61))])
    assert math.isnan(score.median)
    assert score.spread.seeds == 3
    assert by_row(tables.quality([score], Roles(teacher=None, baseline=None)))["m"]["STS-B"] == "nan"


@pytest.mark.parametrize(("higher", "best"), [(True, 2), (False, 1)])
def test_settings_are_chosen_on_held_out_rows_and_not_by_the_score(higher: bool, best: int) -> None:
    results = [
        result("m", "rte", score, settings={"lr": lr}, held_out=held_out, seed=seed, higher_is_better=higher)
        for lr, held_out, score in ((1, 0.70, 0.99), (2, 0.80, 0.60), (3, 0.75, 0.90))
        for seed in (1, 2)
    ]
    (score,) = choose(results)
    assert [each.settings["lr"] for each in score.results] == [best, best]
    assert score.row == "m"


def test_the_median_on_held_out_rows_decides_and_not_the_best_seed() -> None:
    lucky, steady = (0.9, 0.1, 0.2), (0.5, 0.5, 0.5)
    results = [
        result("m", "rte", 0.6, settings={"lr": lr}, held_out=value, seed=seed)
        for lr, values in ((1, lucky), (2, steady))
        for seed, value in enumerate(values)
    ]
    assert choose(results)[0].results[0].settings == {"lr": 2}


@pytest.mark.parametrize(
    ("held_out", "rows"),
    [
        ((None, None, None), [("m (lr=1e-05)", 0.7), ("m (lr=2e-05)", 0.6), ("m (lr=3e-05)", 0.5)]),
        ((None, 0.8, 0.9), [("m", 0.5), ("m (lr=1e-05)", 0.7)]),  # a plain run beside a grid
    ],
)
def test_settings_without_held_out_scores_are_rows_of_their_own_named_by_what_differs(
    held_out: Sequence[float | None], rows: list[tuple[str, float]]
) -> None:
    results = [
        result("m", "rte", score, settings={"lr": lr, "batch_size": 32}, held_out=each)
        for lr, score, each in zip((1e-5, 2e-5, 3e-5), (0.7, 0.6, 0.5), held_out, strict=True)
    ]
    assert [(score.row, score.median) for score in choose(results)] == rows
    assert [score.plain for score in choose(results)] == [row == "m" for row, _ in rows]


def test_the_later_of_two_results_of_one_seed_counts() -> None:
    results = [
        result("m", "rte", 0.7, cost={**COST, "date": "2026-11-20T10:00:01+00:00"}),
        result("m", "rte", 0.5, cost={**COST, "date": "2026-11-20T09:59:59+00:00"}),
        result("m", "rte", 0.4, cost={**COST, "date": "2026-11-20"}),
    ]
    (score,) = choose(results)
    assert (score.median, score.spread.seeds) == (0.7, 1)


def test_two_models_of_one_name_are_two_rows() -> None:
    results = [result("m", "rte", 0.7, sha256="a" * 64), result("m", "rte", 0.5, sha256="b" * 64)]
    assert {score.row: score.median for score in choose(results)} == {"m @aaaaaaa": 0.7, "m @bbbbbbb": 0.5}


def test_settings_with_long_values_have_short_names_that_differ() -> None:
    texts = ["a" * 99 + end for end in "xy"]
    results = [result("m", "rte", 0.7, settings={"text": text}) for text in ["b" * 99, texts[0]]]
    assert {score.row for score in choose(results)} == {f"m (text={'a' * 40})", f"m (text={'b' * 40})"}
    results = [result("m", "rte", 0.7, settings={"text": text}) for text in texts]
    assert {score.row for score in choose(results)} == {f"m (text={text})" for text in texts}


def test_second_distillations_that_differ_in_the_temperature_are_two_settings() -> None:
    results = [
        result("m", "rte", score, teacher={"name": "bert", "temperature": temperature}, held_out=held_out)
        for temperature, score, held_out in ((1.0, 0.9, 0.5), (2.0, 0.6, 0.8))
    ]
    assert [score.median for score in choose(results)] == [0.6]


def test_the_seeds_of_a_second_distillation_are_one_row_though_each_has_a_teacher_of_its_seed() -> None:
    def second(teacher: str, score: float, *, seed: int) -> Result:
        return result("m", "rte", score, seed=seed, teacher={"name": f"{teacher}/rte/seed{seed}-abc/model"})

    (score,) = choose([second("bert", value, seed=seed) for seed, value in enumerate((0.6, 0.9, 0.7), 1)])
    assert score.spread == (0.7, 0.6, 0.9, 3)
    assert len(choose([second("bert", 0.6, seed=1), second("roberta", 0.7, seed=1)])) == 2


def test_a_second_distillation_is_a_row_of_its_own() -> None:
    results = [result("m", "squad", 0.8), result("m", "squad", 0.85, teacher={"name": "bert-squad"})]
    assert {score.row: score.median for score in choose(results)} == {"m": 0.8, "m + 2nd distillation": 0.85}


# ------------------------------------------------------------------- quality, retention


def test_the_quality_table_has_medians_and_the_macro_average() -> None:
    table = tables.quality(choose(glue()), ROLES)
    rows = by_row(table)
    assert list(rows) == ["bert (teacher)", "student", "baseline"]
    assert table is not None
    assert table.header[:4] == ["model", "parameters", "GLUE average", "CoLA"]
    assert rows["student"]["CoLA"] == "51.0"
    assert rows["student"]["parameters"] == "66,000,000"
    averages = [row["GLUE average"] for row in rows.values()]
    assert averages == ["79.0", "76.6", "70.4"]  # 711 / 9, 689 / 9, 634 / 9
    assert "student, lowest to highest: CoLA 49.0 to 52.0 (3 seeds), MNLI 80.0 to 83.0 (3 seeds)" in table.notes[2]
    record = next(each for each in table.records if (each["model"], each["task"]) == ("student", "cola"))
    assert (record["seeds"], record["lowest"], record["highest"]) == (3, pytest.approx(0.49), pytest.approx(0.52))


def test_without_all_nine_tasks_the_average_is_over_those_that_all_rows_share() -> None:
    results = [each for each in glue() if not (each.name == "student" and each.task in GLUE[2:])]
    results = [each for each in results if each.task != "wnli"]
    results.append(result("student", "squad", 0.9, teacher={"name": "bert-squad"}))  # narrows nothing
    table = tables.quality(choose(results), ROLES)
    rows = by_row(table)
    assert rows["bert (teacher)"]["average of 2 tasks"] == "70.0"  # (56 + 84) / 2
    assert rows["student"]["average of 2 tasks"] == "66.5"
    assert rows["student + 2nd distillation"]["average of 2 tasks"] == "-"
    assert table is not None
    assert "average of 2 tasks: CoLA, MNLI." in table.notes[0]


def test_perplexities_keep_their_unit_and_stay_out_of_averages() -> None:
    results = [*glue(), *(perplexity(name, value) for name, value in (("bert", 16.3), ("student", 21.1)))]
    scores = choose(results)
    rows = by_row(tables.quality(scores, ROLES))
    assert rows["student"]["perplexity"] == "21.10"
    assert rows["student"]["GLUE average"] == "76.6"
    assert by_row(tables.kept(scores, ROLES))["student"]["perplexity"] == "77.3"  # 16.3 / 21.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"block_size": 128}}, "block_size (128, not 512)"),
        ({"settings": {"stride": 512}}, "stride (512, not 256)"),
        ({"settings": {"max_tokens": 100}}, "max_tokens (100, not None)"),
        (
            {"settings": {"text": "other"}},
            "text (other, not {'hub': {'path': 'Salesforce/wikitext', 'name': 'wikitext-10)",
        ),
        ({"details": {"words": 500}}, "words (500, not 700)"),
    ],
)
def test_perplexities_that_were_measured_in_different_ways_are_no_share(changes: dict[str, Any], said: str) -> None:
    given = [*glue(seeds=[1]), perplexity("bert", 16.0), perplexity("student", 20.0, **changes)]
    given.append(perplexity("baseline", 32.0))
    table = tables.kept(choose(given), ROLES)
    assert table is not None
    assert [by_row(table)[name]["perplexity"] for name in ("student", "baseline")] == ["-", "50.0"]
    assert table.notes[1] == f"student on perplexity is not compared, for it differs from bert in {said}."


def test_with_different_tokenizers_perplexities_per_word_are_compared_where_there_are_any() -> None:
    cut = {"settings": {"vocabulary": 30_000}, "details": {"text_tokens": 1100}}
    given = [
        perplexity("gpt2", 16.0),
        perplexity("m", 20.0, scores={"perplexity": 20.0, "word_perplexity": 64.0}, **cut),
    ]
    roles = Roles(teacher="gpt2", baseline=None)
    table = tables.kept(choose(given), roles)
    assert table is not None
    assert table.rows == [["m", "50.0"]]  # 32 / 64
    assert table.notes[1] == "m on perplexity: by the perplexity per word, for its tokenizer is not that of gpt2."
    masked = [perplexity("gpt2", 16.0, task="pseudo_perplexity", scores={"pseudo_perplexity": 16.0})]
    masked.append(perplexity("m", 20.0, task="pseudo_perplexity", scores={"pseudo_perplexity": 20.0}, **cut))
    assert tables.kept(choose(masked), roles) is None
    said = tables.nothing_kept(choose(masked), roles)
    assert said is not None
    assert said.endswith("it differs from gpt2 in vocabulary (30000, not 50257), text_tokens (1100, not 900).")


def test_a_row_with_few_tasks_or_others_takes_no_average_from_the_rest() -> None:
    tasks = ("cola", "rte", "mrpc")
    given = [each for each in glue() if each.task in tasks and (each.name, each.task) != ("baseline", "mrpc")]
    given += [result("odd", "imdb", 0.9), result("one", "rte", 0.5)]
    table = tables.quality(choose(given), ROLES)
    assert table is not None
    assert table.header[2] == "average of 2 tasks"  # of all that teacher and baseline have
    assert [row[2] for row in table.rows] == ["62.5", "55.0", "-", "-", "42.5"]  # (56 + 69) / 2
    (line, *others) = tables.verdicts(choose(given), ROLES)
    assert line.startswith("On average of 2 tasks student keeps 88.0 % of bert")  # 110 / 125
    assert [other.partition(" keeps")[0] for other in others] == ["On RTE one"]


def test_a_verdict_is_over_the_tasks_that_all_three_have() -> None:
    lacking = {"bert": "qnli", "student": "sst2", "baseline": "mrpc"}
    few = ("cola", "rte", "mrpc", "qnli", "sst2")
    given = [each for each in glue() if each.task in few and each.task != lacking[each.name]]
    (line,) = tables.verdicts(choose(given), ROLES)
    assert line.startswith("On average of 2 tasks student keeps 88.0 % of bert")  # CoLA and RTE: 110 / 125


def test_a_teacher_of_two_settings_is_not_passed_over_without_a_word() -> None:
    given = [result("bert", "rte", 0.7, settings={"lr": lr}) for lr in (1, 2)] + [result("student", "rte", 0.6)]
    assert tables.kept(choose(given), ROLES) is None
    said = tables.nothing_kept(choose(given), ROLES)
    assert said is not None
    assert said.startswith("What is kept of bert is left out. bert (lr=1) is one of several settings of bert on RTE")
    assert "set teacher='bert (lr=2)' or remove" in said
    assert tables.nothing_kept(choose([result("bert", "rte", 0.7)]), ROLES) is None


def test_what_was_scored_on_a_part_of_the_rows_is_said_to_be() -> None:
    part = {
        "settings": {"epochs": 1, "lr": 5e-5, "max_train_rows": 100},
        "details": {"rows": {"dev": 277}, "train_rows": 100},
    }
    whole = {"settings": {"epochs": 3, "lr": 5e-5}, "details": {"rows": {"dev": 277}, "train_rows": 2490}}
    scores = choose(
        [result("m", "rte", 0.6, **part), result("n", "rte", 0.6, **whole), result("m", "cola", 0.5, **whole)]
    )
    said = (
        "RTE on a part of its rows: trained on 100 rows, scored on 277 of dev, epochs=1 (m); trained on 2,490 rows, scored on "
        "277 of dev, epochs=3 (n)."
    )
    for table in (tables.quality(scores, ROLES), published_tables.beside_published(scores, ROLES)):
        assert table is not None
        assert table.notes[1:] == [said]


def test_what_is_kept_is_a_share_of_the_teachers_score_and_of_its_average() -> None:
    table = tables.kept(choose(glue()), ROLES)
    rows = by_row(table)
    assert list(rows) == ["student", "baseline"]
    assert rows["student"]["CoLA"] == "91.1"  # 51 / 56
    assert rows["student"]["WNLI"] == "105.7"  # 56 / 53
    assert rows["student"]["GLUE average"] == "96.9"  # 689 / 711
    assert rows["baseline"]["GLUE average"] == "89.2"  # 634 / 711
    assert table is not None
    assert table.notes[1] == (
        "On the GLUE average student keeps 96.9 % of bert, baseline, which was trained without a teacher, 89.2 %: student "
        "keeps more, by 7.7 points."
    )


def test_the_verdict_names_the_baseline_where_it_keeps_more() -> None:
    scores = choose([result("bert", "rte", 0.8), result("student", "rte", 0.4), result("baseline", "rte", 0.6)])
    (line,) = tables.verdicts(scores, ROLES)
    assert line.startswith("On RTE student keeps 50.0 % of bert")
    assert line.endswith("baseline keeps more, by 25.0 points.")


@pytest.mark.parametrize("score", [0.0, -0.1])
def test_nothing_is_a_share_of_a_teachers_score_of_zero_or_less(score: float) -> None:
    scores = choose([result("bert", "cola", score), result("student", "cola", 0.4)])
    assert tables.kept(scores, ROLES) is None


def test_metrics_have_a_table_of_their_own() -> None:
    results = [
        result("m", "mnli", 0.82, seed=seed, scores={"matched/accuracy": value, "mismatched/accuracy": 0.83})
        for seed, value in enumerate((0.80, 0.82, 0.85))
    ]
    table = tables.metrics(choose([*results, perplexity("m", 20.0)]), ROLES)
    assert table is not None
    assert table.rows == [
        ["m", "MNLI", "matched/accuracy", "82.0", "3", "80.0 to 85.0"],
        ["m", "MNLI", "mismatched/accuracy", "83.0", "3", "83.0 to 83.0"],
        ["m", "perplexity", "perplexity", "20.00", "1", "-"],
        ["m", "perplexity", "word_perplexity", "40.00", "1", "-"],
    ]


# -------------------------------------------------------------------------- published


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


def test_what_published_students_keep() -> None:
    assert published.published_retention("rte") == ("DistilBERT", pytest.approx(100 * 59.9 / 69.3))
    assert published.published_retention("glue") == ("DistilBERT", pytest.approx(100 * 77.0 / 79.5))
    assert published.published_retention("wikitext103") == ("DistilGPT2", pytest.approx(100 * 16.3 / 21.1))
    kept = 100 * (77.7 + 85.8) / (81.2 + 88.5)
    assert published.published_retention("squad") == ("DistilBERT", pytest.approx(kept))
    assert published.published_retention("cbt") is None


def test_published_rows_stand_beside_ours_for_the_same_tasks_alone() -> None:
    scores = choose(
        [
            result("m", "squad", 0.8, scores={"exact_match": 0.75, "f1": 0.85}),
            result("m", "squad", 0.9, scores={"exact_match": 0.85, "f1": 0.95}, teacher={"name": "bert-squad"}),
            result("m", "xnli", 0.6, scores={"en/accuracy": 0.7, "de/accuracy": 0.5, "accuracy": 0.6}),
            perplexity("gpt", 30.0),
        ]
    )
    table = published_tables.beside_published(scores, ROLES)
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
    "settings",
    [
        {"text": {"hub": {**WIKITEXT, "name": "wikitext-2-raw-v1"}}},
        {"text": {"hub": {**WIKITEXT, "split": "train"}}},
        {"text": {"files": [["wikitext-103.txt", 1, 1]]}},
        {"max_tokens": 1000},
    ],
)
def test_only_the_perplexity_on_all_of_wikitexts_test_split_stands_beside_the_published_one(settings: Any) -> None:
    table = published_tables.beside_published(choose([perplexity("m", 30.0)]), ROLES)
    assert table is not None
    assert "the published models were fine-tuned on it, ours were not" in table.notes[1]
    assert published_tables.beside_published(choose([perplexity("m", 30.0, settings=settings)]), ROLES) is None


def test_tasks_that_nobody_published_have_no_published_table() -> None:
    assert published_tables.beside_published(choose([result("m", "my_task", 0.8)]), ROLES) is None


# ------------------------------------------------------------------------------ speed


def test_size_and_speed_have_a_row_for_each_model_and_backend() -> None:
    against = {"bert": {"cpu/latency_ms": 1.63, "cpu/latency_ms_p10": 9.0, "cpu/onnx/latency_ms": 1.5}}
    results = [speed("student", 20.0, details={"against": against}), speed("bert", 33.0)]
    table = speed_tables.speed(results, ROLES)
    assert table is not None
    sizes = ["66,000,000", "42,000,000"]
    assert [row[:2] for row in table.rows] == [
        ["bert (teacher)", "cpu"],
        ["student", "cpu"],
        ["bert (teacher)", "cpu/onnx"],
        ["student", "cpu/onnx"],
    ]
    assert table.rows[1] == [
        "student",
        "cpu",
        *sizes,
        "438.0",
        "20.0 (19.0 to 22.0)",
        "150.0",
        "latency 1.63 x bert",
    ]
    assert table.rows[3] == ["student", "cpu/onnx", *sizes, "440.5", "10.0", "-", "latency 1.50 x bert"]
    assert "Some CPU, 2 cores" in table.notes[0]
    assert "batch 1" not in table.notes[0]


def test_the_note_on_speed_says_how_it_was_timed() -> None:
    details = {"threads": 2, "num_sentences": 200, "rounds": 5}
    table = speed_tables.speed([speed("m", 20.0, settings={"batch_sizes": [4, 16]}, details=details)], ROLES)
    assert table is not None
    assert table.notes[0].endswith(
        " Batches of 4 and 16, sentences: 200, CPU threads: 2, measured on Some CPU, 2 cores."
    )


@pytest.mark.parametrize("turned", [False, True])
def test_the_later_timing_counts_and_of_the_teacher_that_beside_a_student(turned: bool) -> None:
    def at(hour: int) -> dict[str, Any]:
        return {"cost": {**COST, "date": f"2026-11-20T{hour:02}:00:00+00:00"}}

    beside = [speed("student", 20.0, details={"against": {"bert": {}}}, **at(8)), speed("bert", 30.0, **at(8))]
    later = [speed("bert", 99.0, **at(9)), speed("baseline", 50.0, **at(9))]
    earlier = [speed("baseline", 40.0, **at(7))]
    order = [*later, *earlier, *beside] if turned else [*beside, *later, *earlier]
    found = speed_tables.speeds(order, teacher="bert")
    latency = {each["model"]: each["latency_ms"] for each in found if each["backend"] == "cpu"}
    assert latency == {"student": 20.0, "bert": 30.0, "baseline": 50.0}
    assert speed_tables.speeds(order, teacher=None)[0]["latency_ms"] == (99.0 if turned else 20.0)


def test_timings_have_the_name_under_which_the_weights_were_scored() -> None:
    scored = [result("teacher", "rte", 0.7, sha256="t" * 64), result("student", "rte", 0.6)]
    against = {"against": {"bert-base": {"cpu/latency_ms": 1.5}}}
    timed = [speed("student", 20.0, details=against), speed("bert-base", 30.0, sha256="t" * 64), speed("new", 1.0)]
    renamed = medians.name_alike([*timed, *scored])
    assert [each.name for each in renamed] == ["student", "teacher", "new", "teacher", "student"]
    assert renamed[0].details == {"against": {"teacher": {"cpu/latency_ms": 1.5}}}
    assert renamed[3:] == scored


def test_the_papers_timings_stand_beside_ours_alone() -> None:
    assert published_tables.published_speed(glue()) is None
    rows = by_row(published_tables.published_speed([speed("bert", 33.0)]))
    assert rows["DistilBERT"]["times as fast as BERT-base"] == "1.63"


# --------------------------------------------------------------------------- ablation


def test_the_ablation_shows_changes_against_the_full_objective_and_compares_signs() -> None:
    runs = [run(name, nll) for name, nll in (("full", 4.0), ("no_ce", 4.25), ("random_init", 5.5))]
    table = run_tables.ablation(choose(ablated()), runs)
    assert table is not None
    assert table.rows == [
        ["full", "70.0", "-", "4.000", "-", "-", "-"],
        ["no_ce", "66.0", "-4.00", "4.250", "+0.250", "-2.96", "yes"],
        ["no_mlm", "71.0", "+1.00", "-", "-", "-0.31", "no"],
        ["no_cos", "69.0", "-1.00", "-", "-", "-1.46", "yes"],
        ["random_init", "60.0", "-10.00", "5.500", "+1.500", "-3.69", "yes"],
    ]
    assert "3 of 4 agree" in table.notes[0]


def test_without_scores_a_higher_cross_entropy_has_the_papers_sign() -> None:
    table = run_tables.ablation([], [run("full", 4.0), run("no_ce", 4.5), run("no_cos", 3.5)])
    assert table is not None
    assert [row[-1] for row in table.rows] == ["-", "yes", "no"]


def test_a_random_init_without_a_full_row_is_no_ablation() -> None:
    assert run_tables.ablation([], [run("distilled", 4.0), run("random_init", 5.0)]) is None
    assert medians.ablation_row("carefull") is None
    assert medians.ablation_row("x/no_ce") == ("x/", "no_ce")


def test_rows_of_two_sweeps_are_not_mixed() -> None:
    runs = [run("full", 4.0), run("no_ce", 4.5), run("full", 2.0, folder="b"), run("no_ce", 1.0, folder="b")]
    table = run_tables.ablation([], runs)
    assert table is not None
    assert [row[4] for row in table.rows] == ["-", "+0.500", "-", "-1.000"]


# ------------------------------------------------------------------- training and cost


def test_training_runs_show_what_they_took_and_reached() -> None:
    teacher = {"name": "outputs/demo/teacher/student", "parameters": 2000}
    distilled = run(
        "distilled",
        4.5,
        teacher=teacher,
        layers=[0, 2],
        objective={"alpha_ce": 5.0, "alpha_mlm": 2.0, "temperature": 2.0},
        wall_seconds=5400,
        tokens_per_second=1234.5,
        peak_memory_mb={"host": 900.0, "device": 1200.5},
    )
    distilled["after"] |= {"val/agreement": 0.5, "val/teacher_nll": 4.25}
    rows = by_row(run_tables.training([distilled, run("teacher", 4.25)]))
    assert list(rows["distilled"].values()) == [
        *("distilled", "teacher", "1,000", "0 2", "ce 5.0, mlm 2.0, temperature 2.0", "64", "1.50", "1,234", "1,200"),
        *("9.000", "4.500", "4.250", "0.500"),
    ]
    assert list(rows["teacher"].values())[1:4] == ["none", "1,000", "-"]


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"_target_": "distilkit.student.cut_student", "init": "random"}, "random init"),
        ({"_target_": "distilkit.student.new_student"}, "random init"),
        ({"_target_": "distilkit.student.pretrained_student", "name": "bert"}, "-"),
    ],
)
def test_a_random_init_is_one_that_the_config_of_the_run_asks_for(
    student: dict[str, str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "full" / ".hydra").mkdir(parents=True)
    (tmp_path / "full" / ".hydra" / "config.yaml").write_text(json.dumps({"student": student}), "utf-8")
    assert by_row(run_tables.training([run("full", 4.0, folder=str(tmp_path))]))["full"]["layers"] == said


def test_the_cost_of_scoring_is_summed_over_seeds_and_settings() -> None:
    results = [
        result("m", "rte", 0.6, seed=seed, settings={"lr": lr}, cost={**COST}) for seed in (1, 2) for lr in (1, 2)
    ]
    results[0].cost["date"] = "2026-11-20T08:00:00+00:00"
    table = run_tables.cost([*results, result("m", "cola", 0.5, cost={})])
    assert table is not None
    assert table.title == "Cost of fine-tuning and scoring"
    assert table.rows == [["m", "RTE", "4", "4,000,000", "2.00", "Some CPU, 2 cores", "2026-11-20", "1"]]
    assert table.notes == [
        "All seeds and settings together: 4,000,000 tokens in 2.00 hours.",
        "Versions 1: python 3.11, torch 2.13.",
    ]


def test_tables_without_anything_to_show_are_left_out() -> None:
    made = [tables.quality([], ROLES), tables.kept([], ROLES), tables.metrics([], ROLES)]
    made += [published_tables.beside_published([], ROLES), speed_tables.speed([], ROLES)]
    made += [run_tables.ablation([], []), run_tables.training([]), run_tables.cost([])]
    assert made == [None] * len(made)


# ------------------------------------------------------------------------- model card


def test_the_card_of_a_model_gets_its_scores() -> None:
    results = [each for each in glue() if each.name == "student" and each.task in ("rte", "cola")]
    text = tables.results_markdown([*results, perplexity("student", 21.0), speed("student", 20.0)])
    assert text.splitlines() == [
        "| task | score | seeds | lowest to highest | metrics |",
        "| --- | ---: | ---: | ---: | --- |",
        "| CoLA | 51.0 | 3 | 49.0 to 52.0 | accuracy 51.0 |",
        "| RTE | 59.0 | 3 | 57.0 to 60.0 | accuracy 59.0 |",
        "| perplexity | 21.00 | 1 | - | perplexity 21.00, word_perplexity 42.00 |",
        "| average of 2 tasks | 55.0 | - | - | - |",
    ]
    assert tables.results_markdown([]) == ""
    assert tables.results_markdown([speed("student", 20.0)]) == ""


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = [*glue(seeds=[1]), speed("bert", 33.0), perplexity("bert", 16.3)]
    write_results(tmp_path / "a", results)
    assert read_results([tmp_path]) == results
    assert json.loads((tmp_path / "a" / "results.json").read_text("utf-8"))["format"] == 1
