"""Plain and compressed tables: the same rows, and an error that names the file where it is damaged."""

import bz2
import gzip
import json
import lzma
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard

from distilkit.data import table_files
from distilkit.data.json_lines import json_rows
from distilkit.data.table_files import delimited_rows, open_text
from distilkit.errors import UserError


def zst(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zst,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_rows_are_the_same_plain_and_compressed_and_without_a_byte_order_mark(suffix: str, tmp_path: Path) -> None:
    def written(name: str, text: str) -> Path:
        file = tmp_path / f"{name}{suffix}"
        file.write_bytes(PACK[suffix](text.encode("utf-8-sig")))
        return file

    faults = [(3, "is not a JSON object; fix"), (4, "is not a JSON object but ")]
    rows = list(json_rows(written("a.jsonl", '{"a": "é"}\n\n[1]\n{"a"\n')))
    assert [(number, row[:25] if isinstance(row, str) else row) for number, row in rows] == [(1, {"a": "é"}), *faults]
    assert list(delimited_rows(written("a.csv", 'a,b\n\n"x,\n""y""",z\n'))) == [(1, ["a", "b"]), (3, ['x,\n"y"', "z"])]
    assert list(delimited_rows(written("a.tsv", 'a\tb\n"x\ty"\n'))) == [(1, ["a", "b"]), (2, ['"x', 'y"'])]


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_a_compressed_file_that_was_cut_short_is_an_error(suffix: str, share: float, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"number": number * 7919 % 10007}) + "\n" for number in range(5000))
    whole = PACK[suffix](rows.encode())
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=f"cannot read {file}: .*; the file may be cut short or not what its name says"):
        list(json_rows(file))


def test_a_missing_file_and_one_that_is_not_utf8_are_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"cannot read .*nothing.txt: .*No such file"),
        open_text(tmp_path / "nothing.txt"),
    ):
        pass
    file = tmp_path / "latin.tsv"
    file.write_bytes("é".encode("latin1"))
    with pytest.raises(UserError, match=r"latin.tsv is not UTF-8: the byte 0xe9 stands after ''; convert it first"):
        list(delimited_rows(file))


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
def test_a_compressed_file_of_no_bytes_is_an_error(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(b"")
    with (
        pytest.raises(UserError, match=rf"cannot read {file}: its compressed data have no end"),
        open_text(file) as text,
    ):
        text.read()


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
@pytest.mark.parametrize("junk", [b"\n", b"more text", b"\0\0junk", random.Random(0).randbytes(100_000)])
def test_what_follows_the_end_of_compressed_data_is_an_error(suffix: str, junk: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(PACK[suffix](b"one\n") + junk)
    with pytest.raises(UserError, match=rf"cannot read {file}: "), open_text(file) as text:
        text.read()


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
def test_streams_that_follow_each_other_are_one_text_and_zeros_are_padding(suffix: str, tmp_path: Path) -> None:
    words = random.Random(0).choices("abcdefghij", k=300_000)
    parts = ["".join(words[:1000]), "".join(words[1000:]), "", "end"]
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(b"".join(PACK[suffix](part.encode()) + bytes(16) for part in parts))
    with open_text(file) as text:
        assert text.read() == "".join(parts)


def test_a_zst_file_may_have_a_long_window_and_frames_to_skip(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()  # its frame does not tell its size
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    file = tmp_path / "a.txt.zst"
    file.write_bytes(skipped + writer.compress(b"one\n" * 1000) + writer.flush() + skipped + zst(b"two") + skipped)
    with open_text(file) as text:
        assert text.read() == "one\n" * 1000 + "two"


def test_an_archive_holds_one_file(tmp_path: Path) -> None:
    for name, held in (("one", ["__MACOSX/._a.tsv", "data/", "data/a.tsv"]), ("two", ["a.tsv", "b.tsv"]), ("none", [])):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for entry in held:
                archive.writestr(entry, f"in {entry}")
    with open_text(tmp_path / "one.zip") as text:
        assert text.read() == "in data/a.tsv"
    for name, count in (("two", 2), ("none", 0)):
        with (
            pytest.raises(UserError, match=rf"{name}.zip holds {count} files, but one is needed; unpack it"),
            open_text(tmp_path / f"{name}.zip"),
        ):
            pass


@pytest.mark.parametrize("name", ["A.TSV", "a.Tsv.GZ"])
def test_a_suffix_may_be_in_capitals(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACK[".gz" if "GZ" in name else ""](b'"x\ty"\n'))
    assert list(delimited_rows(tmp_path / name)) == [(1, ['"x', 'y"'])]
    (tmp_path / "a.CSV").write_text('"x\ty",z\n', "utf-8")
    assert list(delimited_rows(tmp_path / "a.CSV")) == [(1, ["x\ty", "z"])]


@pytest.mark.parametrize(
    ("encoding", "named", "cure"),
    [
        ("utf-16", "UTF-16", "UTF-16"),
        ("utf-32", "UTF-32", "UTF-32"),
        ("utf-16-le", "UTF-16 or UTF-32 without a byte order mark, or no text", "UTF-16LE"),
        ("utf-16-be", "UTF-16 or UTF-32 without a byte order mark, or no text", "UTF-16LE"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_another_encoding_is_named(suffix: str, encoding: str, named: str, cure: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(PACK[suffix]("One line.\nTwo lines.\n".encode(encoding)))
    message = f"{file} is not UTF-8 but {named}; convert it first, with iconv -f {cure} -t UTF-8"
    with pytest.raises(UserError, match=message), open_text(file) as text:
        text.read()


def test_what_stands_before_a_byte_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.xz"
    file.write_bytes(lzma.compress(b"line\n" * 9999 + b"caf\xe9\n"))
    with (
        pytest.raises(UserError, match=r"the byte 0xe9 stands after '.*line\\ncaf'; convert it first"),
        open_text(file) as text,
    ):
        text.read()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"number": ' + "1" * 5000 + "}", "holds a number of too many digits, or lists too deep"),
        ('{"lists": ' + "[" * 100_000 + "]" * 100_000 + "}", "holds a number of too many digits, or lists too deep"),
        ('{"a":' * 100_000, "holds a number of too many digits, or lists too deep"),
        ('[{"text": "One."}, {"text": "Two."}]', "is not a JSON object but of a JSON array; .* with jq -c '.\\[\\]'"),
        ('[\n {"text": "One."},\n {"text": "Two."}\n]', "is not a JSON object but of a JSON array"),
        ('[{"text": "One."},\n{"text": "Two."}]', "is not a JSON object but of a JSON array"),
        ('{\n "text": "One."\n}', "is not a JSON object but the beginning of one; fix or .* with jq -c \\."),
        ('{"text": "One.",\n "id": 1}', "is not a JSON object but the beginning of one"),
        ('{"text": "One."} {"text": "Two."}', "is not a JSON object; fix or drop that line"),
        ('"text"', "is not a JSON object; fix or drop that line"),
    ],
)
def test_what_is_no_json_object_a_line_is_said_of_its_line(line: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{line}\n', "utf-8")
    (_, first), (number, row), *_ = json_rows(file)
    assert first == {"text": "fine"}
    assert number == 2
    assert re.match(fault, row), row


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('a,b\n1,"open\n2,two\n3,three\n', 2),
        ('a,b\n1,"two\nlines"\n2,"open', 4),
        ('a,b\n1,one\n2,"a \\"quote\\" inside"\n', 3),
        ('"a","b\n', 1),
    ],
)
def test_a_quote_that_does_not_close_is_an_error_at_the_line_of_its_row(rows: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(rows, "utf-8")
    with pytest.raises(
        UserError, match=rf"{file}: the row that begins in line {line} cannot be read: .* written twice"
    ):
        list(delimited_rows(file))


def test_a_quote_that_does_not_close_ends_at_the_longest_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_LONGEST_FIELD", 1000)
    file = tmp_path / "a.csv"
    file.write_text('a,b\n1,"' + "open,\n" * 1000, "utf-8")
    with pytest.raises(UserError, match="the row that begins in line 2 cannot be read: field larger than field limit"):
        list(delimited_rows(file))


def test_a_line_of_white_space_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("  \na,b\n\t\n,\n1,2\n", "utf-8")
    assert list(delimited_rows(file)) == [(2, ["a", "b"]), (4, ["", ""]), (5, ["1", "2"])]
