"""Open plain and compressed text, and read rows of .jsonl, .csv and .tsv files."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow

from distilkit.errors import UserError

OPENERS: dict[str, Any] = {  # by suffix; each raises at the end of a file that was cut short
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": lambda file, _: pyarrow.input_stream(str(file), compression="zstd"),
    ".bz2": bz2.open,
    ".zip": lambda file, _: zipfile.Path(file, zipfile.ZipFile(file).namelist()[0]).open("rb"),
}
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, csv.Error, pyarrow.ArrowInvalid)


@contextmanager
def name_errors(file: Path) -> Iterator[None]:
    """Turn the errors of a missing or damaged file into a ``UserError`` that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8: {error.reason} at byte {error.start} of its chunk; convert it first, for example "
            "with iconv -f latin1 -t utf-8"
        ) from error
    except _DAMAGED as error:
        raise UserError(f"cannot read {file}: {error}; the file may be cut short or not what its name says") from error


@contextmanager
def open_text(file: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open UTF-8 text, plain or compressed as its last suffix says, without a byte order mark."""
    with (
        name_errors(file),
        io.TextIOWrapper(OPENERS.get(file.suffix, open)(file, "rb"), "utf-8-sig", newline=newline) as stream,
    ):
        yield stream


def json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield the number and the object of each line that is not blank; None where a line is not a JSON object."""
    with open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    row = None
                yield number, row if isinstance(row, dict) else None


def delimited_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each row that is not blank, the header included.

    Fields of .csv are separated by commas and may be quoted. Those of .tsv are separated by tabs; quotes are text.
    """
    csv.field_size_limit(sys.maxsize)  # 128 kB by default, less than some documents
    with open_text(file, newline="") as stream:
        tabs: Any = {} if ".csv" in file.suffixes else {"dialect": "excel-tab", "quoting": csv.QUOTE_NONE}
        rows = csv.reader(stream, **tabs)
        for fields in rows:
            if fields:
                yield rows.line_num, fields
