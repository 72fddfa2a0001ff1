"""Text from .txt, .jsonl, .csv and .parquet files, plain or compressed."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from distilkit.data.corpus import LONGEST, Piece, end_of_piece, nonempty, text_of
from distilkit.data.json_lines import json_rows
from distilkit.data.table_files import delimited_rows, name_errors, open_text
from distilkit.errors import UserError

log = logging.getLogger(__name__)

_COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
_FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
_MANY_LINES = 100  # of .txt in a document; prose has fewer between empty lines


class TextFiles:
    """Read .txt, .jsonl, .csv and .parquet, plain or as .gz, .xz, .zst or .bz2, from files, folders and globs.

    ``column`` names the text in .jsonl, .csv and .parquet, a row a document. In .txt a document ends at a
    ``blank_line``, at each ``line``, or with the ``file``. A document of over a million characters is read as several.

    A folder is searched to any depth, also through links, without hidden files and files of other kinds. A file that is
    found twice is read once.
    """

    def __init__(
        self,
        *,
        paths: str | Sequence[str],
        column: str = "text",
        document: Literal["blank_line", "line", "file"] = "blank_line",
    ) -> None:
        """Find the files at once, so that a wrong path is known before a model is loaded."""
        if document not in ("blank_line", "line", "file"):
            raise UserError(f"data.corpus.document is {document!r}; it takes blank_line, line or file")
        self.column = column
        self.document = document
        found: dict[Any, Path] = {}
        given: list[Any] = list(paths) if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]
        for path in given or [""]:
            if not isinstance(path, str) or not path:  # an empty one would be the current folder
                raise UserError(f"data.corpus.paths holds {path!r}, which names no file; write a number in quotes")
            with name_errors(Path(path)):
                for file in _find(path):
                    found.setdefault((file.resolve(), _format(file)), file)
        self.files = list(found.values())

    def fingerprint(self) -> dict[str, Any]:
        """Name each file by path, size and time of change, not by content: a corpus may be terabytes."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return {"files": stats, "column": self.column, "document": self.document}

    def documents(self) -> Iterator[str]:
        """Yield the documents of each file in turn."""
        read: Counter[str] = Counter()
        for file in self.files:
            yield from self._documents(file, read)
        if self.document == "blank_line" and read["lines"] >= _MANY_LINES * max(1, read["documents"]):
            found = f"{read['lines']:,} lines of .txt are only {read['documents']:,} documents"
            cure = "set data.corpus.document=line if each line is one"
            log.warning("%s, because an empty line ends a document; %s", found, cure)

    def pieces(self) -> list[Piece]:
        """List the files, each with its size in bytes."""
        return [Piece(file.stat().st_size, partial(self._documents, file, Counter())) for file in self.files]

    def _documents(self, file: Path, read: Counter[str]) -> Iterator[str]:
        match _format(file):
            case ".txt":
                texts = self._text(file, read)
            case ".jsonl":
                texts = self._jsonl(file)
            case ".csv":
                texts = self._csv(file)
            case _:
                texts = self._parquet(file)
        yield from nonempty(texts)

    def _text(self, file: Path, read: Counter[str]) -> Iterator[str]:
        """Yield documents, long ones in parts, so that memory is bounded. Count lines and documents in ``read``."""
        lines: list[str] = []
        size = 0
        with open_text(file) as stream:
            while line := stream.readline(LONGEST):  # a line may be the whole file
                is_blank = self.document == "blank_line" and not line.strip()
                if not is_blank:
                    lines.append(line)
                    size += len(line)
                    read["lines"] += line.endswith("\n")  # a long line is read in parts
                if is_blank or (self.document == "line" and line.endswith("\n")):
                    read["documents"] += bool(lines)
                    yield "".join(lines)
                    lines, size = [], 0
                elif size > LONGEST:
                    text = "".join(lines)
                    end = end_of_piece(text)
                    yield text[:end]
                    lines, size = [text[end:]], size - end
        read["documents"] += bool(lines)
        yield "".join(lines)

    def _jsonl(self, file: Path) -> Iterator[str]:
        for number, row in json_rows(file, column=self.column):
            if isinstance(row, str):
                raise UserError(f"{file}, line {number} {row}")
            self._check_column(f"{file}, line {number}", row)
            yield text_of(row[self.column], place=f"{file}, line {number}: column {self.column!r}")

    def _csv(self, file: Path) -> Iterator[str]:
        rows = delimited_rows(file)
        header = [name.strip() for name in next(rows, (0, []))[1]]
        self._check_column(file, header)
        column = len(header) - 1 - header[::-1].index(self.column)  # of a repeated name the last
        for line, fields in rows:
            if len(fields) != len(header):
                raise UserError(
                    f"{file}, line {line} has {len(fields)} fields, but the header has {len(header)}; fix or drop that "
                    "row; text that holds a comma stands in quotes"
                )
            yield fields[column]

    def _parquet(self, file: Path) -> Iterator[str]:
        import pyarrow.parquet as pq

        row = 0
        with name_errors(file):
            table = pq.ParquetFile(file)
            self._check_column(file, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=64, columns=[self.column]):  # of books, too
                for text in batch.column(0):
                    row += 1
                    yield text_of(text.as_py(), place=f"{file}, row {row}: column {self.column!r}")

    def _check_column(self, place: Path | str, columns: Iterable[str]) -> None:
        if self.column not in columns:
            named = ", ".join(name for name in columns if name.strip())
            raise UserError(f"{place} has no column {self.column!r}; it has {named or 'none'}: set data.corpus.column")


def _format(file: Path) -> str:
    """Return .txt, .jsonl, .csv or .parquet, in small letters and without a compression, or another suffix."""
    suffix = file.suffix.lower()
    if suffix not in _COMPRESSIONS:
        return suffix
    inner = Path(file.stem).suffix.lower()
    return suffix if inner == ".parquet" else inner


def _find(path: str) -> list[Path]:
    """List the files of one path, folder or glob, sorted, each by its own name and not by the file it links to."""
    expanded = Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser takes every ~ for a user's home
    others: Counter[str] = Counter()  # what is left out, by suffix
    if expanded.is_dir():
        found = _search(expanded, others)
    elif os.path.lexists(expanded):  # before globs: a name may hold a bracket
        found = [expanded]
    else:
        matches = glob.glob(str(expanded), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [match for match in map(Path, matches) if not match.is_dir()]
    if not found:
        raise UserError(
            f"data.corpus.paths: {path!r} matches no file; known formats are {', '.join(_FORMATS)}, plain "
            f"or with {', '.join(_COMPRESSIONS)}"
        )
    known = sorted(file for file in found if _format(file) in _FORMATS)
    others.update(file.suffix.lower() or "no suffix" for file in found if _format(file) not in _FORMATS)
    if not known:
        raise UserError(
            f"{found[0]} has an unknown format; known are {', '.join(_FORMATS)}, the first three also "
            f"with {', '.join(_COMPRESSIONS)}"
        )
    if others.total():
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in sorted(others.items()) if count)
        log.info("%s: left out %d files of other kinds: %s", path, others.total(), kinds)
    for file in known:
        if not file.is_file():
            raise UserError(f"{file} is no file, or a link to none; restore what it links to, or remove it")
    return [file.parent.resolve() / file.name for file in known]


def _search(folder: Path, others: Counter[str]) -> list[Path]:
    """List the files of a folder to any depth, but not behind a link back; count hidden ones in ``others``."""
    found: list[Path] = []
    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, onerror=_fail, followlinks=True):
        here = Path(root).resolve()
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        others["hidden"] += sum(name.startswith(".") for name in folders + files)
        found += [Path(root, name) for name in files if not name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def _fail(error: OSError) -> NoReturn:
    raise error
