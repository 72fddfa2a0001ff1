import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from distilkit.data.corpus import Concatenation
from distilkit.data.docstrings import Docstrings, module_docstrings
from distilkit.data.hub import HubDataset, MultilingualWikipedia, sampling_probabilities
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


def test_an_unknown_end_of_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="document is 'page'; it takes blank_line, line or file"):
        TextFiles(paths=str(write(tmp_path / "a.txt", "a")), document="page")


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / f"a{kind}", FORMATS[kind](DOCUMENTS))
    with pytest.raises(UserError, match=rf"{file} has no column 'body'; it has id, text: set data.corpus.column"):
        read(file, column="body")


def test_a_line_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 is not a JSON object; fix or drop that line"):
        read(write(tmp_path / "a.jsonl", '["text"]\n'))


def test_a_column_without_text_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    message = r"a\.{}, row {}: column '{}' holds {}, not text; name the text column with data\.corpus\.column"
    jsonl = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": ["b"]}\n')
    with pytest.raises(UserError, match=message.format("jsonl", 2, "text", "list")):
        read(jsonl)
    rows: list[int | None] = [None] * 2000
    rows[1499] = 7  # in the second batch of rows
    pq.write_table(pa.table({"id": rows}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message.format("parquet", 1500, "id", "int")):
        read(tmp_path / "a.parquet", column="id")


def test_an_unpaired_surrogate_is_an_error_before_it_reaches_the_tokenizer(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude42"}\n{"text": "a \\ud83d b"}\n')
    documents = TextFiles(paths=str(file)).documents()
    assert next(documents) == "🙂"
    with pytest.raises(UserError, match=rf"{file}, row 2: unpaired surrogate; fix or drop that row"):
        next(documents)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".txt.gz", ".txt.zst"])
def test_text_that_is_not_utf8_is_an_error(tmp_path: Path, suffix: str) -> None:
    kind, compression = re.match(r"(\.[a-z]+)(.*)", suffix).groups()
    latin = FORMATS[kind](["cafe"]).replace(b"cafe", "café".encode("latin1"))
    file = write(tmp_path / f"a{suffix}", COMPRESSIONS[compression](latin))
    with pytest.raises(UserError, match=rf"{file} is not UTF-8: .* at byte \d+ of its chunk; convert it .*iconv"):
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


def test_a_concatenation_reads_and_names_its_parts_in_order(tmp_path: Path) -> None:
    one = TextFiles(paths=str(write(tmp_path / "one.txt", "a\n\nb")))
    two = TextFiles(paths=str(write(tmp_path / "two.txt", "c")))
    both = Concatenation(parts=[one, two])
    assert list(both.documents()) == list(both.documents()) == ["a", "b", "c"]
    assert both.fingerprint() != Concatenation(parts=[two, one]).fingerprint()


Hub = dict[str | None, datasets.IterableDataset]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A stand-in for the hub: data sets in memory by the name of their config; others cannot be reached."""
    stored: Hub = {}

    def load_dataset(path: str, name: str | None = None, *, streaming: bool, **_: Any) -> datasets.IterableDataset:
        if name not in stored:
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nand a second line")
        assert streaming
        return stored[name]

    def load_dataset_builder(path: str, name: str) -> Any:
        train = SimpleNamespace(num_examples=sum(1 for _ in stored[name]))
        return SimpleNamespace(info=SimpleNamespace(splits={"train": train}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return stored


def rows_of(**columns: list[Any]) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict(columns).to_iterable_dataset()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["= A =", "a1", "a2", "= B =", "b1", "= C ="]),
        ({"rows_per_document": 3}, ["= A =\n\na1", "a2\n= B =\nb1", "= C ="]),
        ({"rows_per_document": 100}, ["= A =\n\na1\na2\n= B =\nb1\n\n= C ="]),
        ({"document_start": "= "}, ["= A =\n\na1\na2", "= B =\nb1", "= C ="]),
    ],
)
def test_rows_of_the_hub_are_joined_into_documents(hub: Hub, options: dict[str, Any], expected: list[str]) -> None:
    hub[None] = rows_of(id=list(range(8)), text=["= A =", None, "a1", "a2", "= B =", "b1", "", "= C ="])
    assert list(HubDataset(path="wiki", **options).documents()) == expected


def test_rows_before_the_first_heading_are_a_document(hub: Hub) -> None:
    hub[None] = rows_of(text=["preface", "= A =", "a"])
    assert list(HubDataset(path="wiki", document_start="=").documents()) == ["preface", "= A =\na"]


def test_wikitext_headings_begin_documents_and_subheadings_do_not(hub: Hub) -> None:
    pattern = OmegaConf.load(Path(__file__).parents[2] / "conf/train/data/wikitext103.yaml").corpus.document_start
    articles = [
        " = Robert Boulter = \n",
        "",
        " Actor . \n",
        " = = Career = = \n",
        " = = = 2000 = = = \n",
        " = Du Fu = \n",
    ]
    hub[None] = rows_of(text=articles)
    documents = list(HubDataset(path="wikitext", document_start=pattern).documents())
    assert [document.splitlines()[0].strip() for document in documents] == ["= Robert Boulter =", "= Du Fu ="]


def test_a_stream_without_known_columns_is_read_by_its_first_row(hub: Hub) -> None:
    hub[None] = datasets.IterableDataset.from_generator(lambda: iter([{"body": "a", "id": 1}, {"body": "b", "id": 2}]))
    assert list(HubDataset(path="web", column="body").documents()) == ["a", "b"]
    with pytest.raises(UserError, match=r"data set 'web' has no column 'text'; it has body, id: set data\.corpus\.col"):
        list(HubDataset(path="web").documents())


def test_a_data_set_without_rows_has_no_column(hub: Hub) -> None:
    hub[None] = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(UserError, match="no column 'text'; it has none"):
        list(HubDataset(path="web").documents())


def test_a_column_of_the_hub_without_text_is_an_error(hub: Hub) -> None:
    hub[None] = rows_of(text=[1, 2])
    with pytest.raises(UserError, match=r"'web': column 'text' holds int, not text; name the text column with data\.c"):
        list(HubDataset(path="web").documents())


def test_a_hub_that_cannot_be_reached_is_an_error_of_one_line(hub: Hub) -> None:
    with pytest.raises(UserError) as caught:
        list(HubDataset(path="c4", name="de", split="validation").documents())
    assert str(caught.value) == (
        "cannot open data set 'c4' (config 'de', split 'validation'): Couldn't reach 'c4' on the Hub; check the names, "
        "and that the hub can be reached"
    )


@pytest.mark.parametrize("failure", [ConnectionError(), ValueError("Bad split: x"), RuntimeError("no loading scripts")])
def test_whatever_the_hub_answers_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=re.escape(str(failure) or repr(failure)) + "; check the names"):
        list(HubDataset(path="c4").documents())


def test_fewer_than_one_row_a_document_is_an_error() -> None:
    with pytest.raises(UserError, match="rows_per_document=0, but it must be at least 1"):
        HubDataset(path="books", rows_per_document=0)


@pytest.mark.parametrize("argument", ["path", "name", "split", "column", "revision", "document_start"])
def test_the_fingerprint_of_a_data_set_changes_with_each_argument(argument: str) -> None:
    base = {"path": "a"}
    assert HubDataset(**base).fingerprint() == HubDataset(**base).fingerprint()
    assert HubDataset(**base | {argument: "b"}).fingerprint() != HubDataset(**base).fingerprint()


def test_wikipedias_are_sampled_by_the_power_of_their_size() -> None:
    large, small = sampling_probabilities([1_000_000, 1_000], 0.7)
    assert large + small == pytest.approx(1)
    assert large / small == pytest.approx(1000**0.7)


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, [1 / 3] * 3), (1.0, [0.1, 0.3, 0.6])])
def test_the_exponents_bounds_are_all_alike_and_by_size(exponent: float, expected: list[float]) -> None:
    assert sampling_probabilities([10, 30, 60], exponent) == pytest.approx(expected)


def test_wikipedias_are_mixed_by_that_probability_until_each_was_read_whole(hub: Hub) -> None:
    sizes = {"en": 1500, "is": 40}
    for language, size in sizes.items():
        hub[f"2023.{language}"] = rows_of(text=[f"{language} {number}" for number in range(size)], id=[0] * size)
    wikipedia = MultilingualWikipedia(languages=list(sizes), date="2023", exponent=0.7, seed=0)
    documents = list(wikipedia.documents())
    assert set(documents) == {f"{language} {number}" for language, size in sizes.items() for number in range(size)}
    share = sum(document.startswith("is") for document in documents) / len(documents)
    expected = 40**0.7 / (40**0.7 + 1500**0.7)
    assert abs(share - expected) < 5 * (expected * (1 - expected) / len(documents)) ** 0.5
    assert documents == list(wikipedia.documents())


def test_another_seed_mixes_wikipedias_otherwise_and_is_another_corpus(hub: Hub) -> None:
    for language in ("en", "is"):
        hub[f"2023.{language}"] = rows_of(text=[f"{language} {number}" for number in range(100)])
    first, second = (
        MultilingualWikipedia(languages=["en", "is"], date="2023", exponent=0.7, seed=seed) for seed in (0, 1)
    )
    assert list(first.documents()) != list(second.documents())
    assert first.fingerprint() != second.fingerprint()


def test_a_missing_language_is_an_error_that_names_it(hub: Hub) -> None:
    wikipedia = MultilingualWikipedia(languages=["tlh"], date="2023", exponent=0.7, seed=0)
    with pytest.raises(UserError, match=r"config '2023\.tlh'.*check the names, and that the hub can be reached"):
        list(wikipedia.documents())


def test_no_language_is_an_error() -> None:
    with pytest.raises(UserError, match=r"languages is empty; list at least one, as \[en,de\]"):
        MultilingualWikipedia(languages=[], date="2023", exponent=0.7, seed=0)


@pytest.mark.parametrize("exponent", [-0.1, 1.1])
def test_an_exponent_out_of_range_is_an_error(exponent: float) -> None:
    with pytest.raises(UserError, match=rf"exponent={exponent}, but it must be between 0 .* and 1"):
        MultilingualWikipedia(languages=["en"], date="2023", exponent=exponent, seed=0)


SOURCE = '''"""The module."""
import os

def function(x: int) -> int:
    """The function,

        indented,
    and not.
    """
    def inner():
        """The inner function."""
    return "a string"

class Outer:
    """The outer class."""
    attribute = """no docstring"""

    class Inner:
        """The inner class."""

        async def method(self):
            "The method."

    def undocumented(self): ...
'''


def test_the_docstrings_of_a_module_are_listed_outermost_first(tmp_path: Path) -> None:
    assert module_docstrings(write(tmp_path / "module.py", SOURCE)) == [
        "The module.",
        "The function,\n\n    indented,\nand not.",
        "The inner function.",
        "The outer class.",
        "The inner class.",
        "The method.",
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b'"""Two."""\nprint "a"', []),
        (b'"""Null."""\0', []),
        (b'"""caf\xe9"""', []),
        (b'# coding: latin1\n"""caf\xe9"""', ["café"]),
        (b'"""Half: \\ud83d."""\nclass A:\n    """Whole."""', ["Whole."]),
        (rb'"""An invalid \escape."""', [r"An invalid \escape."]),
        (b"", []),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_module_that_does_not_parse_has_no_docstrings(tmp_path: Path, source: bytes, expected: list[str]) -> None:
    assert module_docstrings(write(tmp_path / "module.py", source)) == expected


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the path with copies of docstrings, tests, and a module that must not be imported."""
    root = tmp_path / "site/littlepackage"
    write(root / "__init__.py", '"""Package."""\nraise RuntimeError("imported")\n')
    write(root / "a.py", '"""A."""\ndef f():\n    """Copy."""\ndef g():\n    """Copy."""\n')
    write(root / "deep/b.py", '"""Copy."""\nclass B:\n    """B."""\n')
    write(root / "deep/copy.py", '"""Copy."""\n')
    write(root / "tests/test_a.py", '"""Not a test."""\n')
    write(root / "broken.py", "def")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "littlepackage"


def test_docstrings_are_one_document_a_module_without_copies(package: str) -> None:
    docstrings = Docstrings(packages=[package])
    assert list(docstrings.documents()) == list(docstrings.documents()) == ["Package.", "A.\n\nCopy.", "B."]


def test_many_modules_are_parsed_in_processes_to_the_same_documents(tmp_path: Path, package: str) -> None:
    for number in range(1000):
        write(tmp_path / f"site/{package}/many/{number:04}.py", f'"""Module {number}."""')
    documents = list(Docstrings(packages=[package], num_workers=2).documents())
    assert documents == ["Package.", "A.\n\nCopy.", "B.", *(f"Module {number}." for number in range(1000))]


def test_installed_packages_give_their_own_docstrings_once() -> None:
    docstrings = Docstrings(packages=["json", "email"])
    documents = list(docstrings.documents())
    assert any(json.dumps.__doc__.split("\n")[0] in document for document in documents)
    assert len(documents) <= len(docstrings.files())
    assert len(set(documents)) == len(documents)


def test_stdlib_is_pythons_own_library_without_tests_and_installed_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = Docstrings(packages=["stdlib"]).files()
    assert {root / "json/__init__.py", root / "ast.py"} <= set(files)
    assert not [file for file in files if {"site-packages", "test", "tests"} & set(file.relative_to(root).parts)]


def test_the_fingerprint_of_docstrings_names_versions() -> None:
    versions = Docstrings(packages=["json", "numpy", "pytorch_lightning"]).fingerprint()["docstrings"]
    import numpy
    import pytorch_lightning

    assert versions == {
        "json": sys.version,
        "numpy": numpy.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
    }


@pytest.mark.parametrize("name", ["nosuchpackage", "nosuchpackage.part", "json.nothing", "__main__", "bisect"])
def test_what_is_no_installed_package_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not an installed package; install it or drop it from the list"):
        Docstrings(packages=[name])
