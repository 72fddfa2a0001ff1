"""Labelled examples from the hub, or from local files in the layouts of GLUE, XNLI and IMDb."""

import hashlib
import json
import logging
import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from distilkit.data.json_lines import json_rows
from distilkit.data.table_files import delimited_rows, open_text
from distilkit.errors import UserError

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
E = TypeVar("E")


class ReadsRows(Protocol):
    """A task that reads examples to train on and, by split, to score."""

    def train_examples(self) -> list[Any]:
        """Read the training split."""

    def scored_examples(self) -> dict[str, list[Any]]:
        """Read the splits that are scored, by name."""


@dataclass(frozen=True, kw_only=True)
class HubSplit:
    """One split of a data set on the hub, as ``datasets.load_dataset`` takes it; ``columns`` maps our names to its."""

    path: str
    name: str | None = None
    split: str
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def rows(self, *, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Read the rows, each with its place for an error message."""
        theirs = {name: self.columns.get(name, name) for name in columns}
        for index, row in enumerate(self.table(columns=list(theirs.values()))):
            yield f"row {index}", {name: row[own] for name, own in theirs.items()}

    def table(self, *, columns: Sequence[str]) -> Any:
        """Load the ``datasets.Dataset``, which has these columns."""
        import datasets

        try:
            table = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"cannot open data set {self.path!r} (config {self.name!r}, split {self.split!r}): {reason}; check the "
                "network, or give local files with task.data_dir=<folder>"
            ) from error
        check_columns(columns, table.column_names, where=str(self))
        return table

    def __str__(self) -> str:
        """Name the split for an error message."""
        return f"{self.path} ({self.name}, {self.split})"


@dataclass(frozen=True, kw_only=True)
class FileSplit:
    """One file of a task: .tsv, .csv or .jsonl, plain or compressed, or a folder with a sub-folder for each label.

    ``file`` is a pattern below the task's folder. ``columns`` maps our names to the file's. ``header`` names the
    columns of a file without a header line. ``where`` keeps the rows that have these values.
    """

    folder: Path
    file: str
    columns: Mapping[str, str] = field(default_factory=dict)
    header: Sequence[str] | None = None
    where: Mapping[str, str] = field(default_factory=dict)

    def path(self) -> Path:
        """Find the file."""
        found = sorted(file for file in self.folder.glob(self.file) if not file.name.startswith("."))
        if len(found) != 1:
            held = ", ".join(sorted(file.name for file in self.folder.iterdir())) if self.folder.is_dir() else "nothing"
            raise UserError(
                f"{self.folder} has {len(found)} files {self.file!r}, but one is needed; it holds {held}; "
                "set task.data_dir to the folder of the task's files, or of all tasks"
            )
        return found[0]

    def rows(self, *, columns: Sequence[str]) -> Iterator[tuple[str, Row | str]]:
        """Read the rows, each with its place for an error message; of a malformed row, what is wrong with it."""
        path = self.path()
        if path.is_dir():
            rows = _read_folder(path, columns=columns)
        else:
            read = self._objects if ".jsonl" in path.name.lower() else self._table
            rows = read(path, [self.columns.get(name, name) for name in columns])
        for place, row in rows:
            if isinstance(row, str):
                yield place, row
            elif all(str(row.get(name)) == value for name, value in self.where.items()):
                yield place, {name: row.get(self.columns.get(name, name)) for name in columns}

    def _table(self, path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Row | str]]:
        rows = delimited_rows(path)
        header = list(self.header) if self.header else [name.strip() for name in next(rows, (0, []))[1]]
        check_columns(wanted, header, where=str(path))
        for number, fields in rows:
            if len(fields) == len(header):
                yield f"line {number}", dict(zip(header, fields, strict=True))
            else:
                yield f"line {number}", f"has {len(fields)} fields, but the header has {len(header)}"

    def _objects(self, path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Row | str]]:
        for number, row in json_rows(path):
            if number == 1 and not isinstance(row, str):
                check_columns(wanted, row, where=str(path))
            yield f"line {number}", row

    def __str__(self) -> str:
        """Name the file for an error message."""
        return str(self.path())


def _read_folder(path: Path, *, columns: Sequence[str]) -> Iterator[tuple[str, Row | str]]:
    """Read IMDb's layout, a folder of .txt files for each label, without the unlabelled ``unsup``."""
    if len(columns) != 2:
        raise UserError(
            f"{path} is a folder of single texts, but this task reads {', '.join(columns[:-1])}; give a file"
        )
    text, label = columns
    for folder in sorted(item for item in path.iterdir() if item.is_dir() and item.name != "unsup"):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() == ".txt" and "." not in (folder.name[0], file.name[0]):  # of no hidden file
                with open_text(file) as stream:
                    yield f"{folder.name}/{file.name}", {text: stream.read(), label: folder.name}


def check_columns(wanted: Iterable[str], present: Iterable[str], *, where: str) -> None:
    """Make sure that a table has the columns that a task reads."""
    present = list(present)
    missing = [name for name in wanted if name not in present]
    if missing:
        raise UserError(f"{where} has no column {', '.join(missing)}; it has {', '.join(map(str, present)) or 'none'}")


def some_of(examples: list[E], limit: int | None) -> list[E]:
    """Choose at most ``limit`` examples, always the same ones and in the same random order; None keeps all."""
    if limit is None or limit >= len(examples):
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return [examples[int(index)] for index in order[:limit]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One or two texts, the id of their class or the number to predict, and the place of the row in its split."""

    texts: tuple[str, ...]
    label: float
    row: int = field(default=0, compare=False)


def rows_hash(rows: Iterable[Any]) -> str:
    """Return a short hash of rows in their order, each as JSON."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()[:16]


def rows_hashes(task: ReadsRows, content: Callable[[Any], Any], *, train: bool) -> dict[str, str]:
    """Read a task's splits and hash the ``content`` of their examples: of those scored and, with ``train``, trained on.

    The hashes are settings of a result, so that scores on different rows are told apart wherever the rows came from.
    """
    trained = {"train_data": rows_hash(map(content, task.train_examples()))} if train else {}
    splits = task.scored_examples()
    if not splits:
        raise UserError("task.files.scored or task.hub.scored names no split to score; name one, such as dev")
    if wrong := [name for name in splits if name == "held_out" or "/" in name]:  # a split has files of its name
        raise UserError(
            f"task.files.scored or task.hub.scored has a split {wrong[0]!r}; name it without / and not held_out"
        )
    return trained | {"scored_data": rows_hash((name, content(row)) for name, rows in splits.items() for row in rows)}


def read_examples(
    split: HubSplit | FileSplit,
    *,
    texts: Sequence[str],
    label: str | None,
    labels: Sequence[str] | None,
    aliases: Mapping[str, str],
    skip_malformed: bool,
) -> list[Example]:
    """Read a split, and check each row.

    A text is a column, or a template with columns in it: ``{word}: {sentence1}``. Without ``label`` all labels are 0,
    and no row is left out. ``labels`` are the classes in the order of their ids, and None if a number is predicted. A
    row gives the name or the id of its class. ``aliases`` maps other names to the names in ``labels``.
    """
    examples, faults, count = [], [], 0
    wanted = list(dict.fromkeys(column for text in texts for column in columns_of(text)))
    for place, row in split.rows(columns=[*wanted, *([] if label is None else [label])]):
        count += 1
        if isinstance(row, str):
            faults.append(f"{place} {row}")
            continue
        if other := [name for name in wanted if not isinstance(row[name], str)]:
            faults.append(f"{place} has no text in {', '.join(other)}")
            continue
        value = 0.0 if label is None else label_of(row[label], labels=labels, aliases=aliases)
        if value is None:
            faults.append(f"{place} has {label} {row[str(label)]!r}, not one of {', '.join(labels or ['a number'])}")
            continue
        filled = tuple(text.format_map(row) if "{" in text else row[text] for text in texts)
        examples.append(Example(texts=filled, label=value, row=count - 1))
    if faults and not (skip_malformed and label is not None):
        cure = (
            "; a leaderboard wants them all" if label is None else ", or skip these rows with task.skip_malformed=true"
        )
        raise UserError(
            f"{split}: {len(faults)} of {count} rows cannot be used; the first: {faults[0]}. Fix the file{cure}"
        )
    if faults:
        log.warning("%s: %d of %d rows were skipped; the first: %s", split, len(faults), count, faults[0])
    if not examples:
        raise UserError(f"{split} has no usable row ({count} were read); check task.data_dir")
    return examples


def columns_of(text: str) -> list[str]:
    """List the columns that a text is made of: itself, or those of a template."""
    return [name for _, name, *_ in string.Formatter().parse(text) if name] if "{" in text else [text]


def label_of(value: Any, *, labels: Sequence[str] | None, aliases: Mapping[str, str]) -> float | None:
    """Return the id of a class, given by its name or id, or the number to predict; None for any other value."""
    if labels is None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        return number if math.isfinite(number) else None
    name = aliases.get(str(value), str(value))
    if name in labels:
        return list(labels).index(name)
    if any(label.isdecimal() for label in labels):  # stars 1, 2, 3 are names, not ids
        return None
    return int(name) if name.isdecimal() and len(name) < 10 and int(name) < len(labels) else None
