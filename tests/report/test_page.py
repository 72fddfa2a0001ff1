"""Text for a person: alignment and names of any letters."""

from distilkit.report import page


def test_figures_stand_to_the_right_and_text_to_the_left() -> None:
    rows = [["m", "1,234.5", "1.0 (0.9 to 1.1)", "bert", "9%"], ["n", "-", "+2.00", "-", "1.5e+04"]]
    assert [page.is_figures(rows, column) for column in range(5)] == [False, True, True, False, True]
