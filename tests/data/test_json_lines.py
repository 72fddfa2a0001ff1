import gzip
import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distilkit.data import corpus, json_lines
from distilkit.data.corpus import nonempty
from distilkit.data.json_lines import json_rows
from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError

_PIECES = ["mill", "río", "語", "\n", "\t", '"', "\\", "\\u12", "𝄞", "😀", " ", "\u3000", "/", "\u2028", "{", "}", ","]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a line be long at 300 characters, and a part of it at 40."""
    monkeypatch.setattr(json_lines, "LONG_LINE", 300)
    for module in (json_lines, corpus):
        monkeypatch.setattr(module, "LONGEST", 40)


def text_of(rng: random.Random, size: int) -> str:
    return "".join(rng.choices(_PIECES, k=size))


def object_of(rng: random.Random, size: int) -> dict[str, Any]:
    """Draw an object whose text has other values before and after it, some of them long, too."""
    others: list[Any] = [1, None, "a", text_of(rng, 60), {"text": text_of(rng, 60)}, [text_of(rng, 50), '"text"']]
    names = ["id", "url", "te\\xt", "texts"]
    before, after = ({name: rng.choice(others) for name in rng.sample(names, rng.randint(0, 3))} for _ in range(2))
    return {**before, "text": text_of(rng, size), **{name: after[name] for name in after if name not in before}}


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_long_line_gives_the_parts_that_its_whole_text_would(tmp_path: Path, seed: int, ascii_only: bool) -> None:
    rng = random.Random(seed)
    rows = [object_of(rng, rng.choice([0, 1, 30, 39, 40, 41, 42, 80, 500, 1000])) for _ in range(5)]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    end = rng.choice(["", "\n"])
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + end, "utf-8")
    found = list(TextFiles(paths=str(tmp_path / "a.jsonl")).documents())
    assert found == [part for row in rows for part in nonempty([row["text"]])]
    numbers = {number for number, _ in json_rows(tmp_path / "a.jsonl", column="text")}
    assert numbers == {1, 3, 5, 7, 9}


def test_lines_that_are_not_long_keep_their_objects_whole(tmp_path: Path) -> None:
    rows = [{"text": "a" * size, "id": size} for size in (10, 200, 270)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert [row for _, row in json_rows(tmp_path / "a.jsonl", column="text")] == rows
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a" * 999}), "utf-8")
    assert list(json_rows(tmp_path / "b.jsonl")) == [(1, {"text": "a" * 999})]  # as evaluation reads it


LONG = "word " * 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"text": "{LONG}', "is not a JSON object"),
        (f'{{"text": "{LONG}\n', "is not a JSON object"),
        (f'{{"text": "{LONG}"', "is not a JSON object but the beginning of one"),
        (f'{{"text": "{LONG}"]', "is not a JSON object; fix or drop"),
        (f'{{"text": "{LONG}\\u12', "holds an escape that there is not"),
        (f'{{"text": "{LONG}\\u12 and so on"}}', "holds an escape that there is not"),
        (f'{{"text": "{LONG}\\x"}}', "is not a JSON object"),
        (f'{{"text": "{LONG}\tx"}}', "holds a control character"),
        (f'{{"text": "{LONG}\\ud800"}}', "holds an unpaired surrogate"),
        (f'{{"text": "{LONG}\\ud800 x"}}', "holds an unpaired surrogate"),
        (f'{{"other": "{LONG}"}}', "has no column 'text'; it has other"),
        (f'["text", "{LONG}"]', "is not a JSON object"),
        (f'[{{"text": "{LONG}"}}]', "is not a JSON object but of a JSON array"),
        (f'{{"a": {{"text": "{LONG}"}}}}', "has no column 'text'; it has a"),
        (LONG, "is not a JSON object"),
    ],
)
def test_what_is_wrong_with_a_long_line_is_said_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "first"}}\n{line}', "utf-8")
    with pytest.raises(UserError, match=f"a.jsonl, line 2.*{message}"):
        list(TextFiles(paths=str(tmp_path / "a.jsonl")).documents())


def test_a_long_line_of_other_things_than_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_MOST_ELSE", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"numbers": [1] * 900, "text": "a"}), "utf-8")
    with pytest.raises(UserError, match="line 1 holds more than 1,000 characters besides long texts; drop that line"):
        list(TextFiles(paths=str(tmp_path / "a.jsonl")).documents())


def test_blanks_of_a_long_line_are_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(" " * 1000 + "\n" + '{"text": "a"}' + " " * 1000, "utf-8")
    assert list(TextFiles(paths=str(tmp_path / "a.jsonl")).documents()) == ["a"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_of_many_megabytes_is_read_with_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(json_lines, "LONG_LINE", 200_000)
    for module in (json_lines, corpus):
        monkeypatch.setattr(module, "LONGEST", 50_000)

    def parts() -> Iterator[str]:
        yield '{"id": 7, "text": "'
        for number in range(20_000):
            yield f"the mill stands at the river \\u8a9e {number} times\\n"
        yield '", "url": "x"}'

    file = tmp_path / f"a{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(file, "wt", encoding="utf-8") as stream:
        stream.writelines(parts())
    tracemalloc.start()
    try:
        sizes = [len(document) for document in TextFiles(paths=str(file)).documents()]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) > 700_000
    assert max(sizes) <= 50_000
    assert peak < 3_000_000
