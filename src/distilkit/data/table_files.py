"""Open plain and compressed text, and read rows of .csv and .tsv files; see json_lines for .jsonl."""

import bz2
import codecs
import csv
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import zstandard

from distilkit.errors import UserError

_DECOMPRESSORS: dict[str, Callable[[], Any]] = {  # by suffix
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    ".lzma": lzma.LZMADecompressor,
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),  # as of zstd --long=31
    ".bz2": bz2.BZ2Decompressor,
}
_DAMAGED = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, zstandard.ZstdError, zipfile.BadZipFile)
_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_LONGEST_FIELD = 2**26  # characters of a .csv field, which take four bytes each; a quote that is never closed has more


class _Decompressed(io.RawIOBase):
    """Read compressed streams that follow each other, with zero bytes as padding; anything else is an error.

    The standard library ignores what follows a stream of .xz or .bz2, and takes a .gz of no bytes for empty text.
    """

    def __init__(self, file: Path, start: Callable[[], Any]) -> None:
        self.source, self.start = file.open("rb"), start
        self.stream = start()
        self.waiting, self.text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.text:
            data = self.waiting or self.source.read(2**12)  # which may be some 10 MB of text
            self.waiting = b""
            if self.stream.eof and data:
                data = data.lstrip(b"\0")
                if not data:
                    continue
                self.stream = self.start()
            if not data:
                if not self.stream.eof:
                    raise EOFError("its compressed data have no end")
                return 0
            self.text = memoryview(self.stream.decompress(data))
            if self.stream.eof:
                self.waiting = self.stream.unused_data
        target = memoryview(buffer)
        count = min(len(target), len(self.text))
        target[:count], self.text = self.text[:count], self.text[count:]
        return count

    def close(self) -> None:
        self.source.close()
        super().close()


def _open_bytes(file: Path) -> Any:
    """Open a file as bytes, decompressed as its last suffix says, whatever its case."""
    if start := _DECOMPRESSORS.get(file.suffix.lower()):
        return io.BufferedReader(_Decompressed(file, start), 2**16)
    if file.suffix.lower() != ".zip":
        return file.open("rb")
    archive = zipfile.ZipFile(file)
    held = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith(("__MACOSX/", "."))]
    if len(held) != 1:
        raise UserError(f"{file} holds {len(held)} files, but one is needed; unpack it and give the file")
    return archive.open(held[0])


@contextmanager
def name_errors(file: Path) -> Iterator[None]:
    """Turn the errors of a missing or damaged file into a ``UserError`` that names the file."""
    try:
        yield
    except (*_DAMAGED, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {file}: {error}; the file may be cut short or not what its name says") from error


@contextmanager
def open_text(file: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open UTF-8 text, plain or compressed as its last suffix says, without a byte order mark; name other encodings."""
    with name_errors(file), _open_bytes(file) as stream:
        head = stream.peek(4096)[:4096]
        named = next((name for name, marks in _MARKS.items() if head.startswith(marks)), None)
        if named or head.count(0) > len(head) // 4:
            found = named or "UTF-16 or UTF-32 without a byte order mark, or no text"
            raise UserError(
                f"{file} is not UTF-8 but {found}; convert it first, with iconv -f {named or 'UTF-16LE'} -t UTF-8"
            )
        try:
            yield io.TextIOWrapper(stream, "utf-8-sig", newline=newline)
        except UnicodeDecodeError as error:
            before = error.object[: error.start][-30:].decode(errors="replace")
            raise UserError(
                f"{file} is not UTF-8: the byte 0x{error.object[error.start]:02x} stands after {before!r}; convert it "
                "first, for example with iconv -f latin1 -t utf-8 if that is its encoding"
            ) from error


def delimited_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the fields of each row that is not blank, the header included.

    Fields of .csv are separated by commas and may be quoted. Those of .tsv are separated by tabs; quotes are text.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(file, newline="") as stream:
        is_csv = ".csv" in map(str.lower, file.suffixes)
        tabs: Any = {"strict": True} if is_csv else {"dialect": "excel-tab", "quoting": csv.QUOTE_NONE}
        rows = csv.reader(_lines(stream), **tabs)
        line = 1
        try:
            for fields in rows:
                if len(fields) > 1 or "".join(fields).strip():
                    yield line, fields
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{file}: the row that begins in line {line} cannot be read: {error}; a quoted field ends with one "
                'quote, and a quote within it is written twice (""); .txt and .jsonl take longer texts'
            ) from error


def _lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines of a stream, or raise ``csv.Error`` at one that no field could hold, before it fills the memory."""
    while line := stream.readline(2 * _LONGEST_FIELD):
        if len(line) == 2 * _LONGEST_FIELD:
            raise csv.Error(f"its line is longer than {2 * _LONGEST_FIELD:,} characters")
        yield line
