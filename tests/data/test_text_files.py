import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilkit.data import corpus, table_files, text_files
from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError

DOCUMENTS = ["One line.", "Two\nlines, of one document.", 'Quotes "here", commas; ünïcode 語 🙂.', "[MASK] is text."]


def as_txt(documents: list[str]) -> bytes:
    return "\n\n".join(documents).encode()


def as_jsonl(documents: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 0, column: document}) + "\n" for document in documents).encode()


def as_csv(documents: list[str], column: str = "text") -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([["id", column], *(["0", document] for document in documents)])
    return stream.getvalue().encode()


def as_parquet(documents: list[str], column: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": [0] * len(documents), column: documents}), sink)
    return sink.getvalue()


def zst(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    ".txt": as_txt,
    ".jsonl": as_jsonl,
    ".csv": as_csv,
    ".parquet": as_parquet,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zst,
    ".bz2": bz2.compress,
}
COMPRESSED = [kind + suffix for kind in FORMATS for suffix in COMPRESSIONS if kind != ".parquet" or not suffix]


def read(*paths: Path, **options: Any) -> list[str]:
    return list(TextFiles(paths=[str(path) for path in paths], **options).documents())


def write(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_every_format_and_compression_holds_the_same_documents(tmp_path: Path, suffix: str) -> None:
    kind = re.match(r"\.[a-z]+", suffix)[0]
    data = COMPRESSIONS[suffix.removeprefix(kind)](FORMATS[kind](DOCUMENTS))
    assert read(write(tmp_path / f"corpus{suffix}", data)) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".bz2"])
def test_a_file_compressed_in_several_parts_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    documents = [f"{number} " + os.urandom(50_000).hex() for number in range(4)]
    parts = [COMPRESSIONS[suffix](f"{document}\n\n".encode()) for document in documents]
    assert read(write(tmp_path / f"a.txt{suffix}", b"".join(parts))) == documents


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".bz2"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.999])
def test_a_compressed_file_that_was_cut_short_is_an_error_and_not_less_text(
    tmp_path: Path, suffix: str, share: float
) -> None:
    whole = COMPRESSIONS[suffix](os.urandom(200_000).hex().encode())
    file = write(tmp_path / f"a.txt{suffix}", whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=rf"cannot read {file}: .*; the file may be cut short"):
        read(file)


def test_a_parquet_file_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    whole = as_parquet(DOCUMENTS)
    file = write(tmp_path / "a.parquet", whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"cannot read {file}: .*; the file may be cut short"):
        read(file)


def test_files_folders_and_globs_are_read_in_the_order_given(tmp_path: Path) -> None:
    write(tmp_path / "folder/deep/b.csv", as_csv(["fourth"]))
    write(tmp_path / "folder/a.txt.gz", gzip.compress(b"third"))
    write(tmp_path / "folder/notes.md", "a folder may hold files of other kinds")
    write(tmp_path / "globbed/2.jsonl", as_jsonl(["second"]))
    write(tmp_path / "globbed/1.txt", "first")
    write(tmp_path / "globbed/deep/3.txt", "not matched")
    write(tmp_path / "last [1].txt", "fifth")
    paths = [tmp_path / "globbed/?.*", tmp_path / "folder", tmp_path / "last [1].txt"]
    assert read(*paths) == ["first", "second", "third", "fourth", "fifth"]


def test_a_double_star_searches_to_any_depth(tmp_path: Path) -> None:
    write(tmp_path / "a/b/c.txt", "deep")
    write(tmp_path / "d.txt", "shallow")
    assert read(tmp_path / "**/*.txt") == ["deep", "shallow"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("blank_line", ["a\nb", "c", "d"]),
        ("line", ["a", "b", "c", "d"]),
        ("file", ["a\nb\n  \nc\n\n\nd"]),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_document_ends_where_it_was_asked_to(
    tmp_path: Path, document: str, expected: list[str], newline: str
) -> None:
    text = "\n\na\nb\n  \nc\n\n\nd\n\n".replace("\n", newline)
    assert read(write(tmp_path / "a.txt", text), document=document) == expected


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, kind: str) -> None:
    assert read(write(tmp_path / f"a{kind}", b"\xef\xbb\xbf" + FORMATS[kind](DOCUMENTS))) == DOCUMENTS


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_the_text_column_may_have_another_name_and_empty_rows(tmp_path: Path, kind: str) -> None:
    writer: Callable[[list[str], str], bytes] = {".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}[kind]
    assert read(write(tmp_path / f"a{kind}", writer(["a", "", " \n", "b"], "body")), column="body") == ["a", "b"]


def test_a_cell_of_a_csv_file_keeps_its_line_ends(tmp_path: Path) -> None:
    documents = ["one\r\ntwo\n\nthree", "four"]
    assert read(write(tmp_path / "a.csv", as_csv(documents))) == documents


def test_a_null_is_an_empty_document(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), file)
    jsonl = write(tmp_path / "b.jsonl", '{"text": "c"}\n\n{"text": null}\n{"text": "d"}')
    assert read(file, jsonl) == ["a", "b", "c", "d"]


def test_a_file_is_streamed_and_an_error_comes_only_where_it_stands(tmp_path: Path) -> None:
    documents = TextFiles(paths=str(write(tmp_path / "a.jsonl", '{"text": "first"}\nbroken'))).documents()
    assert next(documents) == "first"
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is not a JSON object; fix or drop that line"):
        next(documents)


def test_documents_may_be_read_again(tmp_path: Path) -> None:
    files = TextFiles(paths=str(write(tmp_path / "a.txt", as_txt(DOCUMENTS))))
    assert list(files.documents()) == list(files.documents()) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.txt", "'{path}' matches no file; known formats are .txt, .jsonl, .csv, .parquet, plain or with .gz,"),
        ("empty", "'{path}' matches no file"),
        ("*.jsonl", "'{path}' matches no file"),
        (
            "a.pdf",
            "{path} has an unknown format; known are .txt, .jsonl, .csv, .parquet, the first three also with .gz",
        ),
        ("a.parquet.gz", "{path} has an unknown format"),
        ("a.gz", "{path} has an unknown format"),
    ],
)
def test_a_wrong_path_is_an_error_at_once(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("a.pdf", "a.parquet.gz", "a.gz"):
        write(tmp_path / file, "")
    path = tmp_path / name
    with pytest.raises(UserError, match=re.escape(message.format(path=path))):
        TextFiles(paths=str(path))


def test_one_wrong_path_among_good_ones_is_an_error(tmp_path: Path) -> None:
    good = write(tmp_path / "a.txt", "a")
    with pytest.raises(UserError, match=r"missing' matches no file"):
        TextFiles(paths=[str(good), str(tmp_path / "missing")])


@pytest.mark.parametrize(("paths", "shown"), [("", "''"), ([], "''"), (2024, "2024"), ([2024], "2024"), (None, "None")])
def test_a_path_that_is_empty_or_no_text_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: Any, shown: str
) -> None:
    write(tmp_path / "a.txt", "not asked for")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"data.corpus.paths holds {shown}, which names no file; write a number in q"):
        TextFiles(paths=paths)


def test_an_unknown_end_of_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="document is 'page'; it takes blank_line, line or file"):
        TextFiles(paths=str(write(tmp_path / "a.txt", "a")), document="page")


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / f"a{kind}", FORMATS[kind](DOCUMENTS))
    place = f"{file}, line 1" if kind == ".jsonl" else file
    with pytest.raises(UserError, match=rf"{place} has no column 'body'; it has id, text: set data.corpus.column"):
        read(file, column="body")


def test_a_line_of_jsonl_without_the_column_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"body": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3 has no column 'text'; it has body: set data.corpus.column"):
        read(file)


def test_a_line_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 is not a JSON object; fix or drop that line"):
        read(write(tmp_path / "a.jsonl", '["text"]\n'))


def test_a_column_without_text_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    message = r"a\.{}, {} {}: column '{}' holds {}, not text; name the text column with data\.corpus\.column"
    jsonl = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": ["b"]}\n')
    with pytest.raises(UserError, match=message.format("jsonl", "line", 2, "text", "list")):
        read(jsonl)
    rows: list[int | None] = [None] * 2000
    rows[1499] = 7  # in the second batch of rows
    pq.write_table(pa.table({"id": rows}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message.format("parquet", "row", 1500, "id", "int")):
        read(tmp_path / "a.parquet", column="id")


def test_an_unpaired_surrogate_is_an_error_before_it_reaches_the_tokenizer(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude42"}\n{"text": "a \\ud83d b"}\n')
    documents = TextFiles(paths=str(file)).documents()
    assert next(documents) == "🙂"
    with pytest.raises(
        UserError, match=rf"{file}, line 2: column 'text' holds an unpaired surrogate; fix or drop that row"
    ):
        next(documents)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".txt.gz", ".txt.zst"])
def test_text_that_is_not_utf8_is_an_error(tmp_path: Path, suffix: str) -> None:
    kind, compression = re.match(r"(\.[a-z]+)(.*)", suffix).groups()
    latin = FORMATS[kind](["cafe"]).replace(b"cafe", "café".encode("latin1"))
    file = write(tmp_path / f"a{suffix}", COMPRESSIONS[compression](latin))
    with pytest.raises(UserError, match=rf"{file} is not UTF-8: the byte 0xe9 stands after '.*'; convert it .*iconv"):
        read(file)


def test_the_fingerprint_changes_with_a_file_and_not_otherwise(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "text")

    def fingerprint(**options: Any) -> str:
        return json.dumps(TextFiles(paths=str(tmp_path), **options).fingerprint())

    first = fingerprint()
    file.read_text()
    write(tmp_path / "notes.md", "no part of the corpus")
    assert fingerprint() == first
    write(file, "more text")
    longer = fingerprint()
    os.utime(file, ns=(0, 0))
    older = fingerprint()
    write(tmp_path / "b.txt", "another file")
    variants = [first, longer, older, fingerprint(), fingerprint(column="body"), fingerprint(document="line")]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_link_is_read_as_its_own_name_says(tmp_path: Path, kind: str) -> None:
    suffix = re.match(r"\.[a-z]+", kind)[0]
    blob = write(tmp_path / "blobs/1111", COMPRESSIONS[kind.removeprefix(suffix)](FORMATS[suffix](DOCUMENTS)))
    link = tmp_path / f"snapshot/a{kind}"
    link.parent.mkdir()
    link.symlink_to(Path("../blobs") / blob.name)
    assert read(link) == read(link.parent) == read(link.parent / "*") == DOCUMENTS
    assert TextFiles(paths=str(link)).files == [link]


def test_two_links_to_one_blob_are_each_what_their_names_say(tmp_path: Path) -> None:
    blob = write(tmp_path / "blob", "text\none\n\ntwo\n")
    for name in ("a.csv", "b.txt", "c.txt"):
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(blob)
    assert read(tmp_path / "links") == ["one", "two", "text\none", "two"]


def test_a_folder_is_searched_through_links_and_a_link_back_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/deep/b.txt", "elsewhere")
    write(tmp_path / "folder/a.txt", "here")
    (tmp_path / "folder/back").symlink_to(tmp_path)
    (tmp_path / "folder/loop").symlink_to("loop")
    (tmp_path / "folder/self").symlink_to(".")
    (tmp_path / "folder/z").symlink_to(tmp_path / "elsewhere")
    assert sorted(read(tmp_path / "folder")) == ["elsewhere", "here"]
    (tmp_path / "link").symlink_to("folder")
    assert TextFiles(paths=str(tmp_path / "link")).files == TextFiles(paths=str(tmp_path / "folder")).files


@pytest.mark.parametrize("target", ["gone", "a.txt"])
@pytest.mark.parametrize("path", ["a.txt", ".", "*.txt"])
def test_a_link_to_nothing_is_an_error_and_not_less_text(tmp_path: Path, target: str, path: str) -> None:
    write(tmp_path / "b.txt", "text")
    (tmp_path / "a.txt").symlink_to(target)
    with pytest.raises(UserError, match=rf"{tmp_path}/a.txt is no file, or a link to none; restore what it links to"):
        TextFiles(paths=str(tmp_path / path))


def test_hidden_files_and_folders_are_no_part_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "book.txt", "book")
    write(tmp_path / "._book.txt", b"\x00\x05\x16\x07\xff")
    write(tmp_path / ".ipynb_checkpoints/book-checkpoint.txt", "book")
    write(tmp_path / "deep/.hidden/book.txt", "book")
    assert read(tmp_path) == read(tmp_path / "*") == read(tmp_path / "**/*.txt") == ["book"]
    assert read(tmp_path / "deep/.hidden") == read(tmp_path / "deep/.hidden/book.txt") == ["book"]


@pytest.mark.parametrize("name", ["A.TXT", "a.Txt.GZ", "A.JSONL.gz", "A.CSV", "a.PARQUET"])
def test_a_suffix_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    suffix, compression = re.match(r".(\.\w+)(.*)", name.lower()).groups()
    write(tmp_path / name, COMPRESSIONS[compression](FORMATS[suffix](DOCUMENTS)))
    assert read(tmp_path) == read(tmp_path / name) == DOCUMENTS


def test_files_of_other_kinds_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.md", "c.md", "d.PDF", "e.parquet.gz", "LICENSE", ".f.txt", ".git/a.txt"):
        write(tmp_path / "folder" / name, "no corpus")
    write(tmp_path / "folder/a.txt", "text")
    with caplog.at_level("INFO"):
        assert read(tmp_path / "folder") == ["text"]
        assert "folder: left out 7 files of other kinds: .gz 1, .md 2, .pdf 1, hidden 2, no suffix 1" in caplog.text
        caplog.clear()
        assert read(tmp_path / "folder/*") == ["text"]
        assert "left out 5 files of other kinds: .gz 1, .md 2, .pdf 1, no suffix 1" in caplog.text
        caplog.clear()
        read(tmp_path / "folder/a.txt")
        assert not caplog.text
    (tmp_path / "folder/a.txt").unlink()
    with pytest.raises(UserError, match="has an unknown format"):
        read(tmp_path / "folder")


def test_a_file_that_is_given_twice_is_read_once_at_its_first_place(tmp_path: Path) -> None:
    file = write(tmp_path / "b.txt", "b")
    write(tmp_path / "a.txt", "a")
    (tmp_path / "c.txt").symlink_to("b.txt")
    assert read(file, tmp_path, tmp_path / "*.txt", tmp_path / "../" / tmp_path.name) == ["b", "a"]


def test_a_folder_that_cannot_be_searched_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"cannot read {tmp_path}: .*Permission denied: '{tmp_path}/closed'"):
        TextFiles(paths=str(tmp_path))


def test_a_tilde_that_is_no_home_is_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "~draft.txt", "draft")
    assert read(Path("~draft.txt")) == ["draft"]


@pytest.mark.parametrize(
    ("row", "count"), [("1,The mill, by the river", 3), ("1", 1), ('1,"a, b",', 3), ("4,a\tb,c,d", 4)]
)
def test_a_row_with_more_or_fewer_fields_than_the_header_is_an_error(tmp_path: Path, row: str, count: int) -> None:
    file = write(tmp_path / "a.csv", f'id,text\n0,"two\nlines, quoted"\n\n{row}\n')
    with pytest.raises(UserError, match=rf"{file}, line 5 has {count} fields, but the header has 2; fix or drop that"):
        read(file)


@pytest.mark.parametrize(
    ("header", "found"), [("", "none"), (" ", "none"), (",", "none"), (" , \t", "none"), ("a,,b", "a, b")]
)
def test_a_header_without_the_column_or_without_names_says_so(tmp_path: Path, header: str, found: str) -> None:
    file = write(tmp_path / "a.csv", f"{header}\n" if header.strip() else f"{header}\n" * 3)
    with pytest.raises(UserError, match=rf"{file} has no column 'text'; it has {found}: set data.corpus.column"):
        read(file)


def test_white_space_around_the_names_of_a_header_is_none_of_them(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "id, text \n1, a\n2, b\n")) == ["a", "b"]


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000])
def test_json_beyond_the_limits_of_python_is_an_error_that_names_its_line(tmp_path: Path, value: str) -> None:
    file = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{{"text": "b", "more": {value}}}\n')
    with pytest.raises(
        UserError, match=rf"{file}, line 2 holds .* too many digits, or lists too deep .*; drop that line"
    ):
        read(file)


@pytest.mark.parametrize("text", ['[{"text": "One."}]', '[\n {"text": "One."},\n {"text": "Two."}\n]'])
def test_a_jsonl_file_that_is_one_array_is_an_error_with_the_cure(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"a.jsonl, line 1 is not a JSON object but of a JSON array; .* jq -c '\.\[\]'"):
        read(write(tmp_path / "a.jsonl", text))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a document be long at 1,600 characters."""
    for module in (corpus, text_files):
        monkeypatch.setattr(module, "LONGEST", 1600)
    return 1600


SENTENCES = [" ".join(random.Random(seed).choices(["mill", "river", "stone"], k=40)) for seed in range(40)]


@pytest.mark.parametrize("document", ["blank_line", "file"])
@pytest.mark.parametrize("joint", [" ", "\n", "\u3000"])
def test_a_long_document_is_read_in_parts_that_end_with_a_word(
    tmp_path: Path, short: int, document: str, joint: str
) -> None:
    text = joint.join(SENTENCES)
    parts = read(write(tmp_path / "a.txt", f"{text}\n"), document=document)
    assert len(parts) > 4
    assert max(map(len, parts)) <= short
    assert min(map(len, parts[:-1])) > 0.9 * short
    assert " ".join(parts).split() == text.split()


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_long_document_without_white_space_is_cut_where_it_must_be(tmp_path: Path, short: int, kind: str) -> None:
    text = "語" * (5 * short + 7)
    parts = read(write(tmp_path / f"a{kind}", FORMATS[kind]([text, "short"])))
    assert "".join(parts[:-1]) == text
    assert [len(part) for part in parts] == [short] * 5 + [7, 5]


def test_a_long_line_is_a_document_among_others(tmp_path: Path, short: int) -> None:
    lines = ["first", " ".join(SENTENCES), "last"]
    first, *parts, last = read(write(tmp_path / "a.txt", "\n".join(lines)), document="line")
    assert (first, last) == ("first", "last")
    assert " ".join(parts).split() == lines[1].split()
    assert max(map(len, parts)) <= short


def test_a_document_of_many_megabytes_is_read_with_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with file.open("w") as stream:
        stream.writelines("one line of a document that has no empty line\n" * 1000 for _ in range(1000))
    tracemalloc.start()
    try:
        size = sum(len(document) for document in TextFiles(paths=str(file)).documents())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 0.99 * file.stat().st_size
    assert peak < 0.3 * file.stat().st_size


def test_few_documents_of_very_many_lines_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write(tmp_path / "lines.txt", "".join(f"Sentence {number}.\n" for number in range(1000)))
    prose = write(tmp_path / "prose.txt", "\n\n".join(["A line.\nAnother line."] * 50))
    assert len(read(lines)) == 1
    assert (
        "1,000 lines of .txt are only 1 documents, because an empty line ends a document; set data.corpus.document=line"
    ) in caplog.text
    caplog.clear()
    read(prose)
    read(lines, document="line")
    read(lines, document="file")
    read(write(tmp_path / "empty.txt", ""))
    monkeypatch.setattr(text_files, "LONGEST", 10)
    read(write(tmp_path / "one.txt", "a line that is read in parts " * 100))
    assert not caplog.text


def test_text_of_parquet_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"fine", b"caf\xe9"]).view(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"cannot read {tmp_path}/a.parquet: .*0xe9"):
        read(tmp_path / "a.parquet")


def test_a_quote_that_is_never_closed_and_a_line_without_end_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "_LONGEST_FIELD", 10_000)
    open_quote = write(tmp_path / "a.csv", 'text\nfine\n"open\n' + "word word\n" * 400_000)
    one_line = write(tmp_path / "b.csv", "text\nfine\n" + "word " * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a.csv: the row that begins in line 3 .*limit \(10000\); .* take longer"):
            read(open_quote)
        with pytest.raises(UserError, match=r"b.csv: the row that begins in line 3 .*longer than 20,000 characters; "):
            read(one_line)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_text_of_many_lines_in_quotes_is_one_document(tmp_path: Path) -> None:
    text = 'a "quoted" word,\nand\r\nmore\n' * 3
    (tmp_path / "a.csv").write_text('n,text\r\n1,"' + text.replace('"', '""') + '"\r\n2,b\r\n', "utf-8", newline="")
    assert read(tmp_path / "a.csv") == [text.strip(), "b"]


def test_few_rows_of_a_parquet_file_are_in_memory(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["ba be bi " * 10_000] * 300}), tmp_path / "a.parquet")
    texts = TextFiles(paths=str(tmp_path / "a.parquet")).documents()
    next(texts)
    tracemalloc.start()
    try:
        assert sum(1 for _ in texts) == 299
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # of 27 MB
    finally:
        tracemalloc.stop()
