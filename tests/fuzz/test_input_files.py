"""Damaged input files of every kind: a command reads them as they are, or refuses them in one message."""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from transformers import PreTrainedTokenizerBase

from distilkit.data.cache import open_cache, prepare
from distilkit.data.text_files import TextFiles
from distilkit.data.tokenizer import load_tokenizer
from distilkit.errors import UserError
from distilkit.export import export_checkpoint
from distilkit.records import find_runs
from distilkit.teacher import load_teacher
from tiny import build_model, make_documents

TEXTS = make_documents(12)
CSV = "text,id\n" + "".join(f'"{text}",{number}\n' for number, text in enumerate(TEXTS))
JSONL = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Change bytes of a file: a few at random, or a piece that is cut, repeated, put in or set to one value."""
    size, kind = len(content), rng.randrange(7)
    begin = rng.randrange(size)
    end = min(size, begin + rng.choice([1, 2, 8, 64]))
    if kind == 0:
        changed = bytearray(content)
        for _ in range(rng.choice([1, 3, 20])):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[:begin]
    piece = rng.choice(
        [b"\0" * 9, b"\xff\xfe", b"\xed\xa0\x80", b"NaN", b"-1", b"1e999", b'"', b"}", b"[" * 2000, b"\r"]
    )
    middle = {2: b"", 3: content[begin:end] * 3, 4: piece, 5: rng.randbytes(end - begin), 6: b"9" * (end - begin)}[kind]
    return content[:begin] + middle + content[end:]


Read = Callable[[Path], Any]


def load(folder: Path) -> Any:
    teacher = load_teacher(name=str(folder))
    assert teacher is not None
    return teacher.sha256


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, outputs: Path
) -> dict[str, tuple[Path, Read]]:
    """Write a file of each kind: the folder that holds it, and what reads it from a copy of this folder."""
    folder = tmp_path_factory.mktemp("good")
    texts, model = folder / "texts", folder / "model"
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(TEXTS), "utf-8")
    (texts / "a.csv").write_text(CSV, "utf-8")
    (texts / "a.jsonl").write_text(JSONL, "utf-8")
    (texts / "a.txt.gz").write_bytes(gzip.compress("\n\n".join(TEXTS).encode(), mtime=0))
    (texts / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(JSONL.encode()))
    pq.write_table(pa.table({"text": TEXTS}), texts / "a.parquet")
    build_model("gpt2", num_layers=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    made = prepare(TextFiles(paths=str(texts / "a.txt")), tokenizer, cache_dir=folder / "cache", val_share=0.2)
    config = (model / "config.json").read_text("utf-8")
    (folder / "run").mkdir()
    save_checkpoint(folder / "run" / "last.ckpt", config)
    run = next(file.parent for file in sorted(outputs.rglob("summary.json")))

    def text_of(name: str) -> Read:
        return lambda place: list(TextFiles(paths=str(place / name)).documents())

    def reopen(place: Path) -> Any:
        cache = open_cache(place, tokenizer)
        return [cache.tokens[split].tolist() for split in ("train", "val")], cache.token_counts.tolist()

    def tokenize(place: Path) -> Any:
        read = load_tokenizer(name=str(place))
        return [read(text)["input_ids"] for text in TEXTS]

    def export(place: Path) -> Any:
        export_checkpoint(place / "last.ckpt", place / "out")
        return (place / "out" / "model.safetensors").read_bytes(), (place / "out" / "config.json").read_bytes()

    read_by: dict[str, tuple[Path, Read]] = {name: (texts, text_of(name)) for name in KINDS if name.startswith("a.")}
    read_by |= dict.fromkeys(["config.json", "model.safetensors"], (model, load))
    read_by |= dict.fromkeys(["tokenizer.json", "tokenizer_config.json"], (model, tokenize))
    read_by |= dict.fromkeys(["meta.json", "train.bin", "counts.bin"], (made, reopen))
    read_by |= dict.fromkeys(["summary.json", "metrics.csv"], (run, lambda place: find_runs([place])))
    return read_by | {"last.ckpt": (folder / "run", export)}


def save_checkpoint(file: Path, config: str) -> None:
    """Write a checkpoint of a student, as a training does."""
    student = build_model("gpt2", num_layers=1)
    record = {"name": "a", "version": "1", "teacher": None, "objective": {}, "architecture": "GPT2LMHeadModel"}
    record |= {"layers": None, "data": "text", "block_size": 8, "global_batch_size": 2}
    state = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    saved = {"record": record, "tokens_seen": 3, "files": {"config.json": config}}
    torch.save({"state_dict": state, "global_step": 1, "distilkit": saved}, file)


KINDS = ["a.csv", "a.jsonl", "a.jsonl.zst", "a.parquet", "a.txt", "a.txt.gz", "config.json", "counts.bin", "last.ckpt"]
KINDS += ["meta.json", "metrics.csv", "model.safetensors", "summary.json", "tokenizer.json", "tokenizer_config.json"]
KINDS += ["train.bin"]
CHECKED = {"a.txt.gz", "a.jsonl.zst", "train.bin", "counts.bin", "last.ckpt"}  # by a checksum: no damage passes


def faults(name: str, source: Path, read: Read, folder: Path, *, count: int) -> str:
    """Damage a file so many times, and return a line for each reading that ended neither well nor in one message."""
    content = (source / name).read_bytes()
    shutil.copytree(source, folder / "good")
    expected = read(folder / "good")
    found = []
    for seed in range(count):
        place = folder / str(seed)
        shutil.copytree(source, place)
        (place / name).write_bytes(damaged(content, random.Random(f"{name}{seed}")))
        try:
            result = read(place)
        except UserError as error:
            if name not in str(error) and str(place) not in str(error):
                found.append(f"{seed}: the message names no file: {error}")
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            found.append(f"{seed}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
        else:
            if name in CHECKED and result != expected:
                found.append(f"{seed}: read in silence")
        shutil.rmtree(place)
    return "\n".join(found)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused(name: str, good: dict[str, tuple[Path, Read]], tmp_path: Path) -> None:
    assert faults(name, *good[name], tmp_path, count=8) == ""


@pytest.mark.fuzz
@pytest.mark.parametrize("name", KINDS)
def test_a_file_damaged_in_many_ways_is_read_or_refused(
    name: str, good: dict[str, tuple[Path, Read]], tmp_path: Path
) -> None:
    assert faults(name, *good[name], tmp_path, count=100) == ""
