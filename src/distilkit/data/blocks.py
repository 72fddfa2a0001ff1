"""Cut a token stream into blocks, and make batches of them, masked or shifted."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from distilkit.data.cache import separator_id
from distilkit.data.masking import Ids, Masker
from distilkit.language_model import Batch
from distilkit.losses import IGNORE_INDEX

Draw = tuple[int, Ids]  # an epoch and the blocks to take from it: what a sampler gives to the data set


class Blocks(Dataset[Batch]):
    """Cut a token stream into full blocks and make batches of them, masked or shifted.

    Each block is the tokenizer's opening tokens, a piece of the stream, and its closing tokens. No token is lost or
    repeated. Only the last block may be padded.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        masker: Masker | None,
        attend_across_documents: bool,
    ) -> None:
        """Take a stream (tokens,) and a masker, or None for causal models."""
        self.masker = masker
        self.block_size = block_size
        self.attend_across_documents = attend_across_documents
        self.separator = separator_id(tokenizer)
        self.opening, self.closing = special_tokens_around(tokenizer)
        self.stride = block_size - len(self.opening) - len(self.closing)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.separator
        num_full = len(tokens) // self.stride
        stream = np.asarray(tokens)  # slices of a memory map are slow to make
        self.full = stream[: num_full * self.stride].reshape(num_full, self.stride)
        self.rest = stream[num_full * self.stride :]

    def __len__(self) -> int:
        """Count the blocks, the padded last one included."""
        return len(self.full) + bool(len(self.rest))

    def __getitem__(self, draw: Draw) -> Batch:
        """Make the batch of these blocks in this epoch: tensors of (blocks, block_size)."""
        epoch, blocks = draw
        input_ids, lengths = self.input_ids(blocks)
        real = np.arange(self.block_size) < lengths[:, None]
        if self.masker is not None:
            model_ids, labels = self.masker(input_ids, epoch=epoch, samples=blocks, lengths=lengths)
        else:
            model_ids = input_ids
            labels = np.full_like(input_ids, IGNORE_INDEX)  # position t predicts token t + 1
            labels[:, :-1] = np.where(real[:, 1:], input_ids[:, 1:], IGNORE_INDEX)
        batch: Batch = {"input_ids": torch.from_numpy(model_ids), "labels": torch.from_numpy(labels)}
        if (lengths < self.block_size).any():
            batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        if not self.attend_across_documents:
            batch["document_ids"] = torch.from_numpy(self.document_ids(input_ids, real))
        return batch

    def input_ids(self, blocks: Ids) -> tuple[Ids, Ids]:
        """Gather unmasked blocks: ids (blocks, block_size) and the number of real tokens of each (blocks,)."""
        begin, end = len(self.opening), len(self.opening) + self.stride
        ids = np.empty((len(blocks), self.block_size), dtype=np.int64)
        ids[:, :begin], ids[:, end:] = self.opening, self.closing
        lengths = np.full(len(blocks), self.block_size, dtype=np.int64)
        is_full = blocks < len(self.full)
        if is_full.all():
            ids[:, begin:end] = self.full.take(blocks, axis=0)
        else:
            ids[is_full, begin:end] = self.full[blocks[is_full]]
            last = np.concatenate([self.rest, self.closing]).astype(np.int64)
            lengths[~is_full] = begin + len(last)
            ids[~is_full, begin:] = self.pad_id
            ids[~is_full, begin : begin + len(last)] = last
        return ids, lengths

    def document_ids(self, input_ids: Ids, real: NDArray[np.bool_]) -> Ids:
        """Number the documents within each block from 0; a separator belongs to the one it closes; padding is -1."""
        after_separator = np.zeros_like(input_ids)
        after_separator[:, 1:] = input_ids[:, :-1] == self.separator
        after_separator[:, 1 : len(self.opening) + 1] = 0  # an opening token may be the separator's twin
        ends = real.sum(axis=1, keepdims=True) - len(self.closing)
        after_separator[np.arange(self.block_size) >= ends] = 0  # the closing tokens go with the last document
        return np.where(real, np.cumsum(after_separator, axis=1), -1)


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after one sequence: [CLS] and [SEP], <s> and </s>, or nothing."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]
