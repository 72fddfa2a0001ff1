"""A cache that several processes prepare is, byte for byte, the one that a single process makes."""

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

import distilkit.prepare
import distilkit.train
from distilkit.data import shards
from distilkit.data.cache import cache_key, open_cache, prepare
from distilkit.data.corpus import Concatenation, Piece
from distilkit.data.hub import HubDataset
from distilkit.data.shards import check_shard, deal, pieces_of, prepare_shard
from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError
from jobs import call, spawn
from tiny import make_documents

Content = dict[str, bytes]


class Texts:
    """A corpus in memory that counts the documents that are read; with ``sizes`` it has pieces of so many documents."""

    def __init__(self, documents: Iterable[str], *, sizes: tuple[int, ...] = ()) -> None:
        self.texts, self.reads = list(documents), 0
        if sizes:
            self.pieces = lambda: [
                Piece(size, lambda size=size, end=end: self._read(self.texts[end - size : end]))
                for size, end in zip(sizes, np.cumsum(sizes).tolist(), strict=True)
            ]

    def fingerprint(self) -> dict[str, Any]:
        return {"name": "texts"}

    def documents(self) -> Iterator[str]:
        return self._read(self.texts)

    def _read(self, documents: list[str]) -> Iterator[str]:
        for document in documents:
            self.reads += 1
            yield document


def content(folder: Path) -> Content:
    """Return the bytes of all files."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def by_one(corpus: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Content:
    return content(prepare(corpus, tokenizer, cache_dir=folder, val_share=0.2))


def make(corpus: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, shard: int | None, of: int) -> list[Path]:
    """Prepare a shard in chunks of at most 7 documents."""
    place: dict[str, Any] = {"cache_dir": folder, "val_share": 0.2, "batch_documents": 7}
    return prepare_shard(corpus, tokenizer, shard=shard, num_shards=of, **place)


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("seed", range(12))
def test_shards_in_any_order_are_joined_into_the_cache_of_one_process(
    seed: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng = random.Random(seed)
    sizes = tuple(rng.choice([0, 1, 3, 20, 150]) for _ in range(rng.randint(0, 9)))
    documents = make_documents(sum(sizes) if sizes else rng.randint(1, 300), seed=seed)
    if not documents:
        documents, sizes = ["ba be"], (1,)
    of = rng.randint(1, 7)
    expected = by_one(Texts(documents, sizes=sizes), tokenizer, tmp_path / "one")
    key = cache_key(Texts(documents), tokenizer, val_share=0.2)
    order = rng.sample(range(of), of)
    for done, shard in enumerate(order, start=1):
        missing = make(Texts(documents, sizes=sizes), tokenizer, tmp_path / "many", shard, of)
        assert missing == [tmp_path / "many" / f"{key}-{each}-of-{of}" for each in sorted(order[done:])]
    assert folders(tmp_path / "many") == [key]
    assert content(tmp_path / "many" / key) == expected
    assert (
        open_cache(tmp_path / "many" / key, tokenizer).meta["documents"]
        == json.loads(expected["meta.json"])["documents"]
    )


def test_a_shard_reads_the_pieces_that_are_its_own_and_those_too_large_for_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = make_documents(100)
    sizes = 40, 15, 15, 15, 15
    assert deal(sizes, 4) == [None, 0, 1, 2, 3]
    for shard in range(4):
        corpus = Texts(documents, sizes=sizes)
        make(corpus, tokenizer, tmp_path, shard, 4)
        assert corpus.reads == 40 + 15


@pytest.mark.parametrize(
    ("sizes", "of", "owners"),
    [
        ([1, 1, 1, 1], 4, [0, 1, 2, 3]),
        ([1, 1], 3, [None, None]),
        ([5, 1, 1, 1, 1, 1], 2, [0, 1, 1, 1, 1, 1]),
        ([100, 101, 99, 100], 4, [1, 0, 3, 2]),
        ([0, 0], 2, [0, 0]),
        ([7], 1, [0]),
        ([], 3, []),
    ],
)
def test_pieces_are_dealt_by_size(sizes: list[int], of: int, owners: list[int | None]) -> None:
    assert deal(sizes, of) == owners


def test_files_are_pieces_with_the_documents_of_the_corpus_in_order(tmp_path: Path) -> None:
    documents = make_documents(60)
    (tmp_path / "a.txt").write_text("\n\n".join(documents[:20]), "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[20:50]), "utf-8")
    (tmp_path / "c.csv").write_text("text\n" + "\n".join(documents[50:]) + "\n", "utf-8")
    corpus = TextFiles(paths=str(tmp_path))
    (pieces,) = pieces_of(corpus)
    assert [size for size, _ in pieces] == [file.stat().st_size for file in sorted(tmp_path.iterdir())]
    assert [len(list(piece.documents())) for piece in pieces] == [20, 30, 10]
    assert [text for piece in pieces for text in piece.documents()] == list(corpus.documents()) == documents
    both = pieces_of(Concatenation(parts=[corpus, Texts(["ba"])]))
    assert [len(group) for group in both] == [3, 1]


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 4), ({"rows_per_document": 2}, 1), ({"document_start": "b"}, 1)]
)
def test_files_of_the_hub_are_pieces_unless_a_document_may_span_two_of_them(
    options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_dict({"text": make_documents(50), "id": list(range(50))}).to_iterable_dataset(4)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    corpus = HubDataset(path="web", **options)
    (pieces,) = pieces_of(corpus)
    assert len(pieces) == expected
    assert [text for piece in pieces for text in piece.documents()] == list(corpus.documents())


def test_documents_are_split_and_tokenized_once_each(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    documents, of = make_documents(200), 3
    sizes = []
    for shard in range(of - 1):
        (_, *_) = make(Texts(documents), tokenizer, tmp_path, shard, of)
        (folder,) = tmp_path.glob(f"*-{shard}-of-{of}")
        index = np.array(json.loads((folder / "index.json").read_text("utf-8"))["chunks"])
        assert index[:, 1].tolist() == list(range(shard, 29, of))  # every third of 29 chunks
        sizes.append(int(index[:, [2, 4]].sum()))
    assert sizes == [70, 67]  # the last chunk holds four documents


# --------------------------------------------------------------------------- what is missing or damaged


def test_without_a_shard_of_its_own_a_call_joins_what_is_there_or_names_what_is_missing(
    tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path]
) -> None:
    given = "teacher=hf", f"teacher.name={save_teacher('bert')}", "data=text", f"data.corpus.paths={text_file}"
    shared = *given, "data.block_size=32", "data.num_shards=2", f"cache_dir={tmp_path}/shared"
    first = call(distilkit.prepare.main, *shared, "data.shard=1", cwd=tmp_path)
    assert json.loads(first.out.splitlines()[-1]) == {"shard": 1, "num_shards": 2, "missing": 1}, first.err
    for command in (distilkit.prepare.main, distilkit.train.main):
        asked = call(command, *shared, cwd=tmp_path)
        assert asked.code == 1
        assert "error: 1 of 2 shards are missing, the first is " in asked.err
        assert "-0-of-2; prepare data.shard=0, or leave out data.num_shards" in asked.err
    last = call(distilkit.prepare.main, *shared, "data.shard=0", cwd=tmp_path)
    one = call(distilkit.prepare.main, *given, f"cache_dir={tmp_path}/one", cwd=tmp_path)
    joined, whole = (json.loads(each.out.splitlines()[-1]) for each in (last, one))
    assert joined["tokens"] == whole["tokens"]
    assert content(Path(joined["cache"])) == content(Path(whole["cache"]))
    again = call(distilkit.prepare.main, *shared, "data.shard=1", cwd=tmp_path)
    assert json.loads(again.out.splitlines()[-1]) == joined
    assert folders(tmp_path / "shared") == [Path(joined["cache"]).name]


def test_a_training_is_refused_a_shard(tmp_path: Path, text_file: Path) -> None:
    given = "data=text", f"data.corpus.paths={text_file}", "data.num_shards=2", "data.shard=1"
    refused = call(distilkit.train.main, *given, cwd=tmp_path)
    assert refused.code == 1
    assert "data.shard=1 is for distilkit.prepare, and a training reads all text; leave it out" in refused.err


@pytest.mark.parametrize(
    ("shard", "of", "message"),
    [
        (0, None, "data.shard=0, but data.num_shards=null: also set data.num_shards, as 4"),
        (4, 4, "data.shard=4, but data.num_shards=4: it takes 0 to 3"),
        (-1, 4, "data.shard=-1, but it must be a whole number of at least 0"),
        (0, 0, "data.num_shards=0, but it must be a whole number of at least 1"),
        (0, 10**9, "data.num_shards=1000000000, but it must be at most 100,000: each shard is a folder"),
        ("a", 4, "data.shard=a, but it must be a whole number"),
        (True, 4, "data.shard=True, but it must be a whole number"),
        (1.0, 4, "data.shard=1.0, but it must be a whole number"),
    ],
)
def test_a_shard_out_of_range_is_refused(shard: Any, of: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_shard(shard, of)
    assert message in str(caught.value)


def test_shards_of_other_text_are_not_joined(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    make(Texts(make_documents(50)), tokenizer, tmp_path, 0, 2)
    with pytest.raises(UserError, match="were made of other text each, or in other batches; delete them, and prepare"):
        make(Texts(make_documents(90)), tokenizer, tmp_path, 1, 2)
    assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_shard_that_is_damaged_is_named(
    name: str, damage: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    make(Texts(make_documents(90)), tokenizer, tmp_path, 0, 2)
    (folder,) = tmp_path.glob("*-0-of-2")
    whole = (folder / name).read_bytes()
    middle = len(whole) // 2
    (folder / name).unlink()
    if damage != "gone":
        flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        (folder / name).write_bytes(whole[:-48] if damage == "cut" else flipped)
    with pytest.raises(UserError) as caught:
        make(Texts(make_documents(90)), tokenizer, tmp_path, 1, 2)
    assert str(caught.value) == f"the shard {folder} is damaged; delete it, and prepare data.shard=0 again"
    shutil.rmtree(folder)
    assert make(Texts(make_documents(90)), tokenizer, tmp_path, 0, 2) == []


def test_too_little_room_is_said_before_anything_is_joined_and_the_shards_are_kept(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    documents = make_documents(90)
    make(Texts(documents), tokenizer, tmp_path / "many", 0, 2)
    with monkeypatch.context() as small:
        small.setattr(shards.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(
            UserError, match="the cache of 2 shards takes 0.0 MB, but the disk of .* has 0.0 MB free; free"
        ):
            make(Texts(documents), tokenizer, tmp_path / "many", 1, 2)
    assert len(folders(tmp_path / "many")) == 2
    caplog.set_level("INFO")
    assert make(Texts(documents), tokenizer, tmp_path / "many", None, 2) == []
    assert "joining 2 shards of " in caplog.text
    (name,) = folders(tmp_path / "many")
    assert content(tmp_path / "many" / name) == by_one(Texts(documents), tokenizer, tmp_path / "one")


# ------------------------------------------------------------------------------------ several processes

CHILD = """
import os, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from distilkit.data.shards import prepare_shard
from distilkit.data.text_files import TextFiles

class Dying(TextFiles):
    def documents(self):
        for number, document in enumerate(super().documents()):
            if number == 30:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document
    pieces = None

folder, shard, dies = Path(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3
corpus = (Dying if dies else TextFiles)(paths=str(folder / "corpus.txt"))
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
prepare_shard(corpus, tokenizer, cache_dir=folder / "cache", val_share=0.2, shard=shard, num_shards=2, batch_documents=7)
"""


def start(folder: Path, shard: int, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(shard), *more], stderr=subprocess.PIPE)


@pytest.fixture
def place(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus.txt").write_text("\n\n".join(make_documents(90)), "utf-8")
    return tmp_path


def test_a_killed_shard_is_made_again_and_two_processes_at_one_shard_do_not_meet(
    place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    killed = start(place, 0, "dies")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [".tmp" in name for name in folders(place / "cache")] == [True]
    with ThreadPoolExecutor() as pool:
        processes = [start(place, shard) for shard in (0, 0, 1)]
        errors = list(pool.map(lambda process: process.communicate()[1], processes))
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    (name,) = folders(place / "cache")
    expected = by_one(TextFiles(paths=str(place / "corpus.txt")), tokenizer, place / "one")
    assert content(place / "cache" / name) == expected


def test_a_process_that_waited_for_the_last_shard_does_not_make_it_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make_documents(40)
    real = shards.make_once

    def late(cache_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
        monkeypatch.setattr(shards, "make_once", real)
        prepare(Texts(documents), tokenizer, cache_dir=cache_dir, val_share=0.2)  # meanwhile another one ends
        return real(cache_dir, name, write)

    monkeypatch.setattr(shards, "make_once", late)
    corpus = Texts(documents)
    assert make(corpus, tokenizer, tmp_path, 0, 2) == []
    assert corpus.reads == 0
    assert len(folders(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer_option", ["pretrained", "bpe"])
def test_four_shards_by_joblib_are_the_cache_of_one_process(
    tokenizer_option: str, tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path]
) -> None:
    name = save_teacher("bert")
    given = ["data=text", f"data.corpus.paths={text_file}", "teacher=hf", f"teacher.name={name}"]
    if tokenizer_option == "bpe":
        given = [*given[:2], "teacher=none", "tokenizer=bpe", "tokenizer.vocab_size=300"]
    many = spawn(
        *("-m", "distilkit.prepare", "-m", *given),
        *("data.num_shards=4", "data.shard=0,1,2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        f"cache_dir={tmp_path}/many",
        cwd=tmp_path,
    )
    assert many.code == 0, many.out + many.err
    assert "Traceback" not in many.out + many.err
    one = call(distilkit.prepare.main, *given, f"cache_dir={tmp_path}/one", cwd=tmp_path)
    assert one.code == 0, one.err
    (joined,), (whole,) = (
        [folder for folder in (tmp_path / each).iterdir() if (folder / "meta.json").exists()]
        for each in ("many", "one")
    )
    assert content(joined) == content(whole)
    assert len([name for name in folders(tmp_path / "many") if name != "tokenizers"]) == 1
