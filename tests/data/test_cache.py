import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distilkit.data import cache
from distilkit.data.cache import TokenCache, batches, cache_key, open_cache, prepare, separator_id, split_of, tokenize
from distilkit.data.corpus import write_documents
from distilkit.data.text_files import TextFiles
from distilkit.data.tokenizer import num_ids, tokenizer_hash, train_tokenizer
from distilkit.errors import UserError
from tiny import SPECIAL, VOCABULARY, make_documents

SEP = VOCABULARY.index("[SEP]")
IDS = {token: index for index, token in enumerate(VOCABULARY)}


class Texts:
    """A corpus in memory."""

    def __init__(self, documents: Iterable[str], *, name: str = "texts") -> None:
        self.texts = documents
        self.name = name
        self.reads = 0

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.name}

    def documents(self) -> Iterator[str]:
        self.reads += 1
        yield from self.texts


def encode(document: str) -> list[int]:
    """Tokenize by looking words up: make_documents writes whole words of the vocabulary and full stops only."""
    return [*(IDS[word] for word in document.replace(".", " .").split()), SEP]


def folders(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.iterdir() if path.is_dir())


def test_a_cache_holds_the_tokens_of_each_document_on_one_side_in_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = make_documents(1000) + make_documents(50)  # the last fifty occur twice
    folder = prepare(Texts(documents), tokenizer, cache_dir=tmp_path, val_share=0.3)
    cache = open_cache(folder, tokenizer)
    val_stream = cache.tokens["val"].tolist()
    ends = np.flatnonzero(cache.tokens["val"] == SEP) + 1
    held_out = {tuple(part.tolist()) for part in np.split(cache.tokens["val"], ends)[:-1]}
    val = [document for document in documents if tuple(encode(document)) in held_out]
    train = [document for document in documents if tuple(encode(document)) not in held_out]
    assert val_stream == [token for document in val for token in encode(document)]
    assert cache.tokens["train"].tolist() == [token for document in train for token in encode(document)]
    assert abs(len(val) - 0.3 * 1050) < 5 * (0.3 * 0.7 * 1050) ** 0.5
    assert cache.meta["documents"] == {"train": len(train), "val": len(val)}
    assert cache.meta["tokens"] == {split: len(cache.tokens[split]) for split in ("train", "val")}
    found = Counter(cache.tokens["train"].tolist())
    assert cache.token_counts.tolist() == [found[token] for token in range(len(VOCABULARY))]


@pytest.mark.parametrize(("documents", "characters"), [(1, 10**9), (7, 10**9), (10**9, 300), (10**9, 1)])
def test_the_cache_does_not_depend_on_how_the_corpus_is_cut_into_batches(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    documents: int,
    characters: int,
) -> None:
    def prepared(cache_dir: Path, **limits: int) -> dict[str, bytes]:
        folder = prepare(Texts(make_documents(60)), tokenizer, cache_dir=cache_dir, val_share=0.3, **limits)
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    whole = prepared(tmp_path / "whole")
    parts = prepared(tmp_path / "parts", batch_documents=documents, batch_bytes=characters)
    assert parts == whole


@pytest.mark.parametrize("val_share", [0.05, 0.5, 0.95])
def test_the_side_of_a_document_is_the_hash_of_its_text_in_every_process(val_share: float) -> None:
    documents = [f"document {number}" for number in range(4000)]
    sides = [split_of(document, val_share=val_share) for document in documents]
    hashes = [int(hashlib.blake2b(document.encode(), digest_size=8).hexdigest(), 16) for document in documents]
    assert sides == ["val" if number / 2**64 < val_share else "train" for number in hashes]
    assert abs(sides.count("val") - 4000 * val_share) < 5 * (4000 * val_share * (1 - val_share)) ** 0.5


def test_a_larger_share_holds_out_the_documents_of_a_smaller_one_too() -> None:
    documents = [f"document {number}" for number in range(1000)]
    small, large = (
        {document for document in documents if split_of(document, val_share=share) == "val"} for share in (0.1, 0.2)
    )
    assert small < large


@pytest.mark.parametrize("token", SPECIAL)
def test_text_that_spells_a_special_token_is_split_like_other_text(
    tokenizer: PreTrainedTokenizerBase, token: str
) -> None:
    ids = tokenize([f"ba {token} be", token], tokenizer, dtype=np.dtype(np.uint16)).tolist()
    inner = [IDS["[UNK]"]] * 3  # a bracket, a word and a bracket, none of them in the vocabulary
    assert ids == [IDS["ba"], *inner, IDS["be"], SEP, *inner, SEP]


def test_a_document_without_a_token_leaves_no_separator(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenize(["ba", " ", "be"], tokenizer, dtype=np.dtype(np.uint16)).tolist() == [
        IDS["ba"],
        SEP,
        IDS["be"],
        SEP,
    ]


def test_a_long_document_is_neither_cut_nor_padded(tokenizer: PreTrainedTokenizerBase) -> None:
    long = " ".join(VOCABULARY[10:60] * 100)
    tokenizer(long, truncation=True, max_length=8, padding="max_length")  # a call before must not matter
    assert tokenize([long, "ba"], tokenizer, dtype=np.dtype(np.uint16)).tolist() == [*encode(long), *encode("ba")]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_as_long_as_the_vocabulary_allows(tmp_path: Path, size: int, dtype: type) -> None:
    last = size - 1
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="w1")
    texts = Texts([f"w{last} w{number}" for number in range(100)])
    cache = open_cache(prepare(texts, tokenizer, cache_dir=tmp_path, val_share=0.01), tokenizer)
    assert {split: stream.dtype for split, stream in cache.tokens.items()} == {"train": dtype, "val": dtype}
    assert cache.token_counts.shape == (size,)
    assert sum(cache.tokens[split].tolist().count(last) for split in ("train", "val")) == 100


def test_a_second_preparation_reads_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = Texts(make_documents(20))
    first = prepare(texts, tokenizer, cache_dir=tmp_path, val_share=0.2)
    second = prepare(texts, tokenizer, cache_dir=tmp_path, val_share=0.2)
    assert (first, texts.reads) == (second, 1)


def small_tokenizer(vocabulary: list[str], **special: str) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_the_key_changes_with_corpus_tokenizer_share_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = small_tokenizer(["a", "b"], sep_token="a"), small_tokenizer(["b", "a"], sep_token="a")
    texts = Texts([])
    keys = [
        cache_key(texts, first, val_share=0.1),
        cache_key(Texts([], name="others"), first, val_share=0.1),
        cache_key(texts, second, val_share=0.1),
        cache_key(texts, small_tokenizer(["a", "b"], sep_token="b"), val_share=0.1),
        cache_key(texts, first, val_share=0.2),
    ]
    assert cache_key(texts, small_tokenizer(["a", "b"], sep_token="a"), val_share=0.1) == keys[0]
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    keys.append(cache_key(texts, first, val_share=0.1))
    assert len(set(keys)) == len(keys)


def test_a_tokenizers_hash_is_that_of_its_saved_copy_and_blind_to_calls_before(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer("ba be", truncation=True, max_length=4, padding="max_length")
    assert tokenizer_hash(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)  # with the truncation of the last call, as some of the hub have it
    assert tokenizer_hash(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == before
    tokenizer("ba be")
    assert tokenizer_hash(tokenizer) == before


@pytest.mark.parametrize("failure", [RuntimeError("corpus"), KeyboardInterrupt(), OSError(errno.EIO, "corpus")])
def test_an_interrupted_preparation_leaves_nothing_and_the_next_one_succeeds(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, failure: BaseException
) -> None:
    documents = make_documents(20)

    def interrupted() -> Iterator[str]:
        yield from documents[:12]
        raise failure

    with pytest.raises(type(failure), match="corpus" if failure.args else None):
        prepare(Texts(interrupted()), tokenizer, cache_dir=tmp_path, val_share=0.2, batch_documents=5)
    assert folders(tmp_path) == []
    folder = prepare(Texts(documents), tokenizer, cache_dir=tmp_path, val_share=0.2)
    total = sum(len(stream) for stream in open_cache(folder, tokenizer).tokens.values())
    assert total == sum(len(encode(document)) for document in documents)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, f"waited two minutes for {file}"
        time.sleep(0.02)


class WaitingTexts(Texts):
    """A corpus whose reader stops after two documents until a file is there."""

    def __init__(self, documents: list[str], *, folder: Path, reader: str, until: str) -> None:
        super().__init__(documents)
        self.folder, self.reader, self.until = folder, reader, until

    def documents(self) -> Iterator[str]:
        (self.folder / f"{self.reader}-reads").touch()
        yield from list(self.texts)[:2]
        (self.folder / f"{self.reader}-waits").touch()
        wait_for(self.folder / self.until)
        time.sleep(0.3)
        yield from list(self.texts)[2:]


CHILD = """
import sys, time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from distilkit.data.cache import prepare
from transformers import PreTrainedTokenizerFast

{helpers}
folder, until, documents = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
(folder / "child").touch()
texts = WaitingTexts(documents, folder=folder, reader="child", until=until)
prepare(texts, tokenizer, cache_dir=folder / "cache", val_share=0.2, batch_documents=1)
"""

StartChild = Callable[[str, list[str]], subprocess.Popen[bytes]]


@pytest.fixture
def start_child(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[StartChild]:
    """Start a process that prepares a cache, reads two documents and waits for a file."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    started: list[subprocess.Popen[bytes]] = []

    def start(until: str, documents: list[str]) -> subprocess.Popen[bytes]:
        source = CHILD.format(helpers="".join(map(inspect.getsource, (wait_for, Texts, WaitingTexts))))
        command = [sys.executable, "-c", source, str(tmp_path), until, *documents]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_preparation_is_not_taken_for_whole_and_is_cleaned_up_by_the_next(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, start_child: StartChild
) -> None:
    documents, cache_dir = make_documents(10), tmp_path / "cache"
    child = start_child("never", documents)
    wait_for(tmp_path / "child-waits")
    child.kill()
    assert child.wait() == -signal.SIGKILL
    key = cache_key(Texts(documents), tokenizer, val_share=0.2)
    (left_over,) = folders(cache_dir)
    assert left_over.startswith(f"{key}.tmp")
    folder = prepare(Texts(documents), tokenizer, cache_dir=cache_dir, val_share=0.2)
    assert folders(cache_dir) == [key]
    assert sum(open_cache(folder, tokenizer).meta["tokens"].values()) == sum(map(len, map(encode, documents)))


def test_of_two_processes_that_prepare_a_cache_one_reads_and_both_succeed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, start_child: StartChild
) -> None:
    documents = make_documents(10)
    child = start_child("main", documents)
    (tmp_path / "main").touch()
    texts = WaitingTexts(documents, folder=tmp_path, reader="main", until="child")
    folder = prepare(texts, tokenizer, cache_dir=tmp_path / "cache", val_share=0.2)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors.decode()
    assert len(list(tmp_path.glob("*-reads"))) == 1
    assert folders(tmp_path / "cache") == [folder.name]
    cache = open_cache(folder, tokenizer)
    assert sum(cache.meta["tokens"].values()) == sum(map(len, map(encode, documents)))


def test_left_overs_of_other_caches_are_left_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    other = tmp_path / "0123456789abcdef.tmpxyz"  # another process may be writing there
    other.mkdir()
    folder = prepare(Texts(make_documents(5)), tokenizer, cache_dir=tmp_path, val_share=0.2)
    assert folders(tmp_path) == sorted([other.name, folder.name])


@pytest.fixture
def cache_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    return prepare(Texts(make_documents(20)), tokenizer, cache_dir=tmp_path, val_share=0.2)


@pytest.mark.parametrize("name", ["train", "val", "counts"])
def test_a_file_of_a_cache_that_was_cut_short_is_an_error(
    cache_folder: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    file = cache_folder / f"{name}.bin"
    size = file.stat().st_size
    os.truncate(file, size - 2)
    message = f"{file} has {size - 2:,} bytes instead of {size:,}: .* delete {cache_folder} to prepare it again"
    with pytest.raises(UserError, match=message):
        open_cache(cache_folder, tokenizer)
    file.unlink()
    with pytest.raises(UserError, match=f"{file} has 0 bytes instead of {size:,}"):
        open_cache(cache_folder, tokenizer)


def rewrite(folder: Path, **fields: Any) -> None:
    file = folder / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields), "utf-8")


def test_a_folder_without_meta_is_no_cache(cache_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (cache_folder / "meta.json").unlink()
    with pytest.raises(
        UserError, match=rf"{cache_folder} is not a token cache \(FileNotFoundError.*; delete it to prep"
    ):
        open_cache(cache_folder, tokenizer)


@pytest.mark.parametrize("meta", ["", "{", "[]", "{}", '{"bytes": {"train": 1}}'])
def test_a_folder_with_a_broken_meta_is_no_cache(
    cache_folder: Path, tokenizer: PreTrainedTokenizerBase, meta: str
) -> None:
    (cache_folder / "meta.json").write_text(meta, "utf-8")
    with pytest.raises(UserError, match=f"{cache_folder} is not a token cache .*; delete it to prepare it again"):
        open_cache(cache_folder, tokenizer)


def test_a_cache_of_another_format_is_an_error(cache_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rewrite(cache_folder, format=0)
    with pytest.raises(UserError, match=r"is a token cache of format 0 .*, but format 1 is needed; delete it to"):
        open_cache(cache_folder, tokenizer)


def test_a_cache_of_another_tokenizer_is_an_error(cache_folder: Path) -> None:
    with pytest.raises(UserError, match=f"{cache_folder} is a token cache of format 1 and another tokenizer"):
        open_cache(cache_folder, small_tokenizer(VOCABULARY, sep_token="[SEP]"))


def test_a_cache_that_lost_a_file_is_prepared_again_once_it_was_deleted(
    cache_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = {file.name: file.read_bytes() for file in cache_folder.iterdir()}
    shutil.rmtree(cache_folder)
    prepare(Texts(make_documents(20)), tokenizer, cache_dir=cache_folder.parent, val_share=0.2)
    assert {file.name: file.read_bytes() for file in cache_folder.iterdir()} == before


def test_the_streams_are_on_disk_and_cannot_be_written(cache_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = open_cache(cache_folder, tokenizer).tokens["train"]
    assert isinstance(stream, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        stream[0] = 0


def test_a_split_without_a_document_is_an_empty_stream(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    cache = open_cache(prepare(Texts(["ba be"]), tokenizer, cache_dir=tmp_path, val_share=0.001), tokenizer)
    assert cache.tokens["train"].tolist() == [*encode("ba be")]
    assert cache.tokens["val"].shape == (0,)


def test_an_empty_corpus_is_an_error_and_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("\n \n", "utf-8")
    corpus = TextFiles(paths=str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"the corpus is empty: it has no document with text; check data\.corpus"):
        prepare(corpus, tokenizer, cache_dir=tmp_path / "cache", val_share=0.2)
    assert folders(tmp_path / "cache") == []


NO_SPACE = r"no space left on the disk of {} .*; free some, or set cache_dir to another disk \(2 bytes per token, or 4"


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "counts.bin", "meta.json"])
def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_folder = Path.mkdir

    def on_full_disk(folder: Path, **options: Any) -> None:
        make_folder(folder, **options)
        if ".tmp" in folder.name:
            (folder / name).symlink_to("/dev/full")  # the kernel itself refuses each write to it

    monkeypatch.setattr(Path, "mkdir", on_full_disk)
    with pytest.raises(UserError, match=NO_SPACE.format(tmp_path)):
        prepare(Texts(make_documents(20)), tokenizer, cache_dir=tmp_path, val_share=0.2)
    assert folders(tmp_path) == []


def test_a_full_quota_is_an_error_and_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def documents() -> Iterator[str]:
        yield "ba be"
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(UserError, match=NO_SPACE.format(tmp_path)):
        prepare(Texts(documents()), tokenizer, cache_dir=tmp_path, val_share=0.2)
    assert folders(tmp_path) == []


@pytest.mark.parametrize("val_share", [-0.1, 0.0, 1.0, 1.5])
def test_a_share_out_of_range_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, val_share: float) -> None:
    with pytest.raises(UserError, match=f"val_share={val_share}, but it must be above 0 and below 1, for example 0.01"):
        prepare(Texts(["ba"]), tokenizer, cache_dir=tmp_path, val_share=val_share)


@pytest.mark.parametrize("special", [{"sep_token": "b", "eos_token": "c"}, {"eos_token": "b"}])
def test_a_document_is_closed_by_the_separator_or_else_the_end_of_text(special: dict[str, str]) -> None:
    assert separator_id(small_tokenizer(["a", "b", "c"], **special)) == 1


def test_a_tokenizer_without_a_separator_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no separator and no end-of-text token; set tokenizer\.tokenizer_type to the"):
        separator_id(small_tokenizer(["a"]))


class CountedText(str):
    """A text that knows how many of its kind are in memory."""

    alive = 0
    most = 0

    def __init__(self, _: str) -> None:
        super().__init__()
        type(self).alive += 1
        type(self).most = max(self.alive, self.most)
        weakref.finalize(self, self._gone)

    @classmethod
    def _gone(cls) -> None:
        cls.alive -= 1


def test_a_batch_has_fewer_characters_of_several_bytes() -> None:
    for text, size in (("a" * 300, 3), ("\u4e00" * 300, 1)):
        assert [len(each) for each in batches(iter([text] * 3), max_documents=9, max_bytes=900)] == [size] * (3 // size)


@pytest.mark.parametrize(("documents", "characters"), [(10, 10**9), (10**9, 100)])
def test_a_corpus_may_be_larger_than_memory(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    documents: int,
    characters: int,
) -> None:
    monkeypatch.setattr(CountedText, "most", 0)
    texts = Texts(CountedText("ba be bi b") for _ in range(500))
    limits = {"batch_documents": documents, "batch_bytes": characters}
    folder = prepare(texts, tokenizer, cache_dir=tmp_path, val_share=0.5, **limits)
    assert sum(open_cache(folder, tokenizer).meta["documents"].values()) == 500
    assert 10 <= CountedText.most <= 21  # the batch that is read and the one before it


def test_documents_without_a_token_are_an_empty_corpus(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(["a", "b"], sep_token="b")
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    with pytest.raises(UserError, match="the corpus is empty: it has no token in its 3 documents: the tokenizer drops"):
        prepare(Texts(["\u200b\u200b", "\ufeff\u200d", "\x00"]), tokenizer, cache_dir=tmp_path, val_share=0.5)
    assert folders(tmp_path) == []


def opened(cache_dir: Path, tokenizer: PreTrainedTokenizerBase, documents: list[str], name: str) -> TokenCache:
    folder = prepare(Texts(documents, name=name), tokenizer, cache_dir=cache_dir, val_share=0.001)
    return open_cache(folder, tokenizer)


def test_a_corpus_of_unknown_tokens_is_an_error_and_one_of_many_a_warning(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    for known in (0, 9):  # of 100 tokens; separators do not count
        documents = ["ประเทศ"] * (100 - known) + ["ba"] * known
        with pytest.raises(
            UserError, match=rf"{100 - known}.0% of the tokens of the corpus .* are \[UNK\].*tokenizer=bpe"
        ):
            opened(tmp_path, tokenizer, documents, f"nearly all, {known}")
    assert not caplog.text
    opened(tmp_path, tokenizer, ["unheard"] * 2 + ["ba"] * 98, "many")
    found = (
        r"2\.0% of the tokens .* are \[UNK\], unknown to the tokenizer; above 1% the student .*tokenizer=bpe teacher="
    )
    assert re.search(found, caplog.text)
    caplog.clear()
    opened(tmp_path, tokenizer, ["unheard"] * 1 + ["ba"] * 99, "few")
    assert not caplog.text


def test_a_separator_that_is_the_unknown_token_is_no_unknown_token(tmp_path: Path) -> None:
    gpt2 = small_tokenizer(["a", "b"], eos_token="a", unk_token="a")
    opened(tmp_path, gpt2, ["b"] * 20, "ends")


def test_arrays_are_as_long_as_the_highest_id_where_ids_are_skipped(tmp_path: Path) -> None:
    ids = {"[UNK]": 0, "[SEP]": 1, "a": 2, "b": 7}  # as by a vocab.txt that holds a word twice
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]", unk_token="[UNK]")
    assert (len(gaps), num_ids(gaps)) == (4, 8)
    cache = opened(tmp_path, gaps, ["a b", "b b b"], "gaps")
    assert cache.token_counts.tolist() == [0, 2, 1, 0, 0, 0, 0, 4]


def test_a_finished_cache_is_used_without_its_lock(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Texts(make_documents(20))
    first = prepare(texts, tokenizer, cache_dir=tmp_path, val_share=0.2)
    (tmp_path / f"{first.name}.lock").unlink(missing_ok=True)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert prepare(texts, tokenizer, cache_dir=tmp_path, val_share=0.2) == first
    with pytest.raises(UserError, match=rf"cache_dir={tmp_path} cannot be written \(\[Errno 30\] Read-only .* another"):
        prepare(texts, tokenizer, cache_dir=tmp_path, val_share=0.3)


@pytest.mark.parametrize("place", ["file", "file/cache", "closed/cache", "link"])
def test_a_cache_dir_that_cannot_be_used_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("no folder", "utf-8")
    (tmp_path / "link").symlink_to("link")
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> os.stat_result:
        if "closed" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    cache_dir, corpus = tmp_path / place, Texts(["ba be"])
    message = rf"cache_dir={cache_dir} cannot be written \(.*\); set cache_dir or DISTILKIT_CACHE to another folder"
    with pytest.raises(UserError, match=message):
        prepare(corpus, tokenizer, cache_dir=cache_dir, val_share=0.2)
    settings = {"model": "bpe", "vocab_size": 300, "lowercase": False, "max_documents": 9}
    with pytest.raises(UserError, match=message):
        train_tokenizer(corpus=corpus, cache_dir=str(cache_dir), **settings)
    with pytest.raises(UserError, match=message):
        write_documents(["ba be"], cache_dir)


def test_a_process_that_waits_for_another_one_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, start_child: StartChild, caplog: pytest.LogCaptureFixture
) -> None:
    documents = make_documents(10)
    child = start_child("main", documents)
    wait_for(tmp_path / "child-waits")
    acquire = FileLock.acquire

    def free_the_child(lock: Any, timeout: float = -1) -> Any:
        if timeout:
            (tmp_path / "main").touch()
        return acquire(lock, timeout)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(FileLock, "acquire", free_the_child)
        folder = prepare(Texts(documents), tokenizer, cache_dir=tmp_path / "cache", val_share=0.2)
    made = rf"process {child.pid} on {gethostname()}, which began at [-0-9: ]{{19}}, makes {folder}; waiting for it"
    assert re.search(made, caplog.text)
    assert child.wait(120) == 0
