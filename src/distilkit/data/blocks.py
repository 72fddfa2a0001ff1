"""Cut a token stream into blocks or documents, and make masked or causal batches of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from distilkit.data.cache import separator_id
from distilkit.data.masking import VALIDATION_EPOCH, Ids, Masker
from distilkit.data.teacher_states import TeacherStates
from distilkit.errors import UserError
from distilkit.language_model import Batch
from distilkit.losses import IGNORE_INDEX

# What a sampler passes to the dataset: an epoch, block indices, and for a rate that changes the progress (0 to 1).
# An index below 0, ~i, is block i that is read and not counted.
Draw = tuple[int, Ids] | tuple[int, Ids, float]
Packing = Literal["blocks", "documents"]

_SCANNED = 2**24  # tokens of the stream that are searched for separators at a time


class Blocks(Dataset[Batch]):
    """Cut a token stream into blocks, and make batches of them. Each token of a document is in exactly one block.

    1. By default a block is the tokenizer's opening tokens, a piece of the stream of fixed length, and its closing
       tokens. Separators stand between documents. Only the last block may be padded.
    2. Without ``attend_across_documents``, each document of a block has its own opening and closing tokens, also where
       a block cuts it. A block may end with a few tokens of padding, because a cut needs both.
    3. With ``packing=documents``, a block is one document with its opening and closing tokens, or a part of a document
       that is longer. A batch is padded to its longest. For causal models a separator ends each document.

    Pickling keeps the path of a memory-mapped stream, and not its tokens.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        masker: Masker | None,
        attend_across_documents: bool,
        packing: Packing,
        teacher_states: TeacherStates | None = None,
    ) -> None:
        """Take a stream (tokens,), a masker or None for causal models, and cached states of the labelled tokens."""
        self.masker, self.teacher_states = masker, teacher_states
        self.block_size, self.packing = block_size, packing
        self.separator = separator_id(tokenizer)
        self.opening, self.closing = special_tokens_around(tokenizer)
        self.stride = block_size - len(self.opening) - len(self.closing)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.separator
        self.apart = packing == "blocks" and not attend_across_documents
        # What stands for a separator between two documents that have their own opening and closing tokens.
        self.between = [*(self.closing or [self.separator]), *self.opening]
        self._source = _file_of(tokens) or tokens
        self._dtype = tokens.dtype
        self._open()

    def _open(self) -> None:
        """Map the stream, and find where its blocks begin."""
        tokens = self._source if isinstance(self._source, np.ndarray) else np.memmap(self._source, self._dtype, "r")
        self.stream = np.asarray(tokens)  # slicing a memory map is slow
        num_full = len(self.stream) // self.stride
        self.full = self.stream[: num_full * self.stride].reshape(num_full, self.stride)  # (full blocks, stride)
        if self.packing == "documents" or self.apart:  # block i is stream[begins[i] : begins[i] + sizes[i]], (blocks,)
            self.begins, self.sizes = self._documents() if self.packing == "documents" else self._cut_apart()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be read from the stream again."""
        return {k: v for k, v in vars(self).items() if k not in ("stream", "full", "begins", "sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the stream in this process."""
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        """Return the number of blocks, including the padded last one."""
        cut = self.packing == "documents" or self.apart
        return len(self.begins) if cut else -(-len(self.stream) // self.stride)

    def __getitem__(self, draw: Draw) -> Batch:
        """Make the batch of these blocks in this epoch: tensors of (batch, block_size), or (batch, longest document)."""
        epoch, blocks, progress = draw if len(draw) == 3 else (*draw, 1.0)
        left_out = blocks < 0  # (batch,)
        blocks = np.where(left_out, ~blocks, blocks)
        input_ids, lengths, documents = self.sequences(blocks)
        real = np.arange(input_ids.shape[1]) < lengths[:, None]  # (batch, length)
        if self.masker is not None:
            model_ids, labels = self.masker(input_ids, epoch=epoch, samples=blocks, lengths=lengths, progress=progress)
        else:
            model_ids = input_ids
            labels = np.full_like(input_ids, IGNORE_INDEX)  # position t predicts token t + 1
            goes_on = real[:, 1:]
            if documents is not None and self.opening:  # the opening tokens of the next document are no targets
                goes_on = goes_on & (documents[:, 1:] == documents[:, :-1])
            labels[:, :-1] = np.where(goes_on, input_ids[:, 1:], IGNORE_INDEX)
        labels[left_out] = IGNORE_INDEX
        batch: Batch = {"input_ids": torch.from_numpy(model_ids), "labels": torch.from_numpy(labels)}
        if not real.all():
            batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        if documents is not None:
            batch["document_ids"] = torch.from_numpy(documents)
        if left_out.any():
            batch["left_out"] = torch.from_numpy(left_out)
        if self.teacher_states is not None and epoch != VALIDATION_EPOCH:
            batch["teacher_states"] = self.teacher_states.rows(epoch, blocks[~left_out])
        return batch

    def sequences(self, blocks: Ids) -> tuple[Ids, Ids, Ids | None]:
        """Gather unmasked blocks (batch,): ids (batch, length), and the number of real tokens of each (batch,).

        If documents are kept apart, the third array (batch, length) numbers them from 0; padding is -1.
        """
        num_opening, fixed = len(self.opening), self.packing == "blocks"
        if fixed and not self.apart and (blocks < len(self.full)).all():  # the fast path
            ids = np.empty((len(blocks), self.block_size), dtype=np.int64)
            ids[:, :num_opening], ids[:, num_opening + self.stride :] = self.opening, self.closing
            ids[:, num_opening : num_opening + self.stride] = self.full.take(blocks, axis=0)
            return ids, np.full(len(blocks), self.block_size), None
        if fixed and not self.apart:
            begins, sizes = blocks * self.stride, np.minimum(self.stride, len(self.stream) - blocks * self.stride)
        else:
            begins, sizes = self.begins[blocks], self.sizes[blocks].astype(np.int64)
        within = np.arange(sizes.max())
        taken = within < sizes[:, None]  # (batch, longest)
        pieces = self.stream[np.minimum(begins[:, None] + within, len(self.stream) - 1)]
        separates = taken & (pieces == self.separator) & self.apart
        before = np.cumsum(separates, axis=1) - separates  # (batch, longest), the separators before each token
        places = num_opening + within + before * (len(self.between) - 1)
        ends = places[np.arange(len(blocks)), sizes - 1] + 1  # (batch,), where closing tokens begin
        lengths = ends + len(self.closing)

        ids = np.full((len(blocks), self.block_size if fixed else lengths.max()), self.pad_id, dtype=np.int64)
        ids[:, :num_opening] = self.opening
        rows, columns = np.nonzero(taken)
        ids[rows, places[rows, columns]] = pieces[rows, columns]
        ids[np.arange(len(blocks))[:, None], ends[:, None] + np.arange(len(self.closing))] = self.closing
        if not self.apart:
            return ids, lengths, None
        rows, columns = np.nonzero(separates & (within + 1 < sizes[:, None]))  # the last one separates nothing
        for offset, token in enumerate(self.between):
            ids[rows, places[rows, columns] + offset] = token
        starts = np.zeros_like(ids)
        starts[rows, places[rows, columns] + len(self.between) - num_opening] = 1
        real = np.arange(ids.shape[1]) < lengths[:, None]
        return ids, lengths, np.where(real, np.cumsum(starts, axis=1), -1)

    def _documents(self) -> tuple[Ids, NDArray[np.int32]]:
        """Cut each document into parts of at most ``stride`` tokens: their begins and sizes in the stream, (parts,)."""
        begins, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for starts, ends in _bounds(self.stream, self.separator):
            counts = -((starts - ends) // self.stride)  # (documents,), rounded up; none of an empty document
            part = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # (parts,)
            begins.append(np.repeat(starts, counts) + part * self.stride)
            left = np.repeat(ends, counts) - begins[-1]
            if self.masker is None and not self.closing:  # the separator too, if it has room
                left += np.repeat(ends < len(self.stream), counts)
            sizes.append(np.minimum(left, self.stride).astype(np.int32))
        return np.concatenate(begins), np.concatenate(sizes)

    def _cut_apart(self) -> tuple[Ids, NDArray[np.int32]]:
        """Cut the stream so that blocks have room for the special tokens of all documents: begins and sizes, (blocks,).

        1. Count each document with its opening and closing tokens, and cut this longer stream every ``stride`` tokens.
           So a block has room for the tokens that a cut at both of its ends needs.
        2. Map the cuts back. A cut among special tokens moves to the end of the document before them.
        """
        extra, offset = len(self.between) - 1, 0
        begins, ends = [np.zeros(1, np.int64)], []
        for first, last in _bounds(self.stream, self.separator):
            longer = first + (offset + np.arange(len(first))) * extra  # (documents,), where they start
            offset += len(first)
            cuts = np.arange(-(-longer[0] // self.stride), -(-(last[-1] + 1 + offset * extra) // self.stride))
            cuts = cuts[cuts > 0] * self.stride  # (cuts,)
            document = np.searchsorted(longer, cuts, side="right") - 1
            start, end = first[document], last[document]
            places = np.minimum(start + np.maximum(cuts - longer[document] - len(self.opening), 0), end)
            begins.append(places + (places == end))  # without the separator
            ends.append(places - (places == start) * bool(self.closing))
        ends.append(np.array([len(self.stream) - (self.stream[-1:] == self.separator).sum() * bool(self.closing)]))
        begin, end = np.concatenate(begins), np.concatenate(ends)
        kept = begin < end
        return begin[kept], (end - begin)[kept].astype(np.int32)


def _file_of(tokens: NDArray[Any]) -> Path | None:
    """Return the file of which an array is the memory map."""
    if not isinstance(tokens, np.memmap) or tokens.filename is None:
        return None
    file = Path(tokens.filename)
    return file if file.stat().st_size == tokens.nbytes else None


def _bounds(stream: NDArray[Any], separator: int) -> Iterator[tuple[Ids, Ids]]:
    """Yield starts and ends of the documents, (documents,), a part of the stream at a time; separators are in none."""
    start = 0
    for begin in range(0, len(stream), _SCANNED):
        part = stream[begin : begin + _SCANNED]
        ends = begin + np.flatnonzero(part == separator)
        if begin + len(part) == len(stream) and part[-1] != separator:
            ends = np.append(ends, len(stream))
        if len(ends):
            yield np.concatenate([[start], ends[:-1] + 1]), ends
            start = int(ends[-1]) + 1


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
            if len(starts) == 1:  # else the word may itself be an opening or closing token that has no name
                return whole[: starts[0]], whole[starts[0] + len(inner) :]
    raise UserError(
        f"the tokenizer turns none of its {len(tokenizer)} words into tokens, so that its opening and closing tokens "
        "are unknown; check its normalizer and vocabulary, or set tokenizer=wordpiece or tokenizer=bpe"
    )
