"""Where raw text comes from: files, the hub, the docstrings of installed packages. Each corpus streams documents."""

import ast
import csv
import glob
import importlib.util
import json
import logging
import lzma
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Protocol

import fsspec
import zstandard

from distilkit.errors import UserError

log = logging.getLogger(__name__)

_COMPRESSIONS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
_FORMATS = (".txt", ".jsonl", ".csv", ".parquet")


class Corpus(Protocol):
    """Raw text as a stream of documents that may be read again, and may be larger than memory."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the text, as JSON: a change of it means another cache."""
        ...

    def documents(self) -> Iterator[str]:
        """Yield the documents in a fixed order, without empty ones."""
        ...


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
                yield from _nonempty(self._read(file))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} is not UTF-8: {error.reason} at byte {error.start} of its chunk; convert it first, for "
                    "example with iconv -f latin1 -t utf-8"
                ) from error
            except (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
                raise UserError(
                    f"cannot read {file}: {error}; the file may be cut short or not what its name says"
                ) from error

    def _read(self, file: Path) -> Iterator[str]:
        kind = _format(file)
        if kind == ".parquet":
            yield from self._parquet(file)
            return
        compression = _COMPRESSIONS.get(file.suffix)
        newline = "" if kind == ".csv" else None
        with fsspec.open(str(file), "rt", encoding="utf-8", newline=newline, compression=compression) as stream:
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

        try:
            table = pq.ParquetFile(file)
        except ArrowInvalid as error:
            raise UserError(f"{file} is not a parquet file: {error}") from error
        self._check_column(file, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=1024, columns=[self.column]):
            for row, text in enumerate(batch.column(0).to_pylist()):
                yield self._text_of(file, row, text)

    def _text_of(self, file: Path, row: int, value: object) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(
                f"{file}, row {row}: column {self.column!r} holds {type(value).__name__}, not text; "
                "name the text column with data.corpus.column"
            )
        return value

    def _check_column(self, file: Path, columns: list[str]) -> None:
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


def _nonempty(documents: Iterable[str]) -> Iterator[str]:
    return (text for document in documents if (text := document.strip()))


class HubDataset:
    """Stream a data set of the Hugging Face hub.

    A row is a document, unless rows are smaller than documents: then ``rows_per_document`` joins so many, or a row that
    matches the pattern ``document_start`` begins the next (WikiText's headings).
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
        rows_per_document: int = 1,
        document_start: str | None = None,
    ) -> None:
        """Take the arguments of ``datasets.load_dataset``; nothing is fetched yet."""
        self.path, self.name, self.split, self.column, self.revision = path, name, split, column, revision
        self.rows_per_document = rows_per_document
        self.document_start = document_start

    def fingerprint(self) -> dict[str, Any]:
        """Name the data set; pin ``revision`` where the hub's copy may change."""
        return {"hub": vars(self)}

    def stream(self) -> Any:
        """Open the data set in streaming mode.

        Raises:
            UserError: it cannot be reached, or has no such column.
        """
        import datasets

        try:
            rows = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=True)
            columns = rows.column_names or list(next(iter(rows)))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot open data set {self.path!r} (config {self.name!r}, split {self.split!r}): "
                f"{str(error).splitlines()[0]}; check the names, and that the hub can be reached"
            ) from error
        if self.column not in columns:
            raise UserError(f"data set {self.path!r} has no column {self.column!r}; it has {', '.join(columns)}")
        return rows.select_columns([self.column])

    def documents(self) -> Iterator[str]:
        """Yield the documents as they arrive."""
        starts = re.compile(self.document_start) if self.document_start else None
        rows: list[str] = []
        for row in self.stream():
            text = row[self.column] or ""
            full = starts.match(text) if starts else len(rows) == self.rows_per_document
            if full and rows:
                yield from _nonempty(["\n".join(rows)])
                rows = []
            rows.append(text)
        yield from _nonempty(["\n".join(rows)])


class Concatenation:
    """Read several corpora one after the other, as Wikipedia and then books."""

    def __init__(self, *, parts: Sequence[Corpus]) -> None:
        """Take the parts in order."""
        self.parts = list(parts)

    def fingerprint(self) -> dict[str, Any]:
        """Name the parts in order."""
        return {"parts": [part.fingerprint() for part in self.parts]}

    def documents(self) -> Iterator[str]:
        """Yield the documents of each part in turn."""
        for part in self.parts:
            yield from part.documents()


class MultilingualWikipedia:
    """Sample Wikipedias in proportion to size ** exponent, small ones oversampled.

    mBERT's exponent is 0.7 (google-research/bert, multilingual.md). The stream ends when every language was read whole.
    """

    def __init__(
        self, *, languages: Sequence[str], date: str, exponent: float, seed: int, path: str = "wikimedia/wikipedia"
    ) -> None:
        """Take language codes and the date of the dump.

        Raises:
            UserError: no language, or an exponent outside 0 to 1.
        """
        if not languages:
            raise UserError("data.corpus.languages is empty; list at least one, as [en,de]")
        if not 0 <= exponent <= 1:
            raise UserError(f"data.corpus.exponent={exponent}, but it must be between 0 (all alike) and 1 (by size)")
        self.languages, self.date, self.exponent, self.seed, self.path = list(languages), date, exponent, seed, path

    def fingerprint(self) -> dict[str, Any]:
        """Name the dump, the languages and how they are sampled."""
        return {"wikipedia": vars(self)}

    def documents(self) -> Iterator[str]:
        """Yield articles, the language of each drawn at random.

        Raises:
            UserError: the hub cannot be reached, or has no such dump.
        """
        import datasets

        streams, sizes = [], []
        for language in self.languages:
            part = HubDataset(path=self.path, name=f"{self.date}.{language}")
            streams.append(part.stream())
            info = datasets.load_dataset_builder(self.path, part.name).info
            sizes.append(info.splits["train"].num_examples)
        mixed = datasets.interleave_datasets(
            streams,
            probabilities=sampling_probabilities(sizes, self.exponent),
            seed=self.seed,
            stopping_strategy="all_exhausted",
        )
        yield from _nonempty(row["text"] for row in mixed)


def sampling_probabilities(sizes: Sequence[int], exponent: float) -> list[float]:
    """Return size ** exponent, normalised to sum 1."""
    powers = [size**exponent for size in sizes]
    return [power / sum(powers) for power in powers]


class Docstrings:
    """Read the docstrings of installed packages: English technical prose that every machine with this package has.

    ``packages`` are import names; ``stdlib`` is Python's own library. A document is the docstrings of one module;
    a docstring that occurred before is dropped, since copies are common.

    Raises:
        UserError: a package is not installed.
    """

    def __init__(self, *, packages: Sequence[str], num_workers: int | None = None) -> None:
        """Find the packages without importing them."""
        self.num_workers = num_workers
        self.roots = {name: _package_folder(name) for name in packages}

    def fingerprint(self) -> dict[str, Any]:
        """Name each package and its version."""
        distributions = packages_distributions()
        versions = {}
        for name in self.roots:
            try:
                versions[name] = version(distributions.get(name, [name])[0])
            except PackageNotFoundError:
                versions[name] = sys.version
        return {"docstrings": versions}

    def files(self) -> list[Path]:
        """List the Python files, in a fixed order."""
        skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
        return [
            file
            for root in self.roots.values()
            for file in sorted(root.rglob("*.py"))
            if not skipped.intersection(file.relative_to(root).parts)
        ]

    def documents(self) -> Iterator[str]:
        """Yield one document for each module that has docstrings, parsed in parallel."""
        seen: set[bytes] = set()
        for docstrings in self._parsed():
            fresh = []
            for docstring in docstrings:
                digest = blake2b(docstring.encode(), digest_size=8).digest()
                if digest not in seen:
                    seen.add(digest)
                    fresh.append(docstring)
            yield from _nonempty(["\n\n".join(fresh)])

    def _parsed(self) -> Iterator[list[str]]:
        files = self.files()
        if len(files) < 1000:  # starting processes would take longer than parsing
            yield from map(module_docstrings, files)
            return
        # Spawned, not forked: torch and tokenizers hold threads that do not survive a fork.
        pool = ProcessPoolExecutor(self.num_workers, mp_context=get_context("spawn"))
        try:
            yield from pool.map(module_docstrings, files, chunksize=128)
        finally:
            pool.shutdown(cancel_futures=True)  # a reader may stop early


def _package_folder(name: str) -> Path:
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.corpus.packages: {name!r} is not an installed package; install it or drop it from the list"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def module_docstrings(file: Path) -> list[str]:
    """Parse one Python file and list its docstrings, outermost first; a file that does not parse has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    found: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        docstring = ast.get_docstring(node)
        if docstring:
            found.append(docstring)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child)

    visit(tree)
    return [docstring for docstring in found if not any("\ud800" <= character <= "\udfff" for character in docstring)]
