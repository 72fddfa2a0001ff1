"""What the models will read: blocks with masks beside the teacher's predictions, and figures about the text."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from distilkit.data import DistillationDataModule
from distilkit.data.cache import separator_id, unknown_share
from distilkit.language_model import lm_head, token_states
from distilkit.losses import IGNORE_INDEX

_READ, _DRAWN = 2**24, 256  # tokens in which documents are measured, blocks in which padding is counted
_TOKENS, _SHOWN, _TOP = 48, 6, 3  # of a block, targets of a causal model in it, predictions for each


@dataclass(frozen=True, kw_only=True)
class Example:
    """The start of a block: pieces of text, of which every second one is a target, and tokens predicted for each."""

    pieces: list[str]
    predictions: list[list[tuple[str, float]]]  # with their probabilities


def documents_of(tokens: NDArray[Any], separator: int) -> list[NDArray[Any]]:
    """Cut a stream (tokens,) into its documents; what follows the last separator is left out, unless it is all."""
    ends = np.flatnonzero(tokens == separator)
    parts = np.split(tokens, ends + 1)
    return [part[:-1] for part in parts[:-1]] or parts


def text_figures(data: DistillationDataModule) -> dict[str, float]:
    """Return figures about the training split; lengths and duplicates are of its first ``documents_read`` documents."""
    assert data.cache is not None and data.train_blocks is not None
    documents = documents_of(np.asarray(data.cache.tokens["train"][:_READ]), separator_id(data.tokenizer))
    median, high = np.percentile([len(each) for each in documents], [50, 95])
    drawn = data.draw(_DRAWN)
    places = sum(batch["input_ids"].numel() for batch in drawn)
    return {
        "documents": data.cache.meta["documents"]["train"],
        "tokens": len(data.cache.tokens["train"]),
        "blocks": len(data.train_blocks),
        "unknown_share": unknown_share(data.cache.token_counts, data.tokenizer) or 0.0,
        "padding_share": 1 - sum(int(batch["num_tokens"]) for batch in drawn) / places,
        "document_tokens_median": float(median),
        "document_tokens_p95": float(high),
        "duplicates": len(documents) - len({each.tobytes() for each in documents}),
        "documents_read": len(documents),
    }


@torch.no_grad()
def examples(data: DistillationDataModule, teacher: PreTrainedModel | None, *, count: int) -> list[Example]:
    """Draw masked training blocks, and let the teacher, if there is one, predict some of their targets.

    A causal model predicts each next token, of which a few are shown.
    """
    tokenizer, found, after = data.tokenizer, list[Example](), int(data.lm == "clm")

    def spell(token_id: int) -> str:
        return " ".join(str(tokenizer.decode([token_id])).split()) or str(tokenizer.convert_ids_to_tokens(token_id))

    for batch in data.draw(count):
        ids, labels, states = batch["input_ids"], batch["labels"], None
        if teacher is not None:
            states = token_states(teacher, batch).view(*ids.shape, -1)
        for block, row in enumerate(ids[:, :_TOKENS]):
            places = (labels[block, : len(row) - after] != IGNORE_INDEX).nonzero().flatten().tolist()
            places = places[:: max(1, len(places) // _SHOWN)] if after else places
            example, begin = Example(pieces=[], predictions=[]), 0
            for place in places[:_SHOWN] if after else places:
                at = place + after  # of a causal model, position t predicts token t + 1
                example.pieces.extend([str(tokenizer.decode(row[begin:at])), spell(int(labels[block, place]))])
                begin, best = at + 1, list[tuple[str, float]]()
                if teacher is not None and states is not None:
                    logits = torch.nn.functional.linear(*lm_head(teacher, states[block, place][None]))[0]  # (ids,)
                    top = logits.float().softmax(dim=0).topk(_TOP)
                    best = [(spell(int(i)), float(p)) for p, i in zip(top.values, top.indices, strict=True)]
                example.predictions.append(best)
            example.pieces.append(str(tokenizer.decode(row[begin:])))
            found.append(example)
    return found
