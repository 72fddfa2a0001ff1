"""What the models will read: blocks with masks beside the teacher's predictions, and figures about the text."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data import DistillationDataModule
from distilkit.data.cache import separator_id, unknown_share
from distilkit.language_model import Batch, lm_head, token_states
from distilkit.losses import IGNORE_INDEX

_READ = 2**24  # tokens of the training split in which documents are measured
_DRAWN = 256  # blocks in which padding is counted
_TOKENS, _SHOWN, _TOP = 72, 6, 3  # of a block, targets in it, predictions for each


@dataclass(frozen=True, kw_only=True)
class TextFigures:
    """Figures about the training split; lengths and duplicates are of its first ``documents_read`` documents."""

    documents: int
    tokens: int
    blocks: int
    unknown_share: float
    padding_share: float
    tokens_per_document_median: float
    tokens_per_document_p95: float
    duplicate_documents: int
    documents_read: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """A token to predict, its place in the block, and the teacher's best predictions with their probabilities."""

    place: int
    token: str
    predictions: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """The start of a block: its pieces of text, of which every second one is a target, and the targets."""

    pieces: tuple[str, ...]
    targets: tuple[Target, ...]


def documents_of(tokens: NDArray[np.unsignedinteger], separator: int) -> list[NDArray[np.unsignedinteger]]:
    """Cut a stream (tokens,) into its documents; a last one without its separator is left out, unless it is alone."""
    ends = np.flatnonzero(tokens == separator)
    if not len(ends):
        return [tokens] if len(tokens) else []
    return [part[1:] if number else part for number, part in enumerate(np.split(tokens, ends)[:-1])]


def text_figures(data: DistillationDataModule) -> TextFigures:
    """Return figures about the training split of a data module that is set up."""
    assert data.cache is not None and data.train_blocks is not None
    documents = documents_of(np.asarray(data.cache.tokens["train"][:_READ]), separator_id(data.tokenizer))
    lengths = [len(each) for each in documents]
    median, high = np.percentile(lengths, [50, 95]) if lengths else (0.0, 0.0)
    places = real = 0
    for batch in data.draw(_DRAWN):
        places += batch["input_ids"].numel()
        real += int(batch["num_tokens"])
    return TextFigures(
        documents=data.cache.meta["documents"]["train"],
        tokens=len(data.cache.tokens["train"]),
        blocks=len(data.train_blocks),
        unknown_share=unknown_share(data.cache.token_counts, data.tokenizer),
        padding_share=1 - real / places,
        tokens_per_document_median=float(median),
        tokens_per_document_p95=float(high),
        duplicate_documents=len(documents) - len({each.tobytes() for each in documents}),
        documents_read=len(documents),
    )


@torch.no_grad()
def examples(data: DistillationDataModule, teacher: PreTrainedModel | None, *, count: int) -> list[Example]:
    """Draw masked training blocks, and let the teacher predict some of their targets; without one, none is predicted.

    A causal model predicts each next token, of which a few are shown.
    """
    found: list[Example] = []
    for batch in data.draw(count):
        logits = None
        if teacher is not None:
            rows = batch["labelled"]
            logits = torch.nn.functional.linear(*lm_head(teacher, token_states(teacher, batch)[rows]))  # (rows, ids)
        found += _examples(batch, data.tokenizer, logits, causal=data.lm == "clm")
    return found[:count]


def _examples(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, logits: torch.Tensor | None, *, causal: bool
) -> list[Example]:
    """Cut the start of each block of a micro-batch at its targets; ``logits`` (rows, ids) are of its labelled tokens."""
    number_of = {int(flat): number for number, flat in enumerate(batch["labelled"])}
    ids, labels = batch["input_ids"], batch["labels"]
    length, found = ids.shape[1], []
    for block in range(len(ids)):
        end = min(length, _TOKENS)
        places = [place for place in range(end) if labels[block, place] != IGNORE_INDEX]
        if causal:  # spread over the block; position t predicts token t + 1
            places = places[:: max(1, len(places) // _SHOWN)]
        places = places[:_SHOWN]
        pieces, targets, begin = [], [], 0
        for place in places:
            at = place + 1 if causal else place
            if at >= end:
                continue
            pieces.append(tokenizer.decode(ids[block, begin:at]))
            token = _spell(int(labels[block, place]), tokenizer)
            pieces.append(token)
            begin = at + 1
            predictions: tuple[tuple[str, float], ...] = ()
            if logits is not None:
                top = logits[number_of[block * length + place]].float().softmax(dim=0).topk(_TOP)
                both = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                predictions = tuple((_spell(token_id, tokenizer), share) for token_id, share in both)
            targets.append(Target(place=at, token=token, predictions=predictions))
        pieces.append(tokenizer.decode(ids[block, begin:end]))
        found.append(Example(pieces=tuple(pieces), targets=tuple(targets)))
    return found


def _spell(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return " ".join(str(tokenizer.decode([token_id])).split()) or str(tokenizer.convert_ids_to_tokens(token_id))


def show_examples(found: list[Example]) -> RenderableType:
    """Return the blocks with their targets in colour, each beside the teacher's predictions."""
    table = Table(box=None, padding=(0, 2, 1, 0), expand=True, show_header=True, header_style="bold")
    table.add_column("a block, with [what to predict]", ratio=3)
    table.add_column("the teacher says", ratio=2)
    for example in found:
        text, beside = Text(), Text()
        for number, piece in enumerate(example.pieces):
            text.append(f" [{piece}] " if number % 2 else " ".join(piece.split()), "bold magenta" if number % 2 else "")
        for target in example.targets:
            beside.append(f"{target.token}: ", "bold magenta")
            if not target.predictions:
                beside.append("no teacher")
            for number, (token, share) in enumerate(target.predictions):
                style = "green" if token == target.token else ""
                beside.append(f"{', ' * bool(number)}")
                beside.append(f"{token} {share:.0%}", style)
            beside.append("\n")
        beside.rstrip()
        table.add_row(text, beside)
    return table


def show_figures(figures: TextFigures) -> RenderableType:
    """Return the figures about the text as a few lines."""
    given = asdict(figures)
    part = "" if figures.documents_read >= figures.documents else f" of the first {figures.documents_read:,}"
    lines = (
        "{documents:,} documents, {tokens:,} tokens, {blocks:,} blocks to train on",
        "{tokens_per_document_median:,.0f} tokens in the median document, {tokens_per_document_p95:,.0f} at the 95th "
        "percentile; {duplicate_documents:,} exact duplicates" + part,
        "{unknown_share:.2%} of the tokens unknown to the tokenizer, {padding_share:.1%} of a block padding",
    )
    return Group(*(line.format(**given) for line in lines))
