"""The rows of a labelled task: from the hub, or from local files in the layouts that GLUE, XNLI and IMDb come in."""

import csv
import json
import logging
import lzma
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec

from distilkit.errors import UserError

log = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubSplit:
    """One split of a data set of the hub, as ``datasets.load_dataset`` takes it."""

    path: str
    name: str | None = None
    split: str
    revision: str | None = None

    def rows(self, *, columns: Sequence[str]) -> Iterator[tuple[str, Row | None]]:
        """Read the rows, each with the words that name its place in an error.

        Raises:
            UserError: the data set cannot be opened, or lacks a column.
        """
        import datasets

        try:
            table = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"cannot open data set {self.path!r} (config {self.name!r}, split {self.split!r}): {reason}; check that the "
                "hub can be reached, or give local files with task.data_dir=<folder>"
            ) from error
        check_columns(columns, table.column_names, where=str(self))
        for index, row in enumerate(table):
            yield f"row {index}", row

    def __str__(self) -> str:
        """Name it for an error."""
        return f"{self.path} ({self.name}, {self.split})"


@dataclass(frozen=True, kw_only=True)
class FileSplit:
    """One file of a task: .tsv, .csv or .jsonl, compressed or not, or a folder with a sub-folder for each label.

    ``file`` is a pattern below the task's folder. ``columns`` maps our names to the file's, ``header`` names the columns
    of a file without a first line of names, and ``where`` keeps the rows that have these values.
    """

    folder: Path
    file: str
    columns: Mapping[str, str] = field(default_factory=dict)
    header: Sequence[str] | None = None
    where: Mapping[str, str] = field(default_factory=dict)

    def path(self) -> Path:
        """Find the file.

        Raises:
            UserError: there is none, or more than one.
        """
        found = sorted(self.folder.glob(self.file))
        if len(found) != 1:
            held = ", ".join(sorted(file.name for file in self.folder.iterdir())) if self.folder.is_dir() else "nothing"
            raise UserError(
                f"{self.folder} has {len(found)} files {self.file!r}, where one is needed; it holds {held}; "
                "set task.data_dir to the folder of the task's files, or of all tasks"
            )
        return found[0]

    def rows(self, *, columns: Sequence[str]) -> Iterator[tuple[str, Row | None]]:
        """Read the rows, each with the words that name its place in an error; None for one that is malformed.

        Raises:
            UserError: there is no such file, or it lacks a column.
        """
        path = self.path()
        if path.is_dir():
            rows = _read_folder(path, columns=columns)
        elif ".jsonl" in path.suffixes:
            rows = self._read_json_lines(path, columns=columns)
        else:
            rows = self._read_table(path, columns=columns)
        try:
            for place, row in rows:
                if row is None or all(str(row.get(name)) == value for name, value in self.where.items()):
                    yield place, row and {name: row.get(self.columns.get(name, name)) for name in columns}
        except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read {path}: {error}; it may be cut short, not UTF-8, or not what its name says"
            ) from error

    def _read_table(self, path: Path, *, columns: Sequence[str]) -> Iterator[tuple[str, Row | None]]:
        commas = ".csv" in path.suffixes
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if commas else csv.QUOTE_NONE  # in GLUE's files a quote is a letter
        with fsspec.open(str(path), "rt", encoding="utf-8-sig", newline="", compression="infer") as stream:
            lines = csv.reader(stream, delimiter="," if commas else "\t", quoting=quoting)
            csv.field_size_limit(2**31 - 1)  # 128 kB by default, less than some reviews
            header = list(self.header) if self.header else next(lines, [])
            check_columns([self.columns.get(name, name) for name in columns], header, where=str(path))
            for fields in lines:
                if fields:  # a blank line is no row
                    fits = len(fields) == len(header)
                    yield f"line {lines.line_num}", dict(zip(header, fields, strict=True)) if fits else None

    def _read_json_lines(self, path: Path, *, columns: Sequence[str]) -> Iterator[tuple[str, Row | None]]:
        with fsspec.open(str(path), "rt", encoding="utf-8-sig", compression="infer") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    row = None
                if number == 1 and isinstance(row, dict):
                    check_columns([self.columns.get(name, name) for name in columns], row, where=str(path))
                yield f"line {number}", row if isinstance(row, dict) else None

    def __str__(self) -> str:
        """Name it for an error."""
        return str(self.path())


def _read_folder(path: Path, *, columns: Sequence[str]) -> Iterator[tuple[str, Row | None]]:
    """Read IMDb's layout: a sub-folder of .txt files for each label; others, as that of unlabelled reviews, are left."""
    if len(columns) != 2:
        raise UserError(f"{path} is a folder of texts, one column, but this task reads {', '.join(columns[:-1])}")
    text, label = columns
    for folder in sorted(item for item in path.iterdir() if item.is_dir() and item.name != "unsup"):
        for file in sorted(folder.glob("*.txt")):
            yield f"{folder.name}/{file.name}", {text: file.read_text("utf-8"), label: folder.name}


def check_columns(wanted: Iterable[str], present: Iterable[str] | None, *, where: str) -> None:
    """Make sure that a table has the columns that a task reads.

    Raises:
        UserError: one is missing.
    """
    present = list(present or [])
    missing = [name for name in wanted if name not in present]
    if missing:
        raise UserError(f"{where} has no column {', '.join(missing)}; it has {', '.join(map(str, present)) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One or two texts, and the id of their class or the number to predict."""

    texts: tuple[str, ...]
    label: float


def read_examples(
    split: HubSplit | FileSplit,
    *,
    texts: Sequence[str],
    label: str,
    labels: Sequence[str] | None,
    aliases: Mapping[str, str],
    skip_malformed: bool,
) -> list[Example]:
    """Read a split, and check each row.

    ``labels`` are the classes in the order of their ids, and None where a number is to be predicted; a row gives the name
    or the id. ``aliases`` maps other names to them.

    Raises:
        UserError: rows are malformed or have unknown labels and are not to be skipped, or no row is left.
    """
    examples, faults, count = [], [], 0
    for place, row in split.rows(columns=[*texts, label]):
        count += 1
        if row is None or any(not isinstance(row[name], str) for name in texts):
            faults.append(f"{place} has not the fields of the others")
            continue
        value = label_of(row[label], labels=labels, aliases=aliases)
        if value is None:
            faults.append(f"{place} has {label} {row[label]!r}, not one of {', '.join(labels or ['a number'])}")
            continue
        examples.append(Example(texts=tuple(row[name] for name in texts), label=value))
    if faults and not skip_malformed:
        raise UserError(
            f"{split}: {len(faults)} of {count} rows cannot be used; the first: {faults[0]}. Mend the file, or go on "
            "without them with task.skip_malformed=true"
        )
    if faults:
        log.warning("%s: %d of %d rows were skipped; the first: %s", split, len(faults), count, faults[0])
    if not examples:
        raise UserError(f"{split} has no row that can be used ({count} were read); check task.data_dir")
    return examples


def label_of(value: Any, *, labels: Sequence[str] | None, aliases: Mapping[str, str]) -> float | None:
    """Return the id of a class, given as its name or id, or the number itself; None where it is neither."""
    if labels is None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        return number if math.isfinite(number) else None
    name = aliases.get(str(value), str(value))
    if name in labels:
        return list(labels).index(name)
    if any(label.isdecimal() for label in labels):  # 1, 2, 3: these are names, and 0 is none of them
        return None
    return int(name) if name.isdecimal() and int(name) < len(labels) else None
