"""Tables and plots as a person sees them: on the terminal, as markdown, a self-contained HTML page, CSV."""

import base64
import csv
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as it is shown, and ``records``, the same figures unrounded, for its CSV file ``name``.csv."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    records: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot as a PNG file ``name``.png, and what it shows in words."""

    name: str
    caption: str
    png: bytes


Block = str | Table | Plot  # a page is a title and blocks of these, one below the other

_FIGURE = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?[%*x]?( .*)?|-|\+?nan")
_MARKDOWN = str.maketrans({each: f"\\{each}" for each in "\\|`~*[]"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0 0.5rem; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; }
.figure { text-align: right; white-space: nowrap; }
.note { font-size: 0.85rem; color: #555; margin: 0.2rem 0; }
img { max-width: 100%; }
"""


def is_figures(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Tell whether a column holds figures, which stand to the right."""
    return all(_FIGURE.fullmatch(row[column]) for row in rows)


def markdown(text: str) -> str:
    """Escape what markdown or HTML would read as more than text."""
    escaped = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text.translate(_MARKDOWN))  # within a word it is a letter
    return " ".join(escaped.split())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a markdown table: text to the left, figures to the right."""
    rule = ["---:" if is_figures(rows, column) else "---" for column in range(len(header))]
    lines = [[markdown(text) for text in header], rule, *([markdown(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, console: Console | None = None
) -> None:
    """Print a table with its columns of figures to the right."""
    table = rich.table.Table(title=title, title_justify="left")
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if is_figures(rows, index) else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    (console or Console()).print(table)


def markdown_page(title: str, blocks: Sequence[Block]) -> str:
    """Write a page in markdown; plots are links to the files beside it."""
    parts = [f"# {markdown(title)}\n"]
    for block in blocks:
        if isinstance(block, Table):
            parts += [f"## {block.title}\n", markdown_table(block.header, block.rows)]
            parts += [markdown(note) + "\n" for note in block.notes]
        elif isinstance(block, Plot):
            parts.append(f"![{markdown(block.caption)}]({block.name}.png)\n")
        else:
            parts.append(markdown(block) + "\n")
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    kinds = [' class="figure"' if is_figures(table.rows, column) else "" for column in range(len(table.header))]

    def line(tag: str, cells: Sequence[str]) -> str:
        filled = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(filled)}</tr>"

    body = "\n".join(line("td", row) for row in table.rows)
    notes = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    head = f"<h2>{html.escape(table.title)}</h2>\n"
    return f'{head}<div class="wide"><table>\n{line("th", table.header)}\n{body}\n</table></div>\n{notes}'


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """Write one HTML file that needs no other: the style and the plots are in it, and there is no script."""
    parts = []
    for block in blocks:
        if isinstance(block, Table):
            parts.append(_html_table(block))
        elif isinstance(block, Plot):
            picture = base64.b64encode(block.png).decode("ascii")
            parts.append(f'<p><img alt="{html.escape(block.caption)}" src="data:image/png;base64,{picture}"></p>')
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    name = html.escape(title)
    head = f'<meta charset="utf-8">\n<title>{name}</title>\n<style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{name}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def write_csv(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records with a column for each key that one of them has."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, dict.fromkeys(name for record in records for name in record))
        writer.writeheader()
        writer.writerows(records)
