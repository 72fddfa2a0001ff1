"""Text for a person: alignment, what stands out, and what is folded."""

import io

from rich.console import Console

from distilkit.report import page
from distilkit.report.page import Plot


def test_brackets_in_a_printed_table_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=80)
    page.print_table("runs of run [v2]", ["model [b]", "score"], [["layers=[0,2] [red]", "1.0"]], console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("runs of run [v2]", "model [b]", "layers=[0,2] [red]"):
        assert text in shown


def test_a_table_that_is_too_wide_has_less_between_its_columns_and_names_on_two_lines() -> None:
    names, values = ["run", "baseline_time", "random_init"], ["cross-entropy", "1,234,567", "7,654,321"]
    printed = {}
    for width in (80, 36):
        console = Console(file=io.StringIO(), width=width)
        page.print_table("runs", names, [values], console=console)
        printed[width] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "┃ run           ┃ baseline_time ┃ random_init ┃" in printed[80]
    assert [line.split() for line in printed[36][2:4]] == [["baseline_", "random_"], ["run", "time", "init"]]
    assert printed[36][5].split() == values  # none is broken


def test_columns_are_aligned_by_the_type_of_the_records_whatever_their_text() -> None:
    records = [{"model": "6 layers", "layers": "1 2", "score": 1.5}, {"model": "9%", "layers": "-", "score": None}]
    columns = {"model": "{}", "layers": "{}", "score": "{:.1f}", "latency": "ms {}"}
    table = page.tabulate(
        "t", "T", records, columns, cells=[{**each, "latency": "1.0 (0.9 to 1.1)"} for each in records]
    )
    assert table is not None
    assert table.text == [0, 1]
    assert (
        page.markdown_table(table.header, table.rows, text=table.text).splitlines()[1] == "| --- | --- | ---: | ---: |"
    )


def test_the_best_cells_are_bold_folded_tables_open_and_plots_have_captions() -> None:
    rows = [["a", "1.0"], ["b", "2.0"]]
    table = page.Table(name="t", title="Cost", header=["m", "x"], rows=rows, records=[], best={(1, 1)}, folded=True)
    blocks = [table, Plot(name="p", caption="What it shows.", png=b"")]
    html = page.html_page("Title", "the command", blocks)
    assert '<td class="figure"><b>2.0</b></td>' in html
    assert "<details><summary>Cost</summary>" in html
    assert '<figcaption class="note">What it shows.</figcaption>' in html
    assert html.index("the command") < html.index("Cost")
    text = page.markdown_page("Title", "the command", blocks)
    assert "| b | **2.0** |" in text
    assert text.count("What it shows.") == 2  # beside the picture and below it
