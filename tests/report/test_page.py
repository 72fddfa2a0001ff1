"""Text for a person: alignment and names of any letters."""

import io

from rich.console import Console

from distilkit.report import page


def test_figures_stand_to_the_right_and_text_to_the_left() -> None:
    rows = [["m", "1,234.5", "1.0 (0.9 to 1.1)", "bert", "9%"], ["n", "-", "+2.00", "-", "1.5e+04"]]
    assert [page.is_figures(rows, column) for column in range(5)] == [False, True, True, False, True]


def test_brackets_in_a_printed_table_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=80)
    page.print_table("runs of run [v2]", ["model [b]", "score"], [["layers=[0,2] [red]", "1.0"]], console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("runs of run [v2]", "model [b]", "layers=[0,2] [red]"):
        assert text in shown
