"""Tables and plots as a person reads them: on the terminal, as markdown, as one HTML file, as CSV."""

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import rich.box
import rich.table
from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.text import Text

Records = Sequence[Mapping[str, Any]]
Rows = Sequence[Sequence[str]]
Columns = Mapping[str, str]  # keys of records, with heading and format


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text, and ``records``, the same figures unrounded, for its CSV file ``name``.csv.

    ``text`` holds the columns of text; the others hold figures, which stand to the right. ``best`` holds the cells, as
    row and column, that stand out. A ``folded`` table shows when a reader opens it.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    records: Records
    notes: list[str] = field(default_factory=list)
    text: Collection[int] = (0,)
    best: Collection[tuple[int, int]] = ()
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot as a PNG file ``name``.png, and its caption."""

    name: str
    caption: str
    png: bytes


Block = str | Table | Plot  # a page is a title and a sequence of blocks

_MARKDOWN = str.maketrans({each: f"\\{each}" for each in "\\|`~*[]"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def figure(value: Any, form: str = "{:.1f}") -> str:
    """Format a value, a dash for None."""
    return "-" if value is None else form.format(value)


def shown(value: float | None, *, share: bool) -> str:
    """Format a share or a correlation in percent with one decimal, any other number with two decimals."""
    return figure(100 * value if share and value is not None else value, "{:.1f}" if share else "{:,.2f}")


def tabulate(
    name: str, title: str, records: Records, columns: Columns, *notes: str, cells: Records = (), folded: bool = False
) -> Table | None:
    """Build a table, or None without records; ``columns`` maps keys to headings and formats: ``tokens/s {:,.0f}``.

    Without a heading it is the key. ``cells`` are formatted in place of ``records``, if rows differ from the CSV file.
    A column is one of text if a record has text there.
    """
    header = [column.rpartition(" ")[0] or key.replace("_", " ") for key, column in columns.items()]
    forms = {key: column.rpartition(" ")[2] for key, column in columns.items()}
    rows = [[figure(each.get(key), form) for key, form in forms.items()] for each in cells or records]
    text = [place for place, key in enumerate(columns) if any(isinstance(each.get(key), str) for each in records)]
    shared: Any = {"name": name, "title": title, "header": header, "records": records, "notes": [*notes]}
    return Table(**shared, rows=rows, text=text, folded=folded) if rows else None


def markdown(text: str) -> str:
    """Escape the characters with a meaning in markdown or HTML."""
    escaped = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text.translate(_MARKDOWN))  # within a word it is a letter
    return " ".join(escaped.split())


def markdown_table(
    header: Sequence[str], rows: Rows, *, text: Collection[int] = (0,), best: Collection[tuple[int, int]] = ()
) -> str:
    """Write a markdown table; all columns but those of ``text`` are aligned to the right."""
    rule = ["---" if place in text else "---:" for place in range(len(header))]
    lines = [[markdown(cell) for cell in header], rule, *([markdown(cell) for cell in row] for row in rows)]
    for row, column in best:
        lines[row + 2][column] = f"**{lines[row + 2][column]}**"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_table(title: str, header: Sequence[str], rows: Rows, *, console: Console | None = None) -> None:
    """Print a table with all columns but the first aligned to the right."""
    # As texts, in which brackets are no markup.
    table = rich.table.Table(title=Text(title, "table.title"), title_justify="left")
    for index, column in enumerate(header):
        table.add_column(Text(column), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = console or Console()
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if needed > console.width:  # less between columns, and names on two lines
        table.box, table.padding = rich.box.SIMPLE, (0, 0)
        for each in table.columns[1:]:
            each.header = Text(str(each.header).replace("_", "_\n"))
    console.print(table)


def markdown_page(title: str, about: str, blocks: Sequence[Block]) -> str:
    """Write a page in markdown that links to the PNG files of its plots."""
    parts = [f"# {markdown(title)}\n", markdown(about) + "\n"]
    for block in blocks:
        if isinstance(block, Table):
            notes = [markdown(note) + "\n" for note in block.notes]
            rows = markdown_table(block.header, block.rows, text=block.text, best=block.best)
            parts += [f"## {block.title}\n", rows, *notes]
        elif isinstance(block, Plot):
            parts += [f"![{markdown(block.caption)}]({block.name}.png)\n", markdown(block.caption) + "\n"]
        else:
            parts.append(markdown(block) + "\n")
    return "\n".join(parts)


def html_page(title: str, about: str, blocks: Sequence[Block]) -> str:
    """Write a page as one self-contained HTML file: style and plots are embedded, and there is no script."""
    environment = Environment(loader=PackageLoader("distilkit.report", ""), autoescape=True, trim_blocks=True)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    return environment.get_template("page.html.j2").render(title=title, about=about, blocks=blocks)


def write_csv(file: Path, records: Records) -> None:
    """Write records with a column for each key that any of them has."""
    pd.DataFrame(list(records), dtype=object).to_csv(file, index=False)
