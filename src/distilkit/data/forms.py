"""Score a teacher on the same held-out tokens in two forms of input: packed blocks, and one document a sequence."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data.blocks import Blocks, Packing
from distilkit.data.cache import separator_id
from distilkit.data.masking import VALIDATION_EPOCH, Ids, Masker
from distilkit.language_model import Batch, lm_head, token_states
from distilkit.losses import IGNORE_INDEX, score

Values = NDArray[np.float64]

_DOCUMENTS, _TOKENS, _STRETCHES = 48, 8192, 4  # what is read at most, from so many places of the split
_FORMS: tuple[Packing, ...] = ("documents", "blocks")
_PLACE = 2**40  # added to a token's place in the stream; above every id of a vocabulary
_FEWEST, _ERRORS, _NATS = 8, 3.0, 0.05  # a difference counts with so many sequences, standard errors and nats


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A teacher's cross-entropy in nats and its accuracy in each form of input, over the same tokens.

    ``difference`` is the cross-entropy of blocks minus that of documents, with its paired standard ``error`` over
    sequences of the form ``documents``.
    """

    nll: dict[Packing, float]
    accuracy: dict[Packing, float]
    sequences: int
    difference: float
    error: float

    def worse(self, packing: Packing) -> bool:
        """Whether this form is clearly worse: beyond chance, and by enough to matter."""
        excess = self.difference if packing == "blocks" else -self.difference
        return self.sequences >= _FEWEST and excess > max(_ERRORS * self.error, _NATS)


@torch.no_grad()
def compare_forms(
    model: PreTrainedModel,
    tokens: NDArray[np.unsignedinteger],
    *,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    masker: Masker | None,
    attend_across_documents: bool,
    batch_size: int,
) -> Comparison | None:
    """Score a model on an excerpt of a stream (tokens,) as blocks and as documents; None without tokens to score.

    The masked tokens, and what replaces them, are the same in both forms; ``masker`` is None for a causal model.
    """
    tokens = _excerpt(tokens, separator_id(tokenizer))
    places = np.where(tokens == separator_id(tokenizer), tokens, _PLACE + np.arange(len(tokens), dtype=np.int64))

    def cut(stream: NDArray[np.generic], packing: Packing) -> tuple[Ids, Ids, Ids | None]:
        blocks = Blocks(
            stream,
            tokenizer=tokenizer,
            block_size=block_size,
            masker=masker,
            attend_across_documents=attend_across_documents,
            packing=packing,
        )
        return blocks.sequences(np.arange(len(blocks)))

    where = {packing: cut(places, packing)[0] - _PLACE for packing in _FORMS}  # negative: special
    sequence = np.full(len(tokens), -1)  # (tokens,), the document's sequence in which each token is
    rows, columns = np.nonzero(where["documents"] >= 0)
    sequence[where["documents"][rows, columns]] = rows
    read, wanted = tokens.copy(), sequence >= 0  # (tokens,) each
    if masker is not None:
        ids, lengths, _ = cut(tokens, "documents")
        masked, labels = masker(ids, epoch=VALIDATION_EPOCH, samples=np.arange(len(ids)), lengths=lengths)
        rows, columns = np.nonzero(labels != IGNORE_INDEX)
        chosen = where["documents"][rows, columns]
        read[chosen], wanted[:] = masked[rows, columns], False
        wanted[chosen] = True
    nll: dict[Packing, Values] = {}
    hits: dict[Packing, Values] = {}
    for packing in _FORMS:
        nll[packing], hits[packing] = _score(
            model, cut(read, packing), where[packing], tokens, wanted, causal=masker is None, batch_size=batch_size
        )
    both = ~np.isnan(nll["blocks"]) & ~np.isnan(nll["documents"])  # a first token has no context as a document
    if not both.any():
        return None
    excess = np.bincount(sequence[both], nll["blocks"][both] - nll["documents"][both])  # (sequences,)
    sizes = np.bincount(sequence[both])
    excess, sizes = excess[sizes > 0], sizes[sizes > 0]
    difference, count = excess.sum() / sizes.sum(), len(sizes)
    spread = np.square(excess - difference * sizes).sum() * count / max(count - 1, 1)
    return Comparison(
        nll={packing: float(values[both].mean()) for packing, values in nll.items()},
        accuracy={packing: float(values[both].mean()) for packing, values in hits.items()},
        sequences=count,
        difference=float(difference),
        error=float(np.sqrt(spread) / sizes.sum()),
    )


def _excerpt(tokens: NDArray[np.unsignedinteger], separator: int) -> NDArray[np.unsignedinteger]:
    """Take neighbouring documents from a few places of a stream, as one stream that ends with a separator."""
    parts = 1 if len(tokens) <= _TOKENS else _STRETCHES
    taken = []
    for part in range(parts):
        begin = part * (len(tokens) // parts)
        if part:  # where a document starts, unless it is a very long one
            ends = np.flatnonzero(tokens[begin : begin + len(tokens) // parts - _TOKENS // parts] == separator)
            begin += int(ends[0]) + 1 if len(ends) else 0
        piece = np.asarray(tokens[begin : begin + _TOKENS // parts])
        ends = np.flatnonzero(piece == separator)[: _DOCUMENTS // parts]
        whole = len(ends) == _DOCUMENTS // parts or (len(ends) and ends[-1] == len(piece) - 1)
        piece = piece[: ends[-1]] if whole else piece
        taken += [piece, np.array([separator], dtype=tokens.dtype)]
    return np.concatenate(taken)


def _score(
    model: PreTrainedModel,
    sequences: tuple[Ids, Ids, Ids | None],
    places: Ids,
    tokens: NDArray[np.unsignedinteger],
    wanted: NDArray[np.bool_],
    *,
    causal: bool,
    batch_size: int,
) -> tuple[Values, Values]:
    """Return the cross-entropy of each token of the stream and whether the prediction is right, NaN where unscored.

    ``places`` (sequences, length) are the places of a form's tokens in the stream, negative for special tokens.
    """
    ids, lengths, documents = sequences
    device = model.device
    nll, hits = np.full((2, len(tokens)), np.nan)
    if causal:  # position t predicts token t + 1
        places = np.concatenate([places[:, 1:], np.full((len(places), 1), -1)], axis=1)
    scored = (places >= 0) & wanted[np.maximum(places, 0)]
    for begin in range(0, len(ids), batch_size):
        rows = slice(begin, begin + batch_size)
        real = np.arange(ids.shape[1]) < lengths[rows, None]
        batch: Batch = {"input_ids": torch.from_numpy(ids[rows]).to(device), "labels": torch.empty(0)}
        if not real.all():
            batch["attention_mask"] = torch.from_numpy(real.astype(np.int64)).to(device)
        if documents is not None:
            batch["document_ids"] = torch.from_numpy(documents[rows]).to(device)
        chosen = places[rows][scored[rows]]  # (rows,)
        flat = torch.from_numpy(np.flatnonzero(scored[rows])).to(device)
        targets = torch.from_numpy(tokens[chosen].astype(np.int64)).to(device)
        if len(chosen):
            loss, predictions = score(lm_head(model, token_states(model, batch)[flat]), targets)
            nll[chosen] = loss.float().cpu().numpy()
            hits[chosen] = (predictions == targets).cpu().numpy()
    return nll, hits
