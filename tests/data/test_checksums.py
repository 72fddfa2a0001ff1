import json
import os
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from distilkit.data import checksums
from distilkit.data.cache import open_cache, prepare
from distilkit.data.text_files import TextFiles
from distilkit.errors import UserError
from tiny import make_documents

FILES = ("train.bin", "val.bin", "counts.bin")


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that this machine has not opened."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "corpus.txt").write_text("\n\n".join(make_documents(60)), "utf-8")
    corpus = TextFiles(paths=str(tmp_path / "corpus.txt"))
    return prepare(corpus, tokenizer, cache_dir=tmp_path / "cache", val_share=0.3)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the files whose checksum is computed."""
    read: list[str] = []
    compute = checksums.checksum

    def counted(file: Path) -> str:
        read.append(file.name)
        return compute(file)

    monkeypatch.setattr(checksums, "checksum", counted)
    return read


def refused(folder: Path, tokenizer: PreTrainedTokenizerBase, file: str, **options: Any) -> None:
    message = rf"{folder / file} is damaged, or of another cache: its CRC-32 is \w{{8}}, but meta.json says \w{{8}}; "
    with pytest.raises(UserError, match=f"{message}delete {folder} to prepare it again, or copy it again"):
        open_cache(folder, tokenizer, **options)


def test_the_checksums_of_a_cache_are_those_of_its_files(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    wanted = {name.removesuffix(".bin"): f"{zlib.crc32((folder / name).read_bytes()):08x}" for name in FILES}
    assert meta["crc32"] == wanted
    assert checksums.checksum(folder / "train.bin") == wanted["train"]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_refused_wherever_it_is(folder: Path, tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    whole = (folder / file).read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 20):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / file).write_bytes(damaged)
        refused(folder, tokenizer, file)
    (folder / file).write_bytes(whole)
    open_cache(folder, tokenizer)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_zeros_and_one_of_another_cache_are_refused(
    folder: Path, tokenizer: PreTrainedTokenizerBase, file: str
) -> None:
    whole = (folder / file).read_bytes()
    for other in (bytes(len(whole)), whole[::-1]):
        (folder / file).write_bytes(other)
        refused(folder, tokenizer, file)


def test_a_flipped_bit_in_meta_is_refused_or_changes_nothing_that_is_read(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = open_cache(folder, tokenizer)
    whole = (folder / "meta.json").read_bytes()
    outcomes = set()
    for bit in random.Random(1).sample(range(8 * len(whole)), 200):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / "meta.json").write_bytes(damaged)
        try:
            after = open_cache(folder, tokenizer)
        except UserError as error:
            assert str(folder) in str(error)
            outcomes.add("refused")
        else:
            for split in ("train", "val"):
                assert after.tokens[split].dtype == before.tokens[split].dtype
                assert np.array_equal(after.tokens[split], before.tokens[split])
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_a_cache_is_read_once_on_a_machine_and_again_on_request(
    folder: Path, tokenizer: PreTrainedTokenizerBase, reads: list[str]
) -> None:
    open_cache(folder, tokenizer)
    assert sorted(reads) == sorted(FILES)
    open_cache(folder, tokenizer)
    assert len(reads) == 3
    open_cache(folder, tokenizer, verify=True)
    assert len(reads) == 6


def test_damage_that_leaves_size_and_times_is_found_on_request(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_cache(folder, tokenizer)
    file = folder / "train.bin"
    before = file.stat()
    file.write_bytes(bytes(before.st_size))
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: before if path == file else stat(path, **options))
    open_cache(folder, tokenizer)
    refused(folder, tokenizer, "train.bin", verify=True)
    refused(folder, tokenizer, "train.bin")


@pytest.mark.parametrize("change", ["machine", "copy", "touched"])
def test_a_cache_on_another_machine_a_copy_and_a_changed_file_are_read_again(
    folder: Path, tokenizer: PreTrainedTokenizerBase, reads: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    open_cache(folder, tokenizer)
    match change:
        case "machine":
            monkeypatch.setattr("socket.gethostname", lambda: "other")
        case "copy":
            folder = shutil.copytree(folder, folder.with_name("copy"))
        case _:
            stat = (folder / "val.bin").stat()
            os.utime(folder / "val.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # only the time of change is new
    open_cache(folder, tokenizer)
    assert len(reads) == 6


def test_a_machine_that_can_remember_nothing_reads_a_cache_each_time_and_says_so(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (folder.parent / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(folder.parent / "file"))
    with caplog.at_level("INFO"):
        open_cache(folder, tokenizer)
        open_cache(folder, tokenizer)
    assert len(reads) == 6
    assert (
        f"{folder} is verified at each start, because {folder.parent}/file/distilkit/verified cannot be" in caplog.text
    )


def test_a_cache_of_an_earlier_version_opens_without_checksums(
    folder: Path, tokenizer: PreTrainedTokenizerBase, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    del meta["crc32"]
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    cache = open_cache(folder, tokenizer)
    assert sum(len(stream) for stream in cache.tokens.values()) == sum(meta["tokens"].values())
    assert reads == []
    assert not caplog.text
    open_cache(folder, tokenizer, verify=True)
    assert (
        f"{folder} was made by an earlier version, without checksums, so that only its sizes are known" in caplog.text
    )
    os.truncate(folder / "train.bin", 10)
    with pytest.raises(UserError, match="the cache is truncated"):
        open_cache(folder, tokenizer)
