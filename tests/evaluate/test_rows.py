"""Rows of tasks in each layout, and what is wrong with them."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from distilkit.errors import UserError
from distilkit.evaluate.rows import Example, FileSplit, HubSplit, label_of, read_examples


def read(split: Any, **changes: Any) -> list[Example]:
    settings: dict[str, Any] = {
        "texts": ["sentence"],
        "label": "label",
        "labels": ["negative", "positive"],
        "aliases": {},
        "skip_malformed": False,
    }
    return read_examples(split, **(settings | changes))


def written(folder: Path, name: str, text: str) -> FileSplit:
    (folder / name).write_text(text, "utf-8")
    return FileSplit(folder=folder, file=name)


def test_a_tab_separated_file_keeps_its_quotes(tmp_path: Path) -> None:
    split = written(tmp_path, "dev.tsv", 'sentence\tlabel\n"a quote opens\t1\nplain "inside" \t0\n')
    assert read(split) == [Example(texts=('"a quote opens',), label=1), Example(texts=('plain "inside" ',), label=0)]


def test_a_comma_separated_file_has_quoted_fields(tmp_path: Path) -> None:
    split = written(tmp_path, "dev.csv", 'label,sentence\npositive,"one, two"\n')
    assert read(split) == [Example(texts=("one, two",), label=1)]


def test_columns_are_renamed_and_a_byte_order_mark_is_no_letter(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("Quality\t#1 String\t#2 String\n1\tone\ttwo\n", "utf-8-sig")
    split = FileSplit(
        folder=tmp_path,
        file="train.*",
        columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    )
    assert read(split, texts=["sentence1", "sentence2"]) == [Example(texts=("one", "two"), label=1)]


def test_a_file_without_a_header_is_given_one(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("gj04\t1\t\tThey drank.\nbc01\t0\t*\tThey drank the pub.\n", "utf-8")
    split = FileSplit(folder=tmp_path, file="train.tsv", header=["source", "label", "star", "sentence"])
    assert read(split) == [
        Example(texts=("They drank.",), label=1),
        Example(texts=("They drank the pub.",), label=0),
    ]


def test_rows_of_one_language_are_kept(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("language\tsentence\tlabel\nen\tone\t1\nde\teins\t0\nen\ttwo\t0\n", "utf-8")
    split = FileSplit(folder=tmp_path, file="x.tsv", where={"language": "de"})
    assert read(split) == [Example(texts=("eins",), label=0)]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.xz", "jsonl.gz"])
def test_json_lines_are_read_compressed_or_not(suffix: str, tmp_path: Path) -> None:
    content = "".join(json.dumps({"sentence": f"text {n}", "label": n % 2}) + "\n" for n in range(3)).encode()
    pack = {"jsonl": bytes, "jsonl.xz": lzma.compress, "jsonl.gz": gzip.compress}[suffix]
    (tmp_path / f"train.{suffix}").write_bytes(pack(content))
    found = read(FileSplit(folder=tmp_path, file="train*"))
    assert found == [Example(texts=(f"text {n}",), label=n % 2) for n in range(3)]


def test_folders_named_as_labels_are_read_as_imdb_has_them(tmp_path: Path) -> None:
    for label, name, text in (("pos", "0_9", "good"), ("neg", "1_2", "bad"), ("unsup", "2_0", "unlabelled")):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / f"{name}.txt").write_text(text, "utf-8")
    found = read(FileSplit(folder=tmp_path, file="train*"), texts=["text"], labels=["neg", "pos"])
    assert found == [Example(texts=("bad",), label=0), Example(texts=("good",), label=1)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("positive", 1), ("1", 1), (1, 1), ("0", 0), ("2", None), (-1, None), ("", None), ("good", 1), ("POSITIVE", None)],
)
def test_a_label_is_a_name_an_alias_or_an_id(value: Any, expected: float | None) -> None:
    assert label_of(value, labels=["negative", "positive"], aliases={"good": "positive"}) == expected


def test_labels_that_are_numbers_are_names() -> None:
    stars = ["1", "2", "3"]
    found = [label_of(value, labels=stars, aliases={}) for value in ("0", "1", 3, "4")]
    assert found == [None, 0, 2, None]


@pytest.mark.parametrize(
    ("value", "expected"), [("3.5", 3.5), (2, 2.0), ("much", None), (None, None), ("nan", None), ("inf", None)]
)
def test_a_number_is_a_number(value: Any, expected: float | None) -> None:
    assert label_of(value, labels=None, aliases={}) == expected


BROKEN = "sentence\tlabel\nfine\t1\nno label\nalso fine\t0\ttoo much\nodd\tmaybe\n"


def test_malformed_rows_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    split = written(tmp_path, "dev.tsv", BROKEN)
    message = (
        "3 of 4 rows cannot be used; the first: line 3 has 1 fields, but the header has 2.*task.skip_malformed=true"
    )
    with pytest.raises(UserError, match=message):
        read(split)
    assert read(split, skip_malformed=True) == [Example(texts=("fine",), label=1)]


def test_a_label_outside_the_set_is_named_with_the_set(tmp_path: Path) -> None:
    split = written(tmp_path, "dev.tsv", "sentence\tlabel\none\t7\n")
    with pytest.raises(UserError, match="line 2 has label '7', not one of negative, positive"):
        read(split)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable row \\(0 were read\\); check task.data_dir"):
        read(written(tmp_path, "dev.tsv", "sentence\tlabel\n"))


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column sentence; it has text, label"):
        read(written(tmp_path, "dev.tsv", "text\tlabel\none\t1\n"))


def test_a_missing_file_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "other.tsv").write_text("", "utf-8")
    with pytest.raises(
        UserError, match="has 0 files 'dev.*', but one is needed; it holds other.tsv; set task.data_dir"
    ):
        read(FileSplit(folder=tmp_path, file="dev.*"))


def test_two_files_for_one_split_are_an_error(tmp_path: Path) -> None:
    for name in ("dev.tsv", "dev.csv"):
        (tmp_path / name).write_text("", "utf-8")
    with pytest.raises(UserError, match="has 2 files 'dev.*'"):
        read(FileSplit(folder=tmp_path, file="dev.*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev.tsv", b"sentence\tlabel\n\xff\xfe\t1\n", "{} is not UTF-8: .*; convert it first"),
        ("dev.tsv.gz", gzip.compress(b"sentence\tlabel\none\t1\n" * 99)[:-20], "cannot read .*{}: .*may be cut short"),
        ("dev.tsv.gz", b"sentence\tlabel\none\t1\n", "cannot read .*{}: .* not what its name says"),
        ("dev.jsonl.xz", lzma.compress(b"{}" * 999)[:-20], "cannot read .*{}: .*may be cut short"),
    ],
    ids=["not UTF-8", "gzip cut short", "not gzip", "xz cut short"],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message.format(name)):
        read(FileSplit(folder=tmp_path, file="dev.*"))


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"sentence": "one", "label": 1}\n\n', "utf-8-sig")
    (tmp_path / "b.tsv").write_text("sentence\tlabel\n\none\t1\n\n", "utf-8")
    for name in ("a.jsonl", "b.tsv"):
        assert read(FileSplit(folder=tmp_path, file=name)) == [Example(texts=("one",), label=1)]


def test_a_text_may_be_longer_than_what_csv_reads_by_default(tmp_path: Path) -> None:
    split = written(tmp_path, "dev.tsv", f"sentence\tlabel\n{'ab ' * 100_000}\t1\n")
    assert len(read(split)[0].texts[0]) == 300_000


def test_a_folder_of_texts_is_for_one_text(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="is a folder of single texts, but this task reads a, b"):
        read(FileSplit(folder=tmp_path, file="train"), texts=["a", "b"])


def test_a_line_that_is_no_json_is_malformed(tmp_path: Path) -> None:
    split = written(tmp_path, "dev.jsonl", '{"sentence": "one", "label": 1}\n{"sentence": \n[1]\n')
    with pytest.raises(UserError, match="2 of 3 rows cannot be used; the first: line 2"):
        read(split)


def test_a_data_set_of_the_hub_is_read_and_its_absence_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "one", "label": 1}\n{"sentence": "two", "label": 0}\n', "utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = read(HubSplit(path=str(tmp_path), split="train"))  # a folder is read as the hub's repositories are
    assert found == [Example(texts=("one",), label=1), Example(texts=("two",), label=0)]
    with pytest.raises(UserError, match="cannot open data set 'nobody/nothing' .*task.data_dir=<folder>"):
        read(HubSplit(path="nobody/nothing", split="train"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev.jsonl", '[{"sentence": "one", "label": 1}]', "line 1 is not a JSON object but of a JSON array"),
        ("dev.jsonl", '{"sentence": "one", "label": ' + "1" * 5000 + "}", "line 1 holds a number of too many digits"),
        ("dev.jsonl", '{"sentence": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 holds .* lists too deep"),
        ("dev.jsonl", '{"sentence": null, "label": 1}', "line 1 has no text in sentence"),
        ("dev.csv", "sentence,label\nto be, or not,1\n", "line 2 has 3 fields, but the header has 2"),
        ("dev.csv", 'sentence,label\n"open,1\n', "row that begins in line 2 cannot be read"),
        ("dev.tsv", "sentence\tlabel\none\t" + "1" * 5000, "line 2 has label '1111"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(written(tmp_path, name, content))


def test_white_space_around_the_names_of_a_header_is_none_of_them(tmp_path: Path) -> None:
    split = written(tmp_path, "dev.CSV", "sentence, label \none,1\n")
    assert read(split) == [Example(texts=("one",), label=1)]


def test_hidden_files_are_no_part_of_a_task_and_capitals_are(tmp_path: Path) -> None:
    for name in ("train/pos/a.TXT", "train/pos/._a.txt", "train/.ipynb_checkpoints/a.txt", "._train"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\ufeffgood", "utf-8")
    found = read(FileSplit(folder=tmp_path, file="*train"), texts=["text"], labels=["neg", "pos"])
    assert found == [Example(texts=("good",), label=1)]
