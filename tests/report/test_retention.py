"""What is kept of the teacher: table, verdicts and bars."""

from typing import Any

import pytest

from distilkit.records import Result
from distilkit.report import retention
from scores import by_row, gathered, glue, perplexity, result


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
    assert said.endswith("it differs from gpt2 in vocabulary (30000, not 50257), text_tokens (1100, not 900).")


def test_what_is_kept_is_a_share_of_the_teachers_score_and_of_its_average() -> None:
    table = retention.retention_table(gathered(glue()))
    rows = by_row(table)
    assert list(rows) == ["student", "baseline"]
    assert rows["student"]["CoLA"] == "91.1"  # 51 / 56
    assert rows["student"]["WNLI"] == "105.7"  # 56 / 53
    assert rows["student"]["GLUE average"] == "96.9"  # 689 / 711
    assert rows["baseline"]["GLUE average"] == "89.2"  # 634 / 711
    assert table is not None
    assert table.notes[1] == (
        "On the GLUE average student keeps 96.9 % of bert. baseline, which was trained without a teacher, keeps 89.2 %: student "
        "keeps more, by 7.7 points."
    )


def test_the_verdict_names_the_baseline_where_it_keeps_more() -> None:
    scores = gathered([result("bert", "rte", 0.8), result("student", "rte", 0.4), result("baseline", "rte", 0.6)])
    (line,) = retention.verdicts(scores)
    assert line.startswith("On RTE student keeps 50.0 % of bert")
    assert line.endswith("baseline keeps more, by 25.0 points.")


@pytest.mark.parametrize("score", [0.0, -0.1])
def test_nothing_is_a_share_of_a_teachers_score_of_zero_or_less(score: float) -> None:
    scores = gathered([result("bert", "cola", score), result("student", "cola", 0.4)])
    assert retention.retention_table(scores) is None


def legend_of(results: list[Result], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Any]]:
    """Return labels and colours of the bars of what is kept."""
    found: list[Any] = []
    monkeypatch.setattr(retention, "png", lambda figure: found.append(figure) or b"")
    assert retention.retention_plot(gathered(results)) is not None
    bars = found[0].axes[0].containers
    return [each.get_label() for each in bars], [each.patches[0].get_facecolor() for each in bars]


def test_the_baseline_has_its_bars_however_many_rows_there_are_and_no_colour_is_used_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = [result(f"student{number}", "rte", 0.6) for number in range(12)]
    labels, colours = legend_of([*glue(seeds=[1]), *many], monkeypatch)
    assert labels == ["student", *(f"student{number}" for number in range(5)), "baseline", "DistilBERT (published)"]
    assert len(set(colours)) == len(colours)


def test_published_bars_have_the_names_of_the_published_students(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [each for name in ("bert", "student") for each in (perplexity(name, 20.0), result(name, "xnli", 0.7))]
    labels, colours = legend_of([*results, *glue(seeds=[1])], monkeypatch)
    assert labels[2:] == ["DistilBERT (published)", "DistilmBERT (published)", "DistilGPT2 (published)"]
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
