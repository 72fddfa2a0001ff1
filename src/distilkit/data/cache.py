"""The token cache: a corpus tokenized once, each split one flat memory-mapped file of ids.

Documents stand one after the other, each closed by a separator. Blocks are cut when they are read, so that one cache
serves every block size. A cache is written beside its place and renamed into it, so a half-written one is never found.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from distilkit.data.corpus import Corpus
from distilkit.data.tokenizer import tokenizer_hash
from distilkit.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the files change their meaning
Split = Literal["train", "val"]

_BATCH_CHARACTERS = 2_000_000  # text in memory at a time; large enough to keep all cores of the tokenizer busy
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True, kw_only=True)
class TokenCache:
    """A finished cache: ``tokens[split]`` is (tokens,) on disk, ``token_counts`` (vocabulary,) of the training split."""

    folder: Path
    tokens: dict[str, NDArray[np.uint16] | NDArray[np.uint32]]
    token_counts: NDArray[np.int64]
    meta: dict[str, Any]


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that closes a document: [SEP], </s> or <|endoftext|>."""
    for token_id in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        "the tokenizer has no separator and no end-of-text token; set tokenizer.tokenizer_type to the model's type "
        "(bert, roberta, gpt2, ...) if its folder has a bare tokenizer.json"
    )


def cache_key(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, val_share: float) -> str:
    """Return the fingerprint of everything that decides the content of a cache."""
    inputs = {
        "format": FORMAT,
        "corpus": corpus.fingerprint(),
        "tokenizer": tokenizer_hash(tokenizer),
        "separator": separator_id(tokenizer),
        "val_share": val_share,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def prepare(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, cache_dir: str | Path, val_share: float) -> Path:
    """Tokenize a corpus into the cache, unless it is there, and return its folder.

    Processes that prepare the same cache wait for the first one.
    """
    if not 0 < val_share < 1:
        raise UserError(f"data.val_share={val_share}, but it must be above 0 and below 1, for example 0.01")
    folder = Path(cache_dir).expanduser() / cache_key(corpus, tokenizer, val_share=val_share)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            log.debug("token cache %s is ready", folder)
            return folder
        for left_over in folder.parent.glob(f"{folder.name}.tmp*"):
            shutil.rmtree(left_over)  # of a process that was killed: we hold the lock, so nobody writes there
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
        try:
            _write(temporary, corpus, tokenizer, val_share=val_share, key=folder.name)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"no space left on the disk of {folder.parent} (or in your quota) while preparing the token cache; free "
                "some, or set cache_dir to another disk (2 bytes a token, 4 above 65,536 words)"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def open_cache(folder: Path, tokenizer: PreTrainedTokenizerBase) -> TokenCache:
    """Map a finished cache into memory."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        sizes = {name: int(meta["bytes"][name]) for name in ("train", "val", "counts")}
        dtype, found = np.dtype(meta["dtype"]), int(meta["format"])
        vocabulary = str(meta["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a token cache ({error!r}); delete it, and it will be prepared again"
        ) from error
    if found != FORMAT or vocabulary != tokenizer_hash(tokenizer):
        raise UserError(
            f"{folder} is a token cache of format {found} and another tokenizer or version (wanted: format {FORMAT}); "
            "delete it, and it will be prepared again"
        )
    for name, size in sizes.items():
        file = folder / f"{name}.bin"
        actual = file.stat().st_size if file.exists() else 0
        if actual != size:
            raise UserError(
                f"{file} has {actual:,} bytes instead of {size:,}: the cache was cut short; delete {folder}, and it will "
                "be prepared again"
            )
    tokens = {
        split: np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") if sizes[split] else np.empty(0, dtype)
        for split in ("train", "val")
    }
    counts = np.fromfile(folder / "counts.bin", dtype=np.int64)
    return TokenCache(folder=folder, tokens=tokens, token_counts=counts, meta=meta)


def split_of(document: str, *, val_share: float) -> Split:
    """Choose the split of a document by a hash of its text, so that equal documents are on one side."""
    digest = blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest) < val_share * 2**64 else "train"


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase, *, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Tokenize documents on all cores and join them, each closed by the separator: (tokens,).

    Text that spells a special token ("[MASK]" in a tutorial) is split like any other text.
    """
    encoded = tokenizer(
        documents,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents may well be longer than the model's limit: they are cut into blocks
    )["input_ids"]
    closing = [separator_id(tokenizer)]
    joined = itertools.chain.from_iterable(
        itertools.chain(ids, closing) for ids in cast(list[list[int]], encoded) if ids
    )
    return np.fromiter(joined, dtype=dtype)


def _write(folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, val_share: float, key: str) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    num_documents = {"train": 0, "val": 0}
    num_tokens = {"train": 0, "val": 0}
    progress = Progress(
        SpinnerColumn(),
        TextColumn("[progress.description]{task.description}"),
        TextColumn(
            "{task.fields[documents]:,} documents, {task.completed:,.0f} tokens, {task.fields[rate]:,.0f} tokens/s"
        ),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in ("train", "val")}
        bar = stack.enter_context(progress)
        task = bar.add_task("tokenizing", total=None, documents=0, rate=0.0)
        start = time.perf_counter()
        for batch in _batches(corpus.documents()):
            by_split: dict[str, list[str]] = {"train": [], "val": []}
            for document in batch:
                by_split[split_of(document, val_share=val_share)].append(document)
            for split, documents in by_split.items():
                if not documents:
                    continue
                ids = tokenize(documents, tokenizer, dtype=dtype)
                files[split].write(ids.tobytes())
                num_documents[split] += len(documents)
                num_tokens[split] += len(ids)
                if split == "train":
                    counts += np.bincount(ids, minlength=len(counts))
            done = sum(num_tokens.values())
            rate = done / (time.perf_counter() - start)
            bar.update(task, completed=done, documents=sum(num_documents.values()), rate=rate)
    if not sum(num_documents.values()):
        raise UserError("the corpus is empty: it has no document with text in it; check data.corpus")
    (folder / "counts.bin").write_bytes(counts.tobytes())  # tofile would not notice a full disk
    meta = {
        "format": FORMAT,
        "key": key,
        "dtype": dtype.name,
        "tokenizer": tokenizer_hash(tokenizer),
        "separator": separator_id(tokenizer),
        "corpus": corpus.fingerprint(),
        "documents": num_documents,
        "tokens": num_tokens,
        "bytes": {name: (folder / f"{name}.bin").stat().st_size for name in ("train", "val", "counts")},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    log.info(
        "tokenized %s documents into %s tokens at %s", f"{sum(num_documents.values()):,}", f"{done:,}", folder.parent
    )
