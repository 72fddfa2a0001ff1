"""Equal rows: what is said of the distilled row and its baselines, and the scores on tasks beside them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from distilkit.metrics import nats_below
from distilkit.records import Rows, read_rows, read_runs, write_rows
from distilkit.report import runs, versus
from scores import by_row, gathered, perplexity, result, run, said, with_rows, write_run

NLL = {"cut": 6.0, "distilled": 4.5, "baseline": 4.75, "baseline_time": 4.625}
SECONDS = {"cut": 0.0, "distilled": 1800.0, "baseline": 1200.0, "baseline_time": 1790.0}


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Return the four runs of sweep=versus; ``changes`` are their seconds of training."""
    return [run(name, nll, training_seconds={**SECONDS, **changes}[name]) for name, nll in NLL.items()]


def scored(folder: Path, shares: dict[str, float], *, seeds: int = 3) -> list[Any]:
    """Score rows on two tasks, each with as many seeds."""
    return [
        with_rows(folder, name, task, said(share, seed=10 * index + seed), seed=seed)
        for index, (name, share) in enumerate(shares.items())
        for task in ("rte", "stsb")
        for seed in range(1, seeds + 1)
    ]


def test_the_better_row_is_named_at_equal_time_and_at_equal_tokens_and_the_tasks_are_asked_for() -> None:
    assert versus.equal_rows(rows(), gathered([])) == [
        "At equal time (30 min), distilled is better than baseline_time by 0.125 nats of held-out cross-entropy.",
        "At equal tokens, distilled is better than baseline by 0.250 nats of held-out cross-entropy; "
        "distilled took 1.5 times as long.",
        "Held-out scores of the LM loss alone do not decide, tasks do: none is scored; set versus.tasks=[rte].",
    ]


def test_a_baseline_that_wins_is_named_first() -> None:
    some = rows()
    some[3]["after"]["val/nll"] = 4.4
    assert versus.equal_rows(some, gathered([]))[0] == (
        "At equal time (30 min), baseline_time is better than distilled by 0.100 nats of held-out cross-entropy."
    )


def test_a_difference_has_an_interval_over_the_held_out_blocks_of_both_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens, noise = rng.integers(5, 20, 400).astype(float), rng.normal(size=400)
    some = rows()
    for row in some:
        row["folder"] = str(tmp_path / row["label"])
        sums = {"tokens": tokens, "nll": tokens * row["after"]["val/nll"] + noise * len(row["label"])}
        write_rows(Path(row["folder"]), "val", Rows(ids=np.arange(400), sums=sums))
    draws = rng.integers(0, 400, (4000, 400))  # a bootstrap over blocks
    names = len("baseline_time") - len("distilled")
    gaps = (tokens * 0.125 + noise * names)[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    half = (np.quantile(gaps, 0.975) - np.quantile(gaps, 0.025)) / 2
    found = nats_below(*(read_rows(row["folder"], "val") for row in (some[3], some[1])))
    assert found == pytest.approx((0.125 + noise.sum() * names / tokens.sum(), half), rel=0.06)
    first, second, _ = versus.equal_rows(some, gathered([]))
    assert re.search(r"by 0\.125 ± 0\.03\d nats of held-out cross-entropy\.$", first)
    assert "by 0.250 ± 0.00" in second
    some[3]["after"]["val/nll"] = 4.51
    assert versus.equal_rows(some, gathered([]))[0].endswith("nats of held-out cross-entropy (no clear difference).")
    write_rows(tmp_path / "distilled", "val", Rows(ids=np.arange(1, 401), sums=sums))  # on other text
    assert "±" not in versus.equal_rows(some, gathered([]))[0]


def test_times_that_differ_give_no_verdict_at_equal_time() -> None:
    first, *_ = versus.equal_rows(rows(baseline_time=7300.0), gathered([]))
    assert first == ("There is no verdict at equal time: distilled trained for 30 min, baseline_time for 2.03 h.")


def test_tokens_that_differ_give_no_verdict_at_equal_tokens() -> None:
    some = rows()
    some[1]["tokens_seen"] = 1_000_000
    some[2]["tokens_seen"] = 1_200_000
    assert versus.equal_rows(some, gathered([]))[1] == (
        "There is no verdict at equal tokens: one row was trained on 1,000,000, the other on 1,200,000."
    )


@pytest.mark.parametrize("missing", [["distilled"], ["baseline", "baseline_time"]])
def test_without_two_rows_to_compare_nothing_is_said(missing: list[str]) -> None:
    assert versus.equal_rows([each for each in rows() if each["label"] not in missing], gathered([])) == []


def test_a_failed_row_leaves_what_can_be_said_of_the_others() -> None:
    lines = versus.equal_rows([each for each in rows() if each["label"] != "baseline_time"], gathered([]))
    assert [line.partition(",")[0] for line in lines] == [
        "At equal tokens",
        "Held-out scores of the LM loss alone do not decide",
    ]


def test_tasks_decide_between_the_rows_of_equal_time(tmp_path: Path) -> None:
    shares = {"teacher": 0.85, "cut": 0.6, "distilled": 0.80, "baseline": 0.90, "baseline_time": 0.72}
    last = versus.equal_rows(rows(), gathered(scored(tmp_path, shares), teacher="teacher"))[-1]
    assert last.startswith("Held-out scores of the LM loss alone do not decide, tasks do: On average of 2 tasks ")
    assert "distilled keeps 94.1 % of teacher, and baseline_time, which was trained without a teacher, 84.7 %" in last
    assert "distilled keeps more" in last and last.endswith("points (3 seeds).")
    assert "cut" not in last


def test_one_seed_of_fine_tuning_gives_no_verdict(tmp_path: Path) -> None:
    shares = {"teacher": 0.85, "distilled": 0.80, "baseline_time": 0.72}
    last = versus.equal_rows(rows(), gathered(scored(tmp_path, shares, seeds=1), teacher="teacher"))[-1]
    assert "no verdict, because 1 seed does not tell how seeds spread" in last


def test_tasks_without_a_row_to_compare_with_show_nothing(tmp_path: Path) -> None:
    last = versus.equal_rows(rows(), gathered(scored(tmp_path, {"teacher": 0.85, "cut": 0.8}), teacher="teacher"))[-1]
    assert last.endswith("tasks do: they show nothing, for a row is missing or the teacher at chance.")


def test_tasks_join_the_runs_as_medians_over_seeds_with_the_share_that_is_kept(tmp_path: Path) -> None:
    shares = {"teacher": 0.8, "cut": 0.5, "distilled": 0.6}
    results = [
        result(name, task, share + shift, seed=seed, kind="finetuned")
        for name, share in shares.items()
        for task in ("sst2", "rte")
        for seed, shift in ((1, -0.1), (2, 0.0), (3, 0.02))
    ]
    results += [perplexity("cut", 1234.5)]
    columns, records = versus.task_columns(gathered(results, teacher="teacher"), rows()[:3])
    assert list(columns.items()) == [
        ("rte", "RTE {:.1f}"),
        ("sst2", "SST-2 {:.1f}"),
        ("perplexity", "perplexity {:,.2f}"),
        ("kept", "kept, % {:.1f}"),
    ]
    assert records[0] == pytest.approx({"rte": 50.0, "sst2": 50.0, "perplexity": 1234.5, "kept": 62.5})
    assert records[1] == pytest.approx({"rte": 60.0, "sst2": 60.0, "kept": 75.0})
    assert records[2] == {}  # the baseline was not scored
    some = [each for each in results if (each.name, each.task) != ("distilled", "sst2")]
    some = [
        dataclasses.replace(each, score=each.score / 2) if each.task == "sst2" and each.name == "cut" else each
        for each in some
    ]
    _, records = versus.task_columns(gathered(some, teacher="teacher"), rows()[:2])
    assert [each["kept"] for each in records] == pytest.approx([62.5, 75.0])  # of the task that both have


def test_scores_of_labels_that_repeat_are_left_out() -> None:
    two = [run("distilled", 4.0), run("distilled", 5.0, folder="b")]
    assert versus.task_columns(gathered([result("distilled", "rte", 0.6)]), two) == ({}, [{}, {}])


def test_the_teacher_is_a_row_where_all_runs_were_scored_beside_the_same_one() -> None:
    teacher = {"teacher": {"name": "t"}, "teacher_parameters": 5000}
    two = [run(name, 4.0, **teacher) for name in ("cut", "distilled")]
    for each in two:
        each["after"] |= {"val/teacher_nll": 3.5, "val/teacher_accuracy": 0.5}
    header, (first, *others) = runs.comparison_table(two, gathered([]))
    cells = dict(zip(header, first, strict=True))
    assert (cells["run"], cells["parameters"], cells["tokens seen"]) == ("teacher", "5,000", "-")
    assert (cells["cross-entropy"], cells["accuracy"], cells["untrained"]) == ("3.500", "0.500", "-")
    assert [row[0] for row in others] == ["cut", "distilled"]
    assert len(versus.with_teacher([*two, run("teacher", 3.5)])) == 3  # a demo trains its own
    two[1]["after"]["val/teacher_nll"] = 3.6  # on other text
    assert len(versus.with_teacher(two)) == 2


def test_the_comparison_of_equal_rows_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for order, (name, nll) in enumerate(NLL.items()):
        after = {"val/nll": nll, "val/accuracy": 0.4, "val/teacher_nll": 4.0, "val/teacher_accuracy": 0.5}
        more: Any = {"teacher": {"name": "t"}, "teacher_parameters": 12_345_678, "training_seconds": SECONDS[name]}
        write_run(tmp_path, name, [f"+sweep/versus={name}", "a=1"], order=order, after=after, **more)
    scored(tmp_path / "scores", {"teacher": 0.85, "cut": 0.6, "distilled": 0.8, "baseline_time": 0.72})
    runs.compare(tmp_path, latency=False, failed=["job 2 failed: x"])
    printed = capsys.readouterr().out
    table = printed.partition("At equal time")[0].splitlines()
    assert max(map(len, table)) <= 80
    cells = {words[0]: words[1:] for line in table if (words := line.split())}
    assert cells["run"] == ["teacher", "cut", "distilled", "baseline", "time"]
    assert cells["minutes"] == ["-", "0.00", "30.00", "20.00", "29.83"]
    assert cells["cross-entropy"] == ["4.000", "6.000", "4.500", "4.750", "4.625"]
    assert cells["RTE"] == ["85.0", "60.0", "80.0", "-", "72.0"]
    assert cells["kept,"] == ["%", "100.0", "70.6", "94.1", "-", "84.7"]
    assert "distilled keeps 94.1 % of teacher" in printed
    picture = (matplotlib.image.imread(tmp_path / "comparison.png")[..., :3] * 255).round()
    assert np.all(picture == [127, 127, 127], axis=-1).sum() > 1000  # the teacher's bars
    written = (tmp_path / "comparison.md").read_text("utf-8")
    assert "| baseline_time | 1,234,567 |" in written
    assert written.index("At equal time (30 min), distilled is better") < written.index("job 2 failed: x")
    verdict = json.loads((tmp_path / "comparison.json").read_text("utf-8"))["verdict"]
    assert [line.partition(",")[0] for line in verdict[:2]] == ["At equal time (30 min)", "At equal tokens"]
    section = runs.training_table(read_runs(tmp_path), gathered([]))
    assert section is not None and section.notes[1:3] == verdict[:2]
    assert by_row(section)["distilled"]["hours"] == "0.50"


def test_long_trainings_are_shown_in_hours() -> None:
    header, table = runs.comparison_table(rows(distilled=36_000.0), gathered([]))
    assert [row[header.index("hours")] for row in table] == ["0.00", "10.00", "0.33", "0.50"]


def test_the_section_on_training_runs_has_the_tasks_of_each_row(tmp_path: Path) -> None:
    results = scored(tmp_path, {"teacher": 0.85, "distilled": 0.8})
    table = by_row(runs.training_table(rows(), gathered(results, teacher="teacher")))
    assert [table["distilled"][name] for name in ("RTE", "STS-B", "kept, %")] == ["80.0", "80.0", "94.1"]
    assert table["cut"]["RTE"] == "-"


def test_what_several_sweeps_show_is_told_apart_without_tasks_whose_rows_are_not_known(tmp_path: Path) -> None:
    results = scored(tmp_path, {"teacher": 0.85, "distilled": 0.8, "baseline_time": 0.72})
    both = [{**row, "folder": f"outputs/{sweep}/{row['label']}"} for sweep in ("one", "two") for row in rows()]
    section = runs.training_table(both, gathered(results, teacher="teacher"))
    assert section is not None
    starts = [line.partition(",")[0] for line in section.notes[1:5]]
    assert starts == [
        f"{name}: {said}" for name in ("one", "two") for said in ("At equal time (30 min)", "At equal tokens")
    ]
    assert not any("tasks do" in line for line in section.notes)
