"""Text from .txt, .jsonl, .csv and .parquet files, plain or compressed."""

import csv
import glob
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import fsspec

from distilkit.data.corpus import has_surrogate, nonempty
from distilkit.errors import UserError

_COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
_FORMATS = (".txt", ".jsonl", ".csv", ".parquet")


class TextFiles:
    """Read .txt, .jsonl, .csv and .parquet, plain or as .gz, .xz, .zst, from files, folders and globs.

    ``column`` names the text in .jsonl, .csv and .parquet, a row a document. In .txt a document ends at a
    ``blank_line``, at each ``line``, or with the ``file``.

    Raises:
        UserError: a path matches nothing, or holds no file of a known format.
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
        self.files = [file for path in ([paths] if isinstance(paths, str) else paths) for file in _find(path)]

    def fingerprint(self) -> dict[str, Any]:
        """Name each file by path, size and time of change, not by content: a corpus may be terabytes."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return {"files": stats, "column": self.column, "document": self.document}

    def documents(self) -> Iterator[str]:
        """Yield the documents of each file in turn.

        Raises:
            UserError: a file is not UTF-8, a row is malformed, or the column is missing.
        """
        for file in self.files:
            try:
                yield from nonempty(self._read(file))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} is not UTF-8: {error.reason} at byte {error.start} of its chunk; convert it first, for "
                    "example with iconv -f latin1 -t utf-8"
                ) from error
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise UserError(
                    f"cannot read {file}: {error}; the file may be cut short or not what its name says"
                ) from error

    def _read(self, file: Path) -> Iterator[str]:
        kind = _format(file)
        if kind == ".parquet":
            yield from self._parquet(file)
            return
        with _open(file, newline="" if kind == ".csv" else None) as stream:
            match kind:
                case ".txt":
                    yield from self._text(stream)
                case ".jsonl":
                    yield from self._jsonl(file, stream)
                case _:
                    yield from self._csv(file, stream)

    def _text(self, stream: Iterable[str]) -> Iterator[str]:
        if self.document == "line":
            yield from stream
            return
        lines: list[str] = []
        for line in stream:
            if self.document == "blank_line" and not line.strip():
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
        yield "".join(lines)

    def _jsonl(self, file: Path, stream: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {number} is not JSON: {error.msg}; mend or drop that line") from error
            self._check_column(file, list(row) if isinstance(row, dict) else [])
            yield self._text_of(file, number, row[self.column])

    def _csv(self, file: Path, stream: Iterable[str]) -> Iterator[str]:
        csv.field_size_limit(sys.maxsize)
        rows = csv.DictReader(stream)
        self._check_column(file, list(rows.fieldnames or []))
        for row in rows:
            yield row[self.column] or ""

    def _parquet(self, file: Path) -> Iterator[str]:
        import pyarrow.parquet as pq
        from pyarrow import ArrowInvalid

        row = 0
        try:
            table = pq.ParquetFile(file)
            self._check_column(file, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024, columns=[self.column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield self._text_of(file, row, text)
        except ArrowInvalid as error:
            raise UserError(f"{file} is not a whole parquet file: {error}; make or fetch it again") from error

    def _text_of(self, file: Path, row: int, value: object) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(
                f"{file}, row {row}: column {self.column!r} holds {type(value).__name__}, not text; "
                "name the text column with data.corpus.column"
            )
        if has_surrogate(value):
            raise UserError(f"{file}, row {row}: half of a surrogate pair is no text; mend or drop that row")
        return value

    def _check_column(self, file: Path, columns: list[str]) -> None:
        if self.column not in columns:
            raise UserError(
                f"{file} has no column {self.column!r}; it has {', '.join(columns) or 'none'}: set data.corpus.column"
            )


def _open(file: Path, *, newline: str | None) -> TextIO:
    encoding = "utf-8-sig"  # without the mark that Windows programs put before the text
    if file.suffix == ".zst":  # fsspec takes the end of a file that was cut short for the end of the text
        import pyarrow

        stream = pyarrow.input_stream(str(file), compression="zstd")
        return io.TextIOWrapper(stream, encoding, newline=newline)
    compression = _COMPRESSIONS.get(file.suffix)
    return cast(
        TextIO, fsspec.open(str(file), "rt", encoding=encoding, newline=newline, compression=compression).open()
    )


def _format(file: Path) -> str:
    return (Path(file.stem) if file.suffix in _COMPRESSIONS else file).suffix


def _find(path: str) -> list[Path]:
    """List the files of one path, folder or glob, sorted; a folder is searched to any depth."""
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        found = sorted(file for file in expanded.rglob("*") if file.is_file() and _format(file) in _FORMATS)
    elif expanded.is_file():  # before globs: a name may hold a bracket
        found = [expanded]
    else:
        matches = glob.glob(str(expanded), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = sorted(Path(match) for match in matches if Path(match).is_file())
    if not found:
        raise UserError(
            f"data.corpus.paths: {path!r} matches no file; known formats are {', '.join(_FORMATS)}, plain "
            f"or with {', '.join(_COMPRESSIONS)}"
        )
    for file in found:
        if _format(file) not in _FORMATS or (_format(file) == ".parquet" and file.suffix != ".parquet"):
            raise UserError(
                f"{file} has an unknown format; known are {', '.join(_FORMATS)}, the first three also "
                f"with {', '.join(_COMPRESSIONS)}"
            )
    return [file.resolve() for file in found]
