"""The ablation next to the paper's table 4."""

from pathlib import Path

from distilkit.report import ablation
from scores import ablated, by_row, gathered, run, said, with_rows


def test_the_ablation_shows_changes_against_the_full_objective() -> None:
    runs = [run(name, nll) for name, nll in (("full", 4.0), ("no_ce", 4.25), ("random_init", 5.5))]
    table = ablation.ablation_table(gathered(ablated()), runs)
    assert table is not None
    assert table.rows == [
        ["full", "70.0", "-", "4.000", "-", "-", "-"],
        ["no_ce", "66.0", "-4.00", "4.250", "+0.250", "-2.96", "no interval"],
        ["no_mlm", "71.0", "+1.00", "-", "-", "-0.31", "no interval"],
        ["no_cos", "69.0", "-1.00", "-", "-", "-1.46", "no interval"],
        ["random_init", "60.0", "-10.00", "5.500", "+1.500", "-3.69", "no interval"],
    ]


def test_a_change_is_one_where_its_interval_excludes_zero_and_is_held_against_the_published_one(tmp_path: Path) -> None:
    shares = {"full": 0.80, "no_ce": 0.77, "no_mlm": 0.80, "no_cos": 0.60}
    results = [
        with_rows(tmp_path, f"tiny/{name}", "sst2", said(share, seed=10 * index + seed, size=2000), seed=seed)
        for index, (name, share) in enumerate(shares.items())
        for seed in (1, 2, 3)
    ]
    rows = by_row(ablation.ablation_table(gathered(results), []))
    verdicts = {name: row["95 % interval of the change"] for name, row in rows.items()}
    assert verdicts == {
        "full": "-",
        "no_ce": "a difference; holds the published",  # -2.96
        "no_mlm": "no difference shown; holds the published",  # -0.31
        "no_cos": "a difference; excludes the published",  # -1.46
    }
    assert rows["no_cos"]["change"].startswith("-20.")
    assert " ± " in rows["no_cos"]["change"]


def test_without_scores_there_is_the_change_of_the_cross_entropy_alone() -> None:
    table = ablation.ablation_table(gathered([]), [run("full", 4.0), run("no_ce", 4.5), run("no_cos", 3.5)])
    assert table is not None
    assert [row[4:] for row in table.rows] == [["-", "-", "-"], ["+0.500", "-2.96", "-"], ["-0.500", "-1.46", "-"]]


def test_a_random_init_without_a_full_row_is_no_ablation() -> None:
    assert ablation.ablation_table(gathered([]), [run("distilled", 4.0), run("random_init", 5.0)]) is None
    assert ablation.ablation_row("carefull") is None
    assert ablation.ablation_row("x/no_ce") == ("x/", "no_ce")


def test_rows_of_two_sweeps_are_not_mixed() -> None:
    runs = [run("full", 4.0), run("no_ce", 4.5), run("full", 2.0, folder="b"), run("no_ce", 1.0, folder="b")]
    table = ablation.ablation_table(gathered([]), runs)
    assert table is not None
    assert [row[4] for row in table.rows] == ["-", "+0.500", "-", "-1.000"]
