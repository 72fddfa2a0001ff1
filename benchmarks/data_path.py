"""Masked batches from a memory map, compared with a DataLoader and transformers' collator."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from benchmarks import synthetic
from benchmarks.measure import in_turn
from benchmarks.models import MASKED_SHARE
from distilkit.data.batches import MicroBatches, StepSampler
from distilkit.data.blocks import Blocks
from distilkit.data.masking import Masker, Masking

OURS, SMOOTHED = "ours", "ours, frequent words masked less"
MAPPED, LISTS = "HF collator, memory map", "HF collator, lists of ids"


class Rows(Dataset[Any]):
    """A data set of single blocks, which the collator batches."""

    def __init__(self, tokens: NDArray[Any], *, length: int, as_lists: bool) -> None:
        """Cut a stream into whole blocks; ``as_lists`` stores them as lists of ints, the output of a tokenizer."""
        self.blocks = tokens[: len(tokens) // length * length].reshape(-1, length)
        self.lists = [{"input_ids": block.tolist()} for block in self.blocks] if as_lists else None

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one block."""
        if self.lists is not None:
            return self.lists[index]
        return {"input_ids": torch.from_numpy(self.blocks[index].astype(np.int64))}


def our_batches(
    tokens: NDArray[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    batch_size: int,
    step_size: int,
    smoothing: float,
) -> Iterable[Any]:
    """Return distilkit's loader of one epoch: micro-batches of ``batch_size``, masked ``step_size`` blocks at a time."""
    masking = Masking(
        mlm_probability=MASKED_SHARE, mask_share=0.8, random_share=0.1, smoothing=smoothing, whole_word=False
    )
    masker = Masker(masking, tokenizer=tokenizer, token_counts=np.bincount(tokens, minlength=len(tokenizer)), seed=0)
    blocks = Blocks(
        tokens, tokenizer=tokenizer, block_size=length, masker=masker, attend_across_documents=True, packing="blocks"
    )
    sampler = StepSampler(num_blocks=len(blocks), global_batch_size=step_size, rank=0, world_size=1, seed=0)
    return cast(
        Iterable[Any],
        MicroBatches(blocks, sampler=sampler, micro_batch_size=batch_size, num_workers=0, pin_memory=False),
    )


def hf_batches(
    tokens: NDArray[Any], tokenizer: PreTrainedTokenizerBase, *, length: int, batch_size: int, as_lists: bool
) -> Iterable[Any]:
    """Return a DataLoader over random blocks, batched and masked by the collator."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED_SHARE)
    rows = Rows(tokens, length=length, as_lists=as_lists)
    return DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=collator)


def time_data_path(
    length: int, batch_size: int, num_batches: int, rounds: int, step_size: int = 256
) -> list[dict[str, Any]]:
    """Time ``num_batches`` of each path in turn, in one process without workers; return one record per path."""
    tokenizer = synthetic.tokenizer()
    stream = synthetic.token_stream(4 * num_batches * batch_size * length, vocab_size=len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokens.bin")
        stream.tofile(file)
        tokens = np.memmap(file, dtype=np.uint16, mode="r")
        few = tokens[: num_batches * batch_size * length]  # lists of ids take 36 bytes per token
        ours = partial(our_batches, tokens, tokenizer, length=length, batch_size=batch_size, step_size=step_size)
        hf = partial(hf_batches, tokenizer=tokenizer, length=length, batch_size=batch_size)
        loaders: dict[str, tuple[Iterable[Any], int]] = {
            OURS: (ours(smoothing=0.0), 10 * num_batches),
            SMOOTHED: (ours(smoothing=0.7), 10 * num_batches),  # the value of the original recipes
            MAPPED: (hf(tokens, as_lists=False), num_batches),
            LISTS: (hf(few, as_lists=True), num_batches),
        }
        iterators = {name: _endless(loader) for name, (loader, _) in loaders.items()}
        for iterator in iterators.values():  # permutes all blocks and makes the first batch
            next(iterator)
        runs: dict[str, Callable[[], object]] = {
            name: partial(_take, iterators[name], count) for name, (_, count) in loaders.items()
        }
        timings = in_turn(runs, rounds=rounds)
    return [
        {
            "variant": name,
            "tokens": loaders[name][1] * batch_size * length,
            "rounds": timing.rounds,
            "core_seconds": timing.core_seconds,
            "wall_seconds": timing.wall_seconds,
            "tokens_per_core_second": loaders[name][1] * batch_size * length / timing.core_seconds,
        }
        for name, timing in timings.items()
    ]


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _take(iterator: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(iterator)
