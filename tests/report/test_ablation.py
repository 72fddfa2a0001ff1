"""The ablation next to the paper's table 4."""

from distilkit.report import ablation
from scores import ablated, gathered, run


def test_the_ablation_shows_changes_against_the_full_objective_and_compares_signs() -> None:
    runs = [run(name, nll) for name, nll in (("full", 4.0), ("no_ce", 4.25), ("random_init", 5.5))]
    table = ablation.ablation_table(gathered(ablated()), runs)
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
    table = ablation.ablation_table(gathered([]), [run("full", 4.0), run("no_ce", 4.5), run("no_cos", 3.5)])
    assert table is not None
    assert [row[-1] for row in table.rows] == ["-", "yes", "no"]


def test_a_random_init_without_a_full_row_is_no_ablation() -> None:
    assert ablation.ablation_table(gathered([]), [run("distilled", 4.0), run("random_init", 5.0)]) is None
    assert ablation.ablation_row("carefull") is None
    assert ablation.ablation_row("x/no_ce") == ("x/", "no_ce")


def test_rows_of_two_sweeps_are_not_mixed() -> None:
    runs = [run("full", 4.0), run("no_ce", 4.5), run("full", 2.0, folder="b"), run("no_ce", 1.0, folder="b")]
    table = ablation.ablation_table(gathered([]), runs)
    assert table is not None
    assert [row[4] for row in table.rows] == ["-", "+0.500", "-", "-1.000"]
