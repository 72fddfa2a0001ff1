"""Cut a token stream into blocks, and make masked or causal batches of them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from distilkit.data.cache import separator_id
from distilkit.data.masking import Ids, Masker
from distilkit.errors import UserError
from distilkit.language_model import Batch
from distilkit.losses import IGNORE_INDEX

Draw = tuple[int, Ids]  # an epoch and block indices: what a sampler passes to the dataset


class Blocks(Dataset[Batch]):
    """Cut a token stream into blocks of equal length, and make batches of them.

    A block is the tokenizer's opening tokens, a piece of the stream, and its closing tokens. Each token of the stream
    is in exactly one block. Only the last block may be padded.
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
        """Take a stream (tokens,), and a masker or None for causal models."""
        self.masker = masker
        self.block_size = block_size
        self.attend_across_documents = attend_across_documents
        self.separator = separator_id(tokenizer)
        self.opening, self.closing = special_tokens_around(tokenizer)
        self.stride = block_size - len(self.opening) - len(self.closing)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.separator
        num_full = len(tokens) // self.stride
        stream = np.asarray(tokens)  # slicing a memory map is slow
        self.full = stream[: num_full * self.stride].reshape(num_full, self.stride)  # (full blocks, stride)
        self.rest = stream[num_full * self.stride :]  # (fewer than stride,)

    def __len__(self) -> int:
        """Return the number of blocks, including the padded last one."""
        return len(self.full) + bool(len(self.rest))

    def __getitem__(self, draw: Draw) -> Batch:
        """Make the batch of these blocks in this epoch: tensors of (batch, block_size)."""
        epoch, blocks = draw
        input_ids, lengths = self.input_ids(blocks)
        real = np.arange(self.block_size) < lengths[:, None]  # (batch, block_size)
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
        """Gather unmasked blocks (batch,): ids (batch, block_size) and the number of real tokens of each (batch,)."""
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
            ids[~is_full, begin : begin + len(last)] = last  # its closing tokens come before the padding
        return ids, lengths

    def document_ids(self, input_ids: Ids, real: NDArray[np.bool_]) -> Ids:
        """Number the documents of each block from 0, (batch, block_size); padding is -1.

        1. A document starts after a separator, which belongs to the document before it.
        2. Opening tokens start none: the first one may have the separator's id.
        3. Closing tokens start none: they belong to the last document.
        """
        starts = np.zeros_like(input_ids)  # (batch, block_size)
        starts[:, 1:] = input_ids[:, :-1] == self.separator
        starts[:, 1 : len(self.opening) + 1] = 0
        ends = real.sum(axis=1, keepdims=True) - len(self.closing)  # (batch, 1), where closing tokens begin
        starts[np.arange(self.block_size) >= ends] = 0
        return np.where(real, np.cumsum(starts, axis=1), -1)


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a sequence: [CLS] and [SEP], <s> and </s>, or none.

    The probe is the first text of the vocabulary that becomes words, because a tokenizer may drop any fixed one.
    """
    special = set(tokenizer.all_special_ids)
    for word in sorted(set(tokenizer.get_vocab().values()) - special):
        text = tokenizer.decode([word])
        inner = tokenizer(text, add_special_tokens=False)["input_ids"]
        if inner and not special.intersection(inner):
            whole = tokenizer(text)["input_ids"]
            starts = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner]
            if starts:
                return whole[: starts[0]], whole[starts[0] + len(inner) :]
    raise UserError(
        f"the tokenizer turns none of its {len(tokenizer)} words into tokens, so that its opening and closing tokens "
        "are unknown; check its normalizer and vocabulary, or set tokenizer=wordpiece or tokenizer=bpe"
    )
