"""The token cache: a corpus tokenized once, with one flat memory-mapped file of ids for each split.

Documents are concatenated, each followed by a separator. Blocks are cut at reading time, so that one cache serves every
block size. A cache is written to a temporary folder and then renamed, so that a partial cache is never found.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from distilkit.data import checksums
from distilkit.data.cache_folder import make_once
from distilkit.data.corpus import Corpus
from distilkit.data.tokenizer import num_ids, tokenizer_hash
from distilkit.errors import UserError

log = logging.getLogger(__name__)

Chunk = dict[str, tuple[int, NDArray[Any]]]  # by split: a number of documents, and their tokens (tokens,)

FORMAT = 1  # increase it when the meaning of the files changes

_MANY_UNKNOWN, _MOST_UNKNOWN = 0.01, 0.9  # shares of unknown tokens that are worth a warning, and that end the run
_CURE = "choose a teacher of the text's language, or train a tokenizer on it (tokenizer=bpe teacher=none student=new)"


@dataclass(frozen=True, kw_only=True)
class TokenCache:
    """A complete cache, memory-mapped."""

    folder: Path
    tokens: dict[str, NDArray[np.uint16] | NDArray[np.uint32]]  # by split, (tokens,)
    token_counts: NDArray[np.int64]  # (ids,), of the training split
    meta: dict[str, Any]


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a document: [SEP], </s> or <|endoftext|>."""
    for token_id in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        "the tokenizer has no separator and no end-of-text token; set tokenizer.tokenizer_type to the model's type "
        "(bert, roberta, gpt2, ...) if its folder has a bare tokenizer.json"
    )


def cache_key(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, val_share: float) -> str:
    """Return a hash of everything that determines the content of a cache, after a check of ``val_share``."""
    if not 0 < val_share < 1:
        raise UserError(f"data.val_share={val_share}, but it must be above 0 and below 1, for example 0.01")
    inputs = {
        "format": FORMAT,
        "corpus": corpus.fingerprint(),
        "tokenizer": tokenizer_hash(tokenizer),
        "separator": separator_id(tokenizer),
        "val_share": val_share,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def prepare(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path,
    val_share: float,
    batch_documents: int = 4096,
    batch_bytes: int = 2_000_000,
) -> Path:
    """Tokenize a corpus into the cache, unless it is cached already, and return the cache's folder.

    Concurrent processes wait for the first one. ``batch_documents`` and ``batch_bytes`` limit the text in memory;
    the defaults keep all cores of the tokenizer busy.
    """
    key = cache_key(corpus, tokenizer, val_share=val_share)

    def write(folder: Path) -> None:
        texts = batches(corpus.documents(), max_documents=batch_documents, max_bytes=batch_bytes)
        chunks = (tokenize_batch(batch, tokenizer, val_share=val_share) for batch in texts)
        write_cache(folder, corpus, chunks, tokenizer, key=key)

    return make_once(Path(cache_dir).expanduser(), key, write)


def open_cache(folder: Path, tokenizer: PreTrainedTokenizerBase, *, verify: bool = False) -> TokenCache:
    """Map a complete cache into memory, after checking its format, tokenizer and file sizes, and its tokens.

    Checksums are compared when this machine opens the cache for the first time, and with ``verify``. Caches of earlier
    versions have none.
    """
    wanted = tokenizer_hash(tokenizer)
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        sizes = {name: int(meta["bytes"][name]) for name in ("train", "val", "counts")}
        dtype, found = np.dtype(meta["dtype"]), int(meta["format"])
        same_tokenizer = str(meta["tokenizer"]) == wanted
        sums = {f"{each}.bin": str(meta["crc32"][each]) for each in sizes} if "crc32" in meta else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a token cache ({error!r}); delete it to prepare it again") from error
    if found != FORMAT or not same_tokenizer:
        raise UserError(
            f"{folder} is a token cache of format {found} and another tokenizer or version, but format {FORMAT} is "
            "needed; delete it to prepare it again"
        )
    for name, size in sizes.items():
        file = folder / f"{name}.bin"
        actual = file.stat().st_size if file.exists() else 0
        if actual != size:
            raise UserError(
                f"{file} has {actual:,} bytes instead of {size:,}: the cache is truncated; delete {folder} to prepare "
                "it again"
            )
    if sums:
        checksums.verify(folder, sums, again=verify)
    elif verify:
        cure = "only its sizes are known; delete it to prepare it again"
        log.warning("%s was made by an earlier version, without checksums, so that %s", folder, cure)
    tokens = {
        split: np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") if sizes[split] else np.empty(0, dtype)
        for split in ("train", "val")
    }
    counts = np.fromfile(folder / "counts.bin", dtype=np.int64)
    _check_known(counts, tokenizer, where=f"the corpus (token cache {folder})")
    return TokenCache(folder=folder, tokens=tokens, token_counts=counts, meta=meta)


def unknown_share(counts: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Return the share of unknown tokens in counts by id, without separators; None if the tokenizer knows all text."""
    unknown, separator = tokenizer.unk_token_id, separator_id(tokenizer)
    total = int(counts.sum() - counts[separator])
    return None if unknown is None or unknown == separator or not total else int(counts[unknown]) / total


def _check_known(counts: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Warn of a training split with many tokens that the tokenizer does not know, and refuse one of nearly no others."""
    if (share := unknown_share(counts, tokenizer)) is None:
        return
    found = f"{share:.1%} of the tokens of {where} are {tokenizer.unk_token}, unknown to the tokenizer"
    if share > _MOST_UNKNOWN:
        raise UserError(f"{found}; above {_MOST_UNKNOWN:.0%} there is nothing to learn: {_CURE}")
    if share > _MANY_UNKNOWN:
        log.warning("%s; above %.0f%% the student learns little of this text: %s", found, 100 * _MANY_UNKNOWN, _CURE)


def split_of(document: str, *, val_share: float) -> Literal["train", "val"]:
    """Choose the split of a document by a hash of its text, so that duplicates are in the same split."""
    digest = blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest) < val_share * 2**64 else "train"


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase, *, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Tokenize documents on all cores and join them, each followed by the separator: (tokens,).

    Text that spells a special token, such as "[MASK]" in a tutorial, is split like any other text, unless the tokenizer's
    model holds it as a word.
    """
    encoded = tokenizer(
        documents,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents may exceed the model's limit: they are cut into blocks later
    )["input_ids"]
    separator = [separator_id(tokenizer)]
    joined = itertools.chain.from_iterable(
        itertools.chain(ids, separator) for ids in cast(list[list[int]], encoded) if ids
    )
    return np.fromiter(joined, dtype=dtype)


def tokenize_batch(documents: list[str], tokenizer: PreTrainedTokenizerBase, *, val_share: float) -> Chunk:
    """Divide documents between the splits, and tokenize both."""
    by_split: dict[str, list[str]] = {}
    for document in documents:
        by_split.setdefault(split_of(document, val_share=val_share), []).append(document)
    dtype = dtype_of(tokenizer)
    return {split: (len(texts), tokenize(texts, tokenizer, dtype=dtype)) for split, texts in by_split.items()}


def batches(documents: Iterator[str], *, max_documents: int, max_bytes: int) -> Iterator[list[str]]:
    """Cut a stream of documents into lists, of which each but the last has reached one of the limits."""
    batch: list[str] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document.encode("utf-8", "surrogatepass"))  # Chinese has as many tokens as characters
        if num_bytes >= max_bytes or len(batch) == max_documents:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def write_cache(
    folder: Path, corpus: Corpus, chunks: Iterable[Chunk], tokenizer: PreTrainedTokenizerBase, *, key: str
) -> None:
    """Write the token files, and then meta.json."""
    num_documents, num_tokens, sums = write_tokens(folder, chunks, tokenizer)
    total = sum(num_documents.values())
    if not sum(num_tokens.values()):
        found = (
            f"no token in its {total:,} documents: the tokenizer drops their characters"
            if total
            else "no document with text"
        )
        raise UserError(f"the corpus is empty: it has {found}; check data.corpus")
    meta = {
        "format": FORMAT,
        "key": key,
        "dtype": dtype_of(tokenizer).name,
        "tokenizer": tokenizer_hash(tokenizer),
        "separator": separator_id(tokenizer),
        "corpus": corpus.fingerprint(),
        "documents": num_documents,
        "tokens": num_tokens,
        "bytes": {name: (folder / f"{name}.bin").stat().st_size for name in ("train", "val", "counts")},
        "crc32": {name: f"{value:08x}" for name, value in sums.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    log.info(
        "tokenized %s documents into %s tokens at %s", f"{total:,}", f"{sum(num_tokens.values()):,}", folder.parent
    )


def dtype_of(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """Return the type of the ids in a cache: two bytes, or four for a vocabulary above 65,536."""
    return np.dtype(np.uint16 if num_ids(tokenizer) <= 2**16 else np.uint32)


def write_tokens(
    folder: Path, chunks: Iterable[Chunk], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Write train.bin, val.bin and counts.bin; return the numbers of documents and tokens by split, and the CRC-32s."""
    num_documents, num_tokens = {"train": 0, "val": 0}, {"train": 0, "val": 0}
    sums = {"train": 0, "val": 0, "counts": 0}
    counts = np.zeros(num_ids(tokenizer), dtype=np.int64)  # (ids,)
    with _progress() as show, (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        files = {"train": train, "val": val}
        for chunk in chunks:
            for split, (documents, ids) in chunk.items():
                files[split].write(data := ids.tobytes())
                sums[split] = zlib.crc32(data, sums[split])
                num_documents[split] += documents
                num_tokens[split] += len(ids)
                if split == "train":
                    counts += np.bincount(ids, minlength=len(counts))
            show(sum(num_documents.values()), sum(num_tokens.values()))
    (folder / "counts.bin").write_bytes(data := counts.tobytes())  # ndarray.tofile does not report a full disk
    sums["counts"] = zlib.crc32(data)
    return num_documents, num_tokens, sums


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress line on stderr; the yielded function updates it with the numbers of documents and tokens."""
    counts = "{task.fields[documents]:,} documents, {task.completed:,.0f} tokens, {task.fields[rate]:,.0f} tokens/s"
    columns = SpinnerColumn(), TextColumn("tokenizing"), TextColumn(counts), TimeElapsedColumn()
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, documents=0, rate=0.0)

        def show(documents: int, tokens: int) -> None:
            rate = tokens / (time.perf_counter() - start)
            bar.update(task, completed=tokens, documents=documents, rate=rate)

        yield show
