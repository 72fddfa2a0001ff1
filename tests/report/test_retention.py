"""What is kept of the teacher: tables, verdicts and points."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilkit.records import Result, Rows
from distilkit.report import quality, retention
from distilkit.report.frame import Scores
from scores import by_row, gathered, glue, perplexity, result, said, with_rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"block_size": 128}}, "block_size (128, not 512)"),
        ({"settings": {"stride": 512}}, "stride (512, not 256)"),
        ({"settings": {"max_tokens": 100}}, "max_tokens (100, not None)"),
        (
            {"settings": {"scored_data": "91c0"}},
            "scored_data (91c0, not 5f2d)",
        ),
        ({"details": {"words": 500}}, "words (500, not 700)"),
    ],
)
def test_perplexities_that_were_measured_in_different_ways_are_no_share(changes: dict[str, Any], said: str) -> None:
    given = [*glue(seeds=[1]), perplexity("bert", 16.0), perplexity("student", 20.0, **changes)]
    given.append(perplexity("baseline", 32.0))
    table = retention.retention_table(gathered(given))
    assert table is not None
    assert [by_row(table)[name]["perplexity"] for name in ("student", "baseline")] == ["-", "50.0"]
    assert table.notes[1] == f"student on perplexity is not compared, because it differs from bert in {said}."


def test_with_different_tokenizers_perplexities_per_word_are_compared_where_there_are_any() -> None:
    cut = {"settings": {"vocabulary": 30_000}, "details": {"text_tokens": 1100}}
    given = [
        perplexity("gpt2", 16.0),
        perplexity("m", 20.0, scores={"perplexity": 20.0, "word_perplexity": 64.0}, **cut),
    ]
    table = retention.retention_table(gathered(given, teacher="gpt2", baseline=None))
    assert table is not None
    assert table.rows == [["m", "50.0"]]  # 32 / 64
    assert table.notes[1] == "m on perplexity: by the perplexity per word, because its tokenizer is not that of gpt2."
    masked = [perplexity("gpt2", 16.0, task="pseudo_perplexity", scores={"pseudo_perplexity": 16.0})]
    masked.append(perplexity("m", 20.0, task="pseudo_perplexity", scores={"pseudo_perplexity": 20.0}, **cut))
    assert retention.retention_table(gathered(masked, teacher="gpt2", baseline=None)) is None
    said = retention.nothing_kept(gathered(masked, teacher="gpt2", baseline=None))
    assert said is not None
    assert said.endswith("it differs from gpt2 in text_tokens (1100, not 900), vocabulary (30000, not 50257).")


def test_what_is_kept_is_a_share_of_the_teachers_score_and_of_its_average() -> None:
    table = retention.retention_table(gathered(glue()))
    rows = by_row(table)
    assert list(rows) == ["student", "baseline"]
    assert rows["student"]["CoLA"] == "91.1"  # 51 / 56
    assert rows["student"]["WNLI"] == "105.7"  # 56 / 53
    assert rows["student"]["GLUE average"] == "96.9"  # 689 / 711
    assert rows["baseline"]["GLUE average"] == "89.2"  # 634 / 711
    assert table is not None
    (line,) = retention.verdicts(gathered(glue()))
    assert line == (
        "On the GLUE average student keeps 96.9 % of bert, and baseline, which was trained without a teacher, 89.2 %: no "
        "verdict, because there are no rows files of the same rows."
    )


Shares = dict[str, tuple[float, ...]]


def on_sst2(folder: Path, shares: Shares, **fields: Any) -> Scores:
    """Score rows of SST-2, of which each model says a share right; shares of further seeds follow."""
    results = [
        with_rows(folder, name, "sst2", said(share, seed=100 * index + seed), seed=seed, **fields.get(name, {}))
        for index, (name, own) in enumerate(shares.items())
        for seed, share in enumerate(own, 1)
    ]
    return gathered(results)


def verdict_of(scores: Scores) -> str:
    (line,) = retention.verdicts(scores)
    return line.partition(" %: ")[2]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (
            {"student": (0.85,) * 3, "baseline": (0.75,) * 3},
            r"student keeps more, \[\+[89]\.\d, \+1\d\.\d\] points \(3 seeds\)\.",
        ),
        (
            {"student": (0.75,) * 3, "baseline": (0.85,) * 3},
            r"baseline keeps more, \[-1\d\.\d, -[89]\.\d\] points \(3 seeds\)\.",
        ),
        (
            {"student": (0.80,) * 3, "baseline": (0.80,) * 3},
            r"no difference shown, \[-\d\.\d, \+\d\.\d\] points \(3 seeds\)\.",
        ),
        ({"student": (0.9, 0.7), "baseline": (0.6, 0.8)}, r"no difference shown, .* \(2 seeds\)\."),  # they spread
        (
            {"student": (0.85,), "baseline": (0.75,)},
            r"\[\+8\.\d, .*\] points over rows, but no verdict, because 1 seed",
        ),
        ({"student": (0.80,), "baseline": (0.80,)}, r"no difference shown, .* \(1 seed\)\."),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(shares: Shares, said: str, tmp_path: Path) -> None:
    assert re.match(said, verdict_of(on_sst2(tmp_path, {"bert": (0.9,) * 3, **shares})))


@pytest.mark.parametrize("seeds", [1, 3])
def test_two_seeds_of_one_model_as_two_models_are_no_difference(seeds: int, tmp_path: Path) -> None:
    drawn = np.random.default_rng(3).normal(0.8, 0.02, size=(2, seeds))  # seeds that spread by 2 points
    shares = {"bert": (0.9,) * seeds, "student": tuple(drawn[0]), "baseline": tuple(drawn[1])}
    assert "keeps more" not in verdict_of(on_sst2(tmp_path, shares))


def test_there_is_no_verdict_between_models_that_were_fine_tuned_differently(tmp_path: Path) -> None:
    one = {"epochs": 1, "lr": 5e-5, "max_length": 128, "precision": "32-true"}
    other = {"epochs": 10, "lr": 2e-5, "max_length": 256, "precision": "bf16-mixed"}
    fields = {name: {"settings": own} for name, own in (("bert", one), ("student", other), ("baseline", one))}
    scores = on_sst2(tmp_path, {"bert": (0.9,) * 3, "student": (0.85,) * 3, "baseline": (0.7,) * 3}, **fields)
    assert verdict_of(scores) == (
        "no verdict, because they were fine-tuned or scored differently (epochs, lr, max_length, precision)."
    )
    table = retention.retention_table(scores)
    assert table is not None
    assert table.notes[-1] == (
        "student was fine-tuned or scored differently from bert: epochs (10, not 1), lr (2e-05, not 5e-05), max_length (256, not "
        "128), precision (bf16-mixed, not 32-true)."
    )
    less = {name: row["minus the teacher"] for name, row in by_row(retention.summary_table(scores)).items()}
    assert less["student"] == "-" != less["baseline"]


def test_settings_that_were_chosen_from_the_same_grid_are_one_protocol(tmp_path: Path) -> None:
    results = [
        with_rows(
            tmp_path / str(lr),
            name,
            "sst2",
            said(share + lr, seed=seed),
            seed=seed,
            settings={"lr": lr},
            held_out=held_out,
        )
        for name, share, best in (("bert", 0.9, 0.01), ("student", 0.8, 0.02), ("baseline", 0.7, 0.02))
        for lr in (0.01, 0.02)
        for held_out in [0.5 + (lr == best)]
        for seed in (1, 2, 3)
    ]
    assert verdict_of(gathered(results)).startswith("student keeps more")


def test_what_is_kept_has_an_interval_and_says_which_rows_are_at_chance(tmp_path: Path) -> None:
    scores = on_sst2(tmp_path, {"bert": (0.9,) * 3, "student": (0.81,) * 3, "baseline": (0.6,) * 3})
    table = retention.retention_table(scores)
    assert table is not None
    cells = [row[1] for row in table.rows]
    assert re.fullmatch(r"90\.\d ± \d\.\d", cells[0])
    assert table.notes[1] == "Not shown to be above the majority class or no correlation: baseline on SST-2."
    record = table.records[0]
    assert record["low"] < record["percent"] < record["high"]


def test_nothing_is_kept_of_a_teacher_that_is_not_above_chance(tmp_path: Path) -> None:
    def collapsed(name: str) -> Result:
        right = said(0.8, seed=1)
        rows = Rows(ids=right.ids, gold=right.gold, said=np.ones(1000, int))
        return with_rows(tmp_path, name, "cola", rows, names=["matthews"])

    scores = gathered([collapsed(name) for name in ("bert", "student", "baseline")])
    rows = by_row(quality.quality_table(scores))
    assert {row["CoLA"] for row in rows.values()} == {"0.0 ± 0.0", "0.0"}
    assert list(rows)[-1] == "majority class or no correlation"
    assert retention.retention_table(scores) is None
    assert retention.verdicts(scores) == []
    kept = retention.nothing_kept(scores)
    assert kept is not None
    assert (
        "majority class or no correlation: bert on CoLA; student on CoLA; baseline on CoLA. Nothing is kept of bert"
        in kept
    )


def test_an_average_leaves_out_tasks_on_which_the_teacher_is_at_chance(tmp_path: Path) -> None:
    results = []
    for name, share in (("bert", 0.9), ("student", 0.8), ("baseline", 0.7)):
        results += [with_rows(tmp_path, name, task, said(share, seed=1)) for task in ("sst2", "qnli")]
        right = said(0.5, seed=2)
        collapsed = Rows(ids=right.ids, gold=right.gold, said=np.ones(1000, int))
        results.append(with_rows(tmp_path, name, "cola", collapsed, names=["matthews"]))
    scores = gathered(results)
    assert scores.columns == {"average of 2 tasks": ("sst2", "qnli")}
    assert scores.tasks == ["cola", "qnli", "sst2"]


def test_metrics_of_probabilities_have_a_score_of_chance(tmp_path: Path) -> None:
    right, rng = said(0.8, seed=1), np.random.default_rng(3)
    rows = dataclasses.replace(right, logits=rng.normal(size=(1000, 2)).astype(np.float16))
    results = [with_rows(tmp_path, name, "rte", rows, names=["roc_auc"]) for name in ("bert", "student")]
    results += [with_rows(tmp_path, name, "qnli", rows, names=["neg_log_loss"]) for name in ("bert", "student")]
    scores, share = gathered(results), float(np.mean(right.gold == 1))
    assert scores.chance(["rte"]) == 0.5
    assert scores.chance(["qnli"]) == pytest.approx(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert scores.kept("student", "rte") is None


def test_a_metric_that_is_not_defined_on_some_draws_has_no_interval(tmp_path: Path) -> None:
    right = said(0.8, seed=1)
    rows = dataclasses.replace(right, gold=(right.ids == 7).astype(int))  # most draws lack one row or another
    scores = gathered([with_rows(tmp_path, "bert", "rte", rows, names=["roc_auc"])])
    assert scores.interval("bert", ["rte"]) is None
    why = "bert on RTE without interval, because it is not defined on each draw of its rows."
    assert why in quality.interval_notes(scores)


def test_a_result_without_rows_or_metrics_has_no_interval() -> None:
    bare = gathered([result(name, "rte", 0.6, scores={}) for name in ("bert", "student")])
    assert bare.interval("bert", ["rte"]) is None
    assert bare.chance(["rte"]) is None
    assert bare.kept("student", "rte") == 100


def test_rows_that_do_not_give_the_recorded_score_give_no_interval(tmp_path: Path) -> None:
    made = with_rows(tmp_path, "bert", "sst2", said(0.9, seed=1))
    scores = gathered([dataclasses.replace(made, scores={"accuracy": 0.5}, score=0.5)])
    assert scores.interval("bert", ["sst2"]) is None
    (note,) = quality.interval_notes(scores)
    assert re.match(r"bert on SST-2 without interval, because accuracy of its rows is 0\.9\S* and not 0\.5\.", note)


def test_models_that_were_scored_on_different_rows_have_no_common_interval(tmp_path: Path) -> None:
    results = [
        with_rows(tmp_path, "bert", "sst2", said(0.9, seed=1)),
        with_rows(tmp_path, "student", "sst2", said(0.8, seed=2)),
    ]
    rows = said(0.7, seed=3)
    results.append(with_rows(tmp_path, "baseline", "sst2", rows.take(np.arange(500))))
    scores = gathered(results)
    assert verdict_of(scores) == "no verdict, because there are no rows files of the same rows."
    table = retention.retention_table(scores)
    assert table is not None
    assert ["±" in row[1] for row in table.rows] == [True, False]


def test_the_summary_has_each_score_what_it_keeps_and_its_difference_to_the_teacher(tmp_path: Path) -> None:
    table = retention.summary_table(
        on_sst2(tmp_path, {"bert": (0.9,) * 3, "student": (0.81,) * 3, "baseline": (0.6,) * 3})
    )
    assert table is not None
    assert table.header == ["model", "SST-2", "kept, %", "minus the teacher"]
    assert [row[0] for row in table.rows] == ["bert (teacher)", "student", "baseline"]
    assert re.fullmatch(r"81\.\d ± \d\.\d", table.rows[1][1])
    assert re.fullmatch(r"90\.\d ± \d\.\d", table.rows[1][2])
    assert re.fullmatch(r"\[-1\d\.\d, -\d\.\d\]", table.rows[1][3])
    assert table.rows[0][2:] == ["-", "-"]
    assert "student keeps more" in table.notes[1] and "1 seed" not in table.notes[0]


def test_the_summary_of_one_seed_says_so(tmp_path: Path) -> None:
    table = retention.summary_table(on_sst2(tmp_path, {"bert": (0.9,) * 3, "student": (0.81,), "baseline": (0.6,)}))
    assert table is not None
    assert table.notes[0].endswith("in points. With 1 seed they are over rows alone.")


def test_a_score_that_is_no_number_has_no_interval_and_says_why(tmp_path: Path) -> None:
    rows = Rows(ids=np.arange(9), gold=np.ones(9, int), said=np.ones(9, int), logits=np.ones((9, 2), np.float16))
    scores = gathered([with_rows(tmp_path, "bert", "rte", rows, names=["roc_auc"])])
    assert "bert on RTE without interval, because a seed has no number." in "\n".join(quality.interval_notes(scores))


def test_the_table_of_fidelity_says_how_often_a_row_says_the_same_as_the_teacher(tmp_path: Path) -> None:
    rows = said(0.9, seed=1)
    scores = gathered([with_rows(tmp_path, "bert", "sst2", rows), with_rows(tmp_path, "student", "sst2", rows)])
    table = retention.fidelity_table(scores)
    assert table is not None
    assert table.rows == [["student", "100.0 (0.000)"]]
    assert retention.fidelity_table(gathered(glue())) is None


@pytest.mark.parametrize("score", [0.0, -0.1])
def test_nothing_is_a_share_of_a_teachers_score_of_zero_or_less(score: float) -> None:
    scores = gathered([result("bert", "cola", score), result("student", "cola", 0.4)])
    assert retention.retention_table(scores) is None


def legend_of(results: list[Result], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Any]]:
    """Return labels and colours of the points of what is kept."""
    found: list[Any] = []
    monkeypatch.setattr(retention, "png", lambda figure: found.append(figure) or b"")
    assert retention.retention_plot(gathered(results)) is not None
    (legend,) = found[0].legends
    points = {str(text.get_text()): line for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    del points["bert (teacher)"]
    return list(points), [each.get_color() for each in points.values()]


def test_the_baseline_has_its_points_however_many_rows_there_are_and_no_colour_is_used_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = [result(f"student{number}", "rte", 0.6) for number in range(12)]
    labels, colours = legend_of([*glue(seeds=[1]), *many], monkeypatch)
    assert labels == ["student", *(f"student{number}" for number in range(5)), "baseline"]
    assert len(set(colours)) == len(colours)


def test_a_verdict_is_over_the_tasks_that_all_three_have() -> None:
    lacking = {"bert": "qnli", "student": "sst2", "baseline": "mrpc"}
    few = ("cola", "rte", "mrpc", "qnli", "sst2")
    given = [each for each in glue() if each.task in few and each.task != lacking[each.name]]
    (line,) = retention.verdicts(gathered(given))
    assert line.startswith("On average of 2 tasks student keeps 88.0 % of bert")  # CoLA and RTE: 110 / 125


def test_a_teacher_of_two_settings_is_not_passed_over_without_a_word() -> None:
    given = [result("bert", "rte", 0.7, settings={"lr": lr}) for lr in (1, 2)] + [result("student", "rte", 0.6)]
    assert retention.retention_table(gathered(given)) is None
    said = retention.nothing_kept(gathered(given))
    assert said is not None
    assert said.startswith("What is kept of bert is left out. bert (lr=1) is one of several settings of bert on RTE")
    assert "set teacher='bert (lr=2)' or remove" in said
    assert retention.nothing_kept(gathered([result("bert", "rte", 0.7)])) is None


def test_a_score_of_zero_counts_in_the_summary() -> None:
    table = retention.summary_table(gathered([result("bert", "cola", 0.5), result("student", "cola", 0.0)]))
    assert table is not None
    assert [row[1:] for row in table.rows] == [["50.0", "-", "-"], ["0.0", "0.0", "-"]]
