"""Tables and plots as a person reads them: on the terminal, as markdown, as one HTML file, as CSV."""

import base64
import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich.table
from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.text import Text

Records = Sequence[Mapping[str, Any]]
Rows = Sequence[Sequence[str]]
Columns = Mapping[str, str]  # keys of records, with heading and format


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text, and ``records``, the same figures unrounded, for its CSV file ``name``.csv."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    records: Records
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot as a PNG file ``name``.png, and its caption."""

    name: str
    caption: str
    png: bytes


Block = str | Table | Plot  # a page is a title and a sequence of blocks

_FIGURE = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?[%*x]?( .*)?|-|\+?nan")
_MARKDOWN = str.maketrans({each: f"\\{each}" for each in "\\|`~*[]"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def figure(value: Any, form: str = "{:.1f}") -> str:
    """Format a value, a dash for None."""
    return "-" if value is None else form.format(value)


def shown(value: float | None, *, share: bool) -> str:
    """Format a share or a correlation in percent with one decimal, any other number with two decimals."""
    return figure(100 * value if share and value is not None else value, "{:.1f}" if share else "{:,.2f}")


def formatted(records: Records, columns: Columns) -> list[list[str]]:
    """Format records as rows; ``columns`` maps their keys to format strings, which may follow a heading."""
    forms = {key: column.rpartition(" ")[2] for key, column in columns.items()}
    return [[figure(record.get(key), form) for key, form in forms.items()] for record in records]


def tabulate(
    name: str, title: str, records: Records, columns: Columns, *notes: str, cells: Records = ()
) -> Table | None:
    """Build a table, or None without records; ``columns`` maps keys to headings and formats: ``tokens/s {:,.0f}``.

    Without a heading it is the key. ``cells`` are formatted in place of ``records``, if rows differ from the CSV file.
    """
    header = [column.rpartition(" ")[0] or key.replace("_", " ") for key, column in columns.items()]
    rows = formatted(cells or records, columns)
    return Table(name=name, title=title, header=header, rows=rows, records=records, notes=[*notes]) if rows else None


def is_figures(rows: Rows, column: int) -> bool:
    """Return whether a column holds figures only, which are aligned to the right."""
    return all(_FIGURE.fullmatch(row[column]) for row in rows)


def markdown(text: str) -> str:
    """Escape the characters with a meaning in markdown or HTML."""
    escaped = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text.translate(_MARKDOWN))  # within a word it is a letter
    return " ".join(escaped.split())


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """Write a markdown table with columns of figures aligned to the right."""
    rule = ["---:" if is_figures(rows, column) else "---" for column in range(len(header))]
    lines = [[markdown(text) for text in header], rule, *([markdown(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_table(title: str, header: Sequence[str], rows: Rows, *, console: Console | None = None) -> None:
    """Print a table with columns of figures aligned to the right."""
    # As texts, in which brackets are no markup.
    table = rich.table.Table(title=Text(title, "table.title"), title_justify="left")
    for index, column in enumerate(header):
        table.add_column(Text(column), justify="right" if is_figures(rows, index) else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    (console or Console()).print(table)


def markdown_page(title: str, blocks: Sequence[Block]) -> str:
    """Write a page in markdown that links to the PNG files of its plots."""
    parts = [f"# {markdown(title)}\n"]
    for block in blocks:
        if isinstance(block, Table):
            notes = [markdown(note) + "\n" for note in block.notes]
            parts += [f"## {block.title}\n", markdown_table(block.header, block.rows), *notes]
        elif isinstance(block, Plot):
            parts.append(f"![{markdown(block.caption)}]({block.name}.png)\n")
        else:
            parts.append(markdown(block) + "\n")
    return "\n".join(parts)


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """Write a page as one self-contained HTML file: style and plots are embedded, and there is no script."""
    environment = Environment(loader=PackageLoader("distilkit.report", ""), autoescape=True, trim_blocks=True)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    environment.filters["figures"] = lambda rows: [is_figures(rows, column) for column in range(len(rows[0]))]
    return environment.get_template("page.html.j2").render(title=title, blocks=blocks)


def write_csv(file: Path, records: Records) -> None:
    """Write records with a column for each key that any of them has."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, dict.fromkeys(name for record in records for name in record))
        writer.writeheader()
        writer.writerows(records)
