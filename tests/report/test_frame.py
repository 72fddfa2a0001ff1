"""What counts: medians over seeds, settings chosen on held-out rows, names of rows."""

import math
from collections.abc import Sequence

import pytest

from distilkit.records import Result
from distilkit.report import frame, quality
from distilkit.report.frame import gather
from scores import COST, by_row, counting, result, speed


def test_a_score_is_the_median_of_its_seeds() -> None:
    (score,) = counting([result("m", "rte", value, seed=seed) for seed, value in enumerate((0.6, 0.9, 0.61, 0.2))])
    assert (score.median, score.lowest, score.highest, score.seeds) == (pytest.approx(0.605), 0.2, 0.9, 4)


def test_a_seed_that_has_no_number_is_not_passed_over() -> None:
    results = [result("m", "stsb", value, seed=seed) for seed, value in enumerate((0.6, math.nan, 0.61))]
    (score,) = counting(results)
    assert math.isnan(score.median)
    assert score.seeds == 3
    assert by_row(quality.quality_table(gather(results)))["m"]["STS-B"] == "nan"


@pytest.mark.parametrize(("higher", "best"), [(True, 2), (False, 1)])
def test_settings_are_chosen_on_held_out_rows_and_not_by_the_score(higher: bool, best: int) -> None:
    results = [
        result("m", "rte", score, settings={"lr": lr}, held_out=held_out, seed=seed, higher_is_better=higher)
        for lr, held_out, score in ((1, 0.70, 0.99), (2, 0.80, 0.60), (3, 0.75, 0.90))
        for seed in (1, 2)
    ]
    (score,) = counting(results)
    assert (score.settings["lr"], score.seeds) == (best, 2)
    assert score.row == "m"


def test_the_median_on_held_out_rows_decides_and_not_the_best_seed() -> None:
    lucky, steady = (0.9, 0.1, 0.2), (0.5, 0.5, 0.5)
    results = [
        result("m", "rte", 0.6, settings={"lr": lr}, held_out=value, seed=seed)
        for lr, values in ((1, lucky), (2, steady))
        for seed, value in enumerate(values)
    ]
    assert counting(results)[0].settings == {"lr": 2}


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
    assert [(score.row, score.median) for score in counting(results)] == rows
    assert [score.plain for score in counting(results)] == [row == "m" for row, _ in rows]


def test_settings_are_not_chosen_between_results_on_different_data() -> None:
    results = [
        result("m", "rte", score, settings={"lr": lr, "scored_data": data}, held_out=held_out)
        for data, lr, held_out, score in (
            ("v1", 1, 0.8, 0.6),
            ("v1", 2, 0.7, 0.9),
            ("v2", 1, 0.9, 0.5),
            ("v2", 2, 0.95, 0.4),
        )
    ]
    found = {score.row: (score.median, len(score.tried)) for score in counting(results)}
    assert found == {"m (lr=1, scored_data=v1)": (0.6, 2), "m (lr=2, scored_data=v2)": (0.4, 2)}


def test_a_model_that_was_trained_again_on_all_rows_stands_for_the_setting_it_took() -> None:
    results = [result("m", "rte", 0.6, settings={"lr": lr}, held_out=held_out) for lr, held_out in ((1, 0.8), (2, 0.7))]
    results.append(result("m", "rte", 0.65, settings={"lr": 1, "refit": True}, held_out=0.8))
    (score,) = counting(results)
    assert (score.median, score.row) == (0.65, "m")


def test_two_revisions_of_a_hub_model_are_two_rows() -> None:
    results = [result("b", "rte", 0.7, sha256="someone/b@main"), result("b", "rte", 0.6, sha256="someone/b@v2")]
    assert {score.row: score.median for score in counting(results)} == {"b @main": 0.7, "b @v2": 0.6}


def test_the_later_of_two_results_of_one_seed_counts() -> None:
    results = [
        result("m", "rte", 0.7, cost={**COST, "date": "2026-11-20T10:00:01+00:00"}),
        result("m", "rte", 0.5, cost={**COST, "date": "2026-11-20T09:59:59+00:00"}),
        result("m", "rte", 0.4, cost={**COST, "date": "2026-11-20"}),
    ]
    (score,) = counting(results)
    assert (score.median, score.seeds) == (0.7, 1)


def test_two_models_of_one_name_are_two_rows() -> None:
    results = [result("m", "rte", 0.7, sha256="a" * 64), result("m", "rte", 0.5, sha256="b" * 64)]
    assert {score.row: score.median for score in counting(results)} == {"m @aaaaaaa": 0.7, "m @bbbbbbb": 0.5}


def test_settings_with_long_values_have_short_names_that_differ() -> None:
    texts = ["a" * 99 + end for end in "xy"]
    results = [result("m", "rte", 0.7, settings={"text": text}) for text in ["b" * 99, texts[0]]]
    assert {score.row for score in counting(results)} == {f"m (text={'a' * 40})", f"m (text={'b' * 40})"}
    results = [result("m", "rte", 0.7, settings={"text": text}) for text in texts]
    assert {score.row for score in counting(results)} == {f"m (text={text})" for text in texts}


def test_second_distillations_that_differ_in_the_temperature_are_two_settings() -> None:
    results = [
        result("m", "rte", score, teacher={"name": "bert", "temperature": temperature}, held_out=held_out)
        for temperature, score, held_out in ((1.0, 0.9, 0.5), (2.0, 0.6, 0.8))
    ]
    assert [score.median for score in counting(results)] == [0.6]


def test_the_seeds_of_a_second_distillation_are_one_row_though_each_has_a_teacher_of_its_seed() -> None:
    def second(teacher: str, score: float, *, seed: int) -> Result:
        return result("m", "rte", score, seed=seed, teacher={"name": f"{teacher}/rte/seed{seed}-abc/model"})

    (score,) = counting([second("bert", value, seed=seed) for seed, value in enumerate((0.6, 0.9, 0.7), 1)])
    assert (score.median, score.lowest, score.highest, score.seeds) == (0.7, 0.6, 0.9, 3)
    assert len(counting([second("bert", 0.6, seed=1), second("roberta", 0.7, seed=1)])) == 2


def test_a_second_distillation_is_a_row_of_its_own() -> None:
    results = [result("m", "squad", 0.8), result("m", "squad", 0.85, teacher={"name": "bert-squad"})]
    assert {score.row: score.median for score in counting(results)} == {"m": 0.8, "m + 2nd distillation": 0.85}


def test_timings_have_the_name_under_which_the_weights_were_scored() -> None:
    scored = [result("teacher", "rte", 0.7, sha256="t" * 64), result("student", "rte", 0.6)]
    against = {"against": {"bert-base": {"cpu/latency_ms": 1.5}}}
    timed = [speed("student", 20.0, details=against), speed("bert-base", 30.0, sha256="t" * 64), speed("new", 1.0)]
    renamed = frame.name_alike([*timed, *scored])
    assert [each.name for each in renamed] == ["student", "teacher", "new", "teacher", "student"]
    assert renamed[0].details == {"against": {"teacher": {"cpu/latency_ms": 1.5}}}
    assert renamed[3:] == scored


def test_a_timing_keeps_its_name_where_it_has_scores() -> None:
    both = [result(name, "rte", 0.7, sha256="t" * 64) for name in ("a", "b")]
    assert [each.name for each in frame.name_alike([*both, speed("b", 20.0, sha256="t" * 64)])] == ["a", "b", "b"]
