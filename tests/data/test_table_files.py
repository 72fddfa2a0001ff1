"""Plain and compressed tables: the same rows, and an error that names the file where it is damaged."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from distilkit.data.table_files import delimited_rows, json_rows, open_text
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

    assert list(json_rows(written("a.jsonl", '{"a": "é"}\n\n[1]\n{"a"\n'))) == [(1, {"a": "é"}), (3, None), (4, None)]
    assert list(delimited_rows(written("a.csv", 'a,b\n\n"x,\n""y""",z\n'))) == [(1, ["a", "b"]), (4, ['x,\n"y"', "z"])]
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
    with pytest.raises(UserError, match=r"latin.tsv is not UTF-8: .* at byte 0 of its chunk; convert it first"):
        list(delimited_rows(file))
