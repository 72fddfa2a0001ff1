"""Text from .txt, .jsonl, .csv and .parquet files, plain or compressed."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from distilkit.data.corpus import has_surrogate, nonempty
from distilkit.data.table_files import delimited_rows, json_rows, name_errors, open_text
from distilkit.errors import UserError

_COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
_FORMATS = (".txt", ".jsonl", ".csv", ".parquet")


class TextFiles:
    """Read .txt, .jsonl, .csv and .parquet, plain or as .gz, .xz, .zst or .bz2, from files, folders and globs.

    ``column`` names the text in .jsonl, .csv and .parquet, a row a document. In .txt a document ends at a
    ``blank_line``, at each ``line``, or with the ``file``.
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
        """Yield the documents of each file in turn."""
        for file in self.files:
            match _format(file):
                case ".txt":
                    texts = self._text(file)
                case ".jsonl":
                    texts = self._jsonl(file)
                case ".csv":
                    texts = self._csv(file)
                case _:
                    texts = self._parquet(file)
            yield from nonempty(texts)

    def _text(self, file: Path) -> Iterator[str]:
        with open_text(file) as stream:
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

    def _jsonl(self, file: Path) -> Iterator[str]:
        for number, row in json_rows(file):
            if row is None:
                raise UserError(f"{file}, line {number} is not a JSON object; fix or drop that line")
            self._check_column(file, row)
            yield self._text_of(file, number, row[self.column])

    def _csv(self, file: Path) -> Iterator[str]:
        rows = delimited_rows(file)
        _, header = next(rows, (0, []))
        self._check_column(file, header)
        column = len(header) - 1 - header[::-1].index(self.column)  # of a repeated name the last
        for _, fields in rows:
            yield fields[column] if column < len(fields) else ""

    def _parquet(self, file: Path) -> Iterator[str]:
        import pyarrow.parquet as pq

        row = 0
        with name_errors(file):
            table = pq.ParquetFile(file)
            self._check_column(file, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=1024, columns=[self.column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield self._text_of(file, row, text)

    def _text_of(self, file: Path, row: int, value: object) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(
                f"{file}, row {row}: column {self.column!r} holds {type(value).__name__}, not text; "
                "name the text column with data.corpus.column"
            )
        if has_surrogate(value):
            raise UserError(f"{file}, row {row}: unpaired surrogate; fix or drop that row")
        return value

    def _check_column(self, file: Path, columns: Iterable[str]) -> None:
        if self.column not in columns:
            raise UserError(
                f"{file} has no column {self.column!r}; it has {', '.join(columns) or 'none'}: set data.corpus.column"
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
