"""A token cache that several processes or machines prepare: each tokenizes a shard, and the last one joins them.

A corpus is read in pieces, as a file each, and a piece in chunks of documents. A shard takes whole pieces, and of a piece
that is larger than a shard every n-th chunk. Its index says where each chunk stands in the corpus, so that the joined
cache is, byte for byte, the one that a single process makes.
"""

import heapq
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from distilkit.data.cache import (
    Chunk,
    batches,
    cache_key,
    dtype_of,
    tokenize_batch,
    write_cache,
    write_tokens,
)
from distilkit.data.cache_folder import make_once, usable
from distilkit.data.corpus import Concatenation, Corpus, Piece
from distilkit.errors import UserError

log = logging.getLogger(__name__)

_SPLITS = ("train", "val")
_MOST = 100_000
_LARGE = 1.25  # of a shard's share: a larger piece is divided, although each process then reads it


def check_shard(shard: int | None, num_shards: int | None) -> None:
    """Check that a shard and the number of shards go together."""
    for name, value, least in (("num_shards", num_shards, 1), ("shard", shard, 0)):
        if value is not None and (type(value) is not int or value < least):
            raise UserError(f"data.{name}={value}, but it must be a whole number of at least {least}")
    if num_shards is not None and num_shards > _MOST:
        raise UserError(f"data.num_shards={num_shards}, but it must be at most {_MOST:,}: each shard is a folder")
    if shard is not None and (num_shards is None or shard >= num_shards):
        cure = f"it takes 0 to {num_shards - 1}" if num_shards else "also set data.num_shards, as 4"
        raise UserError(
            f"data.shard={shard}, but data.num_shards={'null' if num_shards is None else num_shards}: {cure}"
        )


def prepare_shard(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: Path,
    val_share: float,
    shard: int | None,
    num_shards: int,
    batch_documents: int = 4096,
    batch_bytes: int = 2_000_000,
) -> list[Path]:
    """Tokenize a shard of a corpus into the folder ``key-shard-of-num_shards``, unless it or the cache is there.

    Join all shards into the cache if this was the last one, and return the folders of those that are missing. Without
    ``shard`` nothing is tokenized. The limits of a batch must be the same for all shards.
    """
    key = cache_key(corpus, tokenizer, val_share=val_share)
    folders = [cache_dir / f"{key}-{each}-of-{num_shards}" for each in range(num_shards)]

    def write(folder: Path) -> None:
        index: list[list[int]] = []  # of each chunk: piece, number, documents and tokens by split

        def chunks() -> Iterator[Chunk]:
            for piece, number, documents in _share(corpus, shard or 0, num_shards, limits):
                chunk = tokenize_batch(documents, tokenizer, val_share=val_share)
                sizes = [(count, len(ids)) for count, ids in (chunk.get(split, (0, ())) for split in _SPLITS)]
                index.append([piece, number, *(size for pair in sizes for size in pair)])
                yield chunk

        if (cache_dir / key).is_dir():  # made while this process waited for another one at the same shard
            return
        limits = {"max_documents": batch_documents, "max_bytes": batch_bytes}
        *_, sums = write_tokens(folder, chunks(), tokenizer)
        (folder / "index.json").write_text(json.dumps({"crc32": sums, "chunks": index}), "utf-8")

    def join(folder: Path) -> None:
        size = sum(file.stat().st_size for each in folders for file in each.iterdir())
        free = shutil.disk_usage(cache_dir).free
        log.info("joining %d shards of %.1f MB into %s; %.1f MB are free", num_shards, size / 1e6, key, free / 1e6)
        if size > free:
            raise UserError(
                f"the cache of {num_shards} shards takes {size / 1e6:,.1f} MB, but the disk of {cache_dir} has "
                f"{free / 1e6:,.1f} MB free; free some, and run it again without data.shard: the shards are kept"
            )
        write_cache(folder, corpus, _joined(folders, dtype_of(tokenizer)), tokenizer, key=key)

    if not (cache_dir / key).is_dir():
        if shard is not None:
            make_once(cache_dir, folders[shard].name, write)
        with usable(cache_dir):
            missing = [folder for folder in folders if not folder.is_dir()]
        if missing and not (cache_dir / key).is_dir():  # the last one may have joined them meanwhile
            return missing
    make_once(cache_dir, key, join)
    for folder in cache_dir.glob(f"{key}-*-of-*"):
        if not folder.suffix:  # neither a lock nor one that is being made
            shutil.rmtree(folder, ignore_errors=True)
    return []


def _share(corpus: Corpus, shard: int, num_shards: int, limits: dict[str, int]) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the batches of documents of a shard, each with the number of its piece and its own within that."""
    first = 0
    for pieces in pieces_of(corpus):
        for piece, owner in enumerate(deal([size for size, _ in pieces], num_shards)):
            if owner not in (None, shard):
                continue
            for number, documents in enumerate(batches(pieces[piece].documents(), **limits)):
                if owner is not None or (first + piece + number) % num_shards == shard:
                    yield first + piece, number, documents
        first += len(pieces)


def pieces_of(corpus: Corpus) -> list[list[Piece]]:
    """List the pieces of a corpus in the order of reading, in groups whose sizes have one unit."""
    if isinstance(corpus, Concatenation):
        return [pieces for part in corpus.parts for pieces in pieces_of(part)]
    own: Callable[[], list[Piece]] | None = getattr(corpus, "pieces", None)
    return [own() if own else [Piece(1, corpus.documents)]]


def deal(sizes: Sequence[float], num_shards: int) -> list[int | None]:
    """Choose a shard for each piece, the largest first, where there is least so far; None divides it among all."""
    share, loads = sum(sizes) / num_shards, [(0.0, shard) for shard in range(num_shards)]
    chosen: list[int | None] = [None] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        if sizes[piece] <= _LARGE * share:
            load, shard = loads[0]
            heapq.heapreplace(loads, (load + sizes[piece], shard))
            chosen[piece] = shard
    return chosen


def _joined(folders: Sequence[Path], dtype: np.dtype[Any]) -> Iterator[Chunk]:
    """Yield the chunks of all shards in the order of the corpus, memory-mapped."""
    streams: dict[tuple[int, str], NDArray[Any]] = {}
    wanted: dict[tuple[int, str], int] = {}  # CRC-32
    rows = []
    for shard, folder in enumerate(folders):
        try:
            saved = json.loads((folder / "index.json").read_text("utf-8"))
            index = np.array(saved["chunks"], dtype=np.int64).reshape(-1, 6)
            for split, tokens in zip(_SPLITS, index[:, (3, 5)].sum(axis=0), strict=True):
                streams[shard, split] = np.memmap(folder / f"{split}.bin", dtype, "r") if tokens else np.empty(0, dtype)
                wanted[shard, split] = saved["crc32"][split]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, shard) from error
        rows.append(np.column_stack([np.full(len(index), shard), index]))
    chunks = np.concatenate(rows)
    chunks = chunks[np.lexsort((chunks[:, 2], chunks[:, 1]))]
    step = np.diff(chunks[:, 1:3], axis=0, prepend=-1)  # (chunks, 2): of pieces and of numbers
    if (np.where(step[:, 0] > 0, chunks[:, 2] != 0, step[:, 1] != 1)).any():
        found = f"the shards {folders[0]} and so on were made of other text each, or in other batches"
        raise UserError(f"{found}; delete them, and prepare them again from a corpus that does not change")
    begins, sums = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0)
    for shard, _, _, *sizes in chunks.tolist():
        chunk: Chunk = {}
        for split, documents, length in zip(_SPLITS, sizes[::2], sizes[1::2], strict=True):
            each, begin = (shard, split), begins[shard, split]
            begins[each] = begin + length
            chunk[split] = documents, streams[each][begin : begin + length]
            sums[each] = zlib.crc32(np.ascontiguousarray(chunk[split][1]).data, sums[each])
        yield chunk
    for shard, split in streams:
        if sums[shard, split] != wanted[shard, split] or begins[shard, split] != len(streams[shard, split]):
            raise _damaged(folders[shard], shard)


def _damaged(folder: Path, shard: int) -> UserError:
    return UserError(f"the shard {folder} is damaged; delete it, and prepare data.shard={shard} again")
