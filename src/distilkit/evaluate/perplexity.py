"""How well a language model predicts held-out text: pseudo-perplexity, masked accuracy, perplexity.

Every score is a sum over batches of one kind: ids, and labels where a state is to predict a token.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data.blocks import special_tokens_around
from distilkit.data.corpus import Corpus
from distilkit.data.masking import VALIDATION_EPOCH, Ids, Masker, Masking
from distilkit.data.text_files import TextFiles
from distilkit.data.tokenizer import load_tokenizer
from distilkit.errors import UserError
from distilkit.evaluate.models import weights_id
from distilkit.language_model import (
    check_positions,
    check_split,
    last_hidden_state,
    lm_head,
    load_language_model,
    max_positions,
    num_parameters,
    num_parameters_without_embeddings,
    weight_hash,
)
from distilkit.losses import IGNORE_INDEX
from distilkit.losses import score as score_rows
from distilkit.records import Result, cost
from distilkit.student import check_vocabulary

PARAGRAPH = "\n\n"
_MAX_BLOCK_SIZE = 512  # what most encoders have, and as much context as a comparison of students needs


class Text(NamedTuple):
    """The ids of each document without special tokens, and how many whitespace-separated words they spell."""

    documents: list[Ids]
    words: int

    def counts(self) -> dict[str, int]:
        """Say how much text it is."""
        tokens = sum(map(len, self.documents))
        return {"documents": len(self.documents), "text_tokens": tokens, "words": self.words}


class ScoredBatch(NamedTuple):
    """Windows padded to one length, all (batch, length): ids, the token each state is to predict or -100, and what is real."""

    input_ids: Ids
    labels: Ids
    real: NDArray[np.bool_]


@dataclass(kw_only=True)
class Sums:
    """Sums over scored tokens: negative log-likelihood in nats, and predictions that were right."""

    nll: float = 0.0
    correct: int = 0
    tokens: int = 0


class Scored(NamedTuple):
    """What a kind of model got: the task's name, its scores, and the settings and counts that go with it."""

    task: str
    scores: dict[str, float]
    settings: dict[str, Any]
    details: dict[str, Any]


def read_text(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None, separator: str = ""
) -> Text:
    """Tokenize documents until ``max_tokens`` are read, each but the first with ``separator`` before it.

    Text that spells a special token is split like any other.

    Raises:
        UserError: there is no text.
    """
    documents: list[Ids] = []
    left, words = max_tokens, 0
    for document in corpus.documents():
        text = separator + document if documents else document
        encoding = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(encoding["input_ids"][:left], dtype=np.int64)
        if len(ids):
            documents.append(ids)
            words += len(text[: encoding["offset_mapping"][len(ids) - 1][1]].split())
        left = None if left is None else left - len(ids)
        if left == 0:
            break
    if not documents:
        raise UserError("the text to score is empty; check task.paths, or the split of task.dataset")
    return Text(documents, max(1, words))


def masked_windows(text: Text, tokenizer: PreTrainedTokenizerBase, *, block_size: int) -> list[Ids]:
    """Cut each document into windows with the tokenizer's special tokens around them; none holds two documents.

    Raises:
        UserError: a window has no room for a token.
    """
    before, after = special_tokens_around(tokenizer)
    room = block_size - len(before) - len(after)
    if room < 1:
        raise UserError(
            f"task.block_size={block_size} leaves no room beside the {len(before) + len(after)} special tokens of a window; "
            f"set task.block_size to {block_size - room + 1} or more"
        )
    pieces = (ids[start : start + room] for ids in text.documents for start in range(0, len(ids), room))
    return [np.array([*before, *piece, *after]) for piece in pieces]


def pseudo_places(
    windows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None
) -> list[tuple[int, int]]:
    """List window and place of each token to hide alone, like windows together; where there are too many, spread evenly.

    [UNK] and other special tokens are left out.

    Raises:
        UserError: there is none.
    """
    special = tokenizer.all_special_ids
    places = [(row, int(place)) for row, ids in enumerate(windows) for place in np.flatnonzero(~np.isin(ids, special))]
    if not places:
        raise UserError("the tokenizer knows no token of the text; check task.paths, or the tokenizer of the model")
    if max_tokens is not None and len(places) > max_tokens:
        places = [places[number * len(places) // max_tokens] for number in range(max_tokens)]
    return sorted(places, key=lambda place: -len(windows[place[0]]))


def pseudo_batches(
    windows: Sequence[Ids],
    places: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
) -> Iterator[ScoredBatch]:
    """Hide one token of a window at a time (Salazar et al. 2020, section 2)."""
    for start in range(0, len(places), batch_size):
        chosen = places[start : start + batch_size]
        batch = padded([windows[row] for row, _ in chosen], tokenizer)
        index = (np.arange(len(chosen)), np.array([place for _, place in chosen]))
        batch.labels[index] = batch.input_ids[index]
        batch.input_ids[index] = cast(int, tokenizer.mask_token_id)
        yield batch


def masked_batches(
    windows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, *, batch_size: int, masked_share: float, seed: int
) -> Iterator[ScoredBatch]:
    """Hide a share of each window at once, drawn from the seed and the window's number; all become the mask token."""
    masking = Masking(mlm_probability=masked_share, mask_share=1.0, random_share=0.0, smoothing=0.0, whole_word=False)
    masker = Masker(masking, tokenizer=tokenizer, token_counts=np.zeros(0, dtype=np.int64), seed=seed)
    order = np.argsort([-len(ids) for ids in windows], kind="stable")
    for start in range(0, len(order), batch_size):
        samples = order[start : start + batch_size]
        batch = padded([windows[sample] for sample in samples], tokenizer)
        lengths = batch.real.sum(axis=1)
        yield ScoredBatch(
            *masker(batch.input_ids, epoch=VALIDATION_EPOCH, samples=samples, lengths=lengths), batch.real
        )


def window_begins(num_tokens: int, *, block_size: int, stride: int) -> range:
    """Return where the windows begin; the last one reaches the end of the text."""
    return range(0, max(1, num_tokens - block_size + stride), stride)


def causal_batches(
    ids: Ids, tokenizer: PreTrainedTokenizerBase, *, block_size: int, stride: int, batch_size: int
) -> Iterator[ScoredBatch]:
    """Slide a window over one stream of tokens: the first predicts all its tokens but the first, others the last ``stride``.

    A window's own first token is never predicted, so that with ``stride == block_size`` one in so many is left out
    (transformers' guide to the perplexity of fixed-length models).
    """
    all_begins = window_begins(len(ids), block_size=block_size, stride=stride)
    for start in range(0, len(all_begins), batch_size):
        begins = all_begins[start : start + batch_size]
        batch = padded([ids[begin : begin + block_size] for begin in begins], tokenizer)
        for row, begin in enumerate(begins):
            end = min(begin + block_size, len(ids))
            scored = max(begin + 1, begin + block_size - stride if begin else 0)
            batch.labels[row, scored - begin - 1 : end - begin - 1] = ids[scored:end]
        yield batch


def padded(rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase) -> ScoredBatch:
    """Pad windows to the longest; no label is set yet."""
    real = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    input_ids = np.full(real.shape, tokenizer.pad_token_id or 0, dtype=np.int64)
    input_ids[real] = np.concatenate(rows)
    return ScoredBatch(input_ids, np.full(real.shape, IGNORE_INDEX, dtype=np.int64), real)


@torch.inference_mode()
def score(model: PreTrainedModel, batches: Iterable[ScoredBatch]) -> Sums:
    """Sum what the model makes of the labelled tokens; only their states meet the vocabulary."""
    sums = Sums()
    for batch in batches:
        input_ids, labels, real = (torch.from_numpy(part).to(model.device) for part in batch)
        states = last_hidden_state(model, input_ids, attention_mask=None if batch.real.all() else real.long())
        scored = labels != IGNORE_INDEX
        targets = labels[scored]
        nlls, predictions = score_rows(lm_head(model, states[scored]), targets)
        sums.nll += nlls.double().sum().item()
        sums.correct += int((predictions == targets).sum())
        sums.tokens += len(targets)
    return sums


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA when there is one.

    Raises:
        UserError: there is none.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"task.device={name!r} cannot be used ({reason}); set task.device=auto or cpu") from error
    return device


def _exp(nats: float) -> float:
    """Return a perplexity; words of a text without spaces would pass the largest float."""
    return math.exp(min(nats, 700.0))


class LanguageScore:
    """Score language models on held-out text.

    Masked models get a pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659: each token hidden in turn), and accuracy
    and cross-entropy with ``masked_share`` of a window hidden at once. Causal models get the perplexity of the text as
    one stream, documents joined by an empty line, per token and per whitespace-separated word.

    Raises:
        UserError: a value is out of range, there is no such device, or a path matches nothing.
    """

    def __init__(
        self,
        *,
        name: str,
        paths: str | Sequence[str] | None,
        column: str,
        dataset: Corpus,
        max_tokens: int | None,
        max_pseudo_tokens: int | None,
        block_size: int | None,
        stride: int | None,
        batch_size: int,
        device: str,
        masked_share: float,
    ) -> None:
        """Check the values; no text is read and no model loaded yet."""
        least = {"max_tokens": 2, "max_pseudo_tokens": 1, "block_size": 2, "stride": 1, "batch_size": 1}
        limits = (max_tokens, max_pseudo_tokens, block_size, stride, batch_size)
        for (key, lowest), value in zip(least.items(), limits, strict=True):
            if value is not None and value < lowest:
                raise UserError(f"task.{key}={value}, but it must be at least {lowest}")
        if not 0 < masked_share < 1:
            raise UserError(f"task.masked_share={masked_share}, but it must be above 0 and below 1 (BERT: 0.15)")
        self.name, self.max_tokens, self.max_pseudo_tokens = name, max_tokens, max_pseudo_tokens
        self.block_size, self.stride, self.batch_size = block_size, stride, batch_size
        self.device, self.masked_share = choose_device(device), masked_share
        self.corpus = dataset
        self.keys = "task.dataset."  # what the corpora call data.corpus
        if paths is not None:
            self.keys = "task."
            with self._own_keys():
                self.corpus = TextFiles(paths=paths if isinstance(paths, str) else list(paths), column=column)

    @contextlib.contextmanager
    def _own_keys(self) -> Iterator[None]:
        """Let errors of a corpus name the keys of this task."""
        try:
            yield
        except UserError as error:
            raise UserError(str(error).replace("data.corpus.", self.keys)) from error

    def measure(self, *, model: str, revision: str, tokenizer: str | None, name: str, seed: int) -> list[Result]:
        """Score one model; ``tokenizer`` is None for the model's own, ``seed`` draws the masks of masked accuracy.

        Raises:
            UserError: model, tokenizer or text cannot be read, or do not fit each other or the settings.
        """
        network, kind = load_language_model(model, revision=revision)
        network.eval().requires_grad_(False).to(self.device)
        words = load_tokenizer(name=tokenizer or model, revision="main" if tokenizer else revision)
        check_vocabulary(network, words, name=model)
        check_split(network)
        tensors = weight_hash(network)  # by which training runs know their teacher
        block_size = self._window(network, name=model)
        start = time.perf_counter()
        scored = (
            self._masked(network, words, block_size=block_size, seed=seed)
            if kind == "mlm"
            else self._causal(network, words, block_size=block_size)
        )
        return [
            Result(
                name=name,
                model=model,
                sha256=weights_id(model, revision=revision),
                model_type=network.config.model_type,
                parameters=num_parameters(network),
                parameters_without_embeddings=num_parameters_without_embeddings(network),
                task=scored.task,
                kind="language_model",
                seed=seed if kind == "mlm" else None,  # a causal model's perplexity draws nothing
                settings={
                    "text": self.corpus.fingerprint(),
                    "max_tokens": self.max_tokens,
                    "block_size": block_size,
                    "vocabulary": len(words),
                    **scored.settings,
                },
                scores=scored.scores,
                score=scored.scores[scored.task],
                higher_is_better=False,
                details={**scored.details, "weights_sha256": tensors},
                cost=cost(
                    seconds=time.perf_counter() - start, tokens=scored.details["tokens"], device=str(self.device)
                ),
            )
        ]

    def _window(self, model: PreTrainedModel, *, name: str) -> int:
        """Return the tokens of a window, or raise a ``UserError`` where it does not fit the model or the stride."""
        positions = max_positions(model)
        size = min(positions, _MAX_BLOCK_SIZE) if self.block_size is None else self.block_size
        check_positions(model, size, key="task.block_size", name=name)
        if self.stride is not None and self.stride > size:
            raise UserError(
                f"task.stride={self.stride} would leave out tokens between windows of {size}; set task.stride={size} or less"
            )
        return size

    def _masked(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, block_size: int, seed: int
    ) -> Scored:
        """Hide each token in turn, then a share of each window at once."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"the tokenizer of a masked {model.config.model_type} has no mask token; give the one it was trained with, "
                "tokenizer=<folder or hub id>"
            )
        with self._own_keys():
            text = read_text(self.corpus, tokenizer, max_tokens=self.max_tokens)
        windows = masked_windows(text, tokenizer, block_size=block_size)
        places = pseudo_places(windows, tokenizer, max_tokens=self.max_pseudo_tokens)
        one = pseudo_batches(windows, places, tokenizer, batch_size=self.batch_size)
        pseudo = score(model, self._show(one, len(places), "one token masked at a time"))
        many = masked_batches(windows, tokenizer, batch_size=self.batch_size, masked_share=self.masked_share, seed=seed)
        masked = score(model, self._show(many, len(windows), f"{self.masked_share:.0%} masked at once"))
        return Scored(
            "pseudo_perplexity",
            {
                "pseudo_perplexity": _exp(pseudo.nll / pseudo.tokens),
                "masked_accuracy": masked.correct / masked.tokens,
                "masked_cross_entropy": masked.nll / masked.tokens,
            },
            {"max_pseudo_tokens": self.max_pseudo_tokens, "masked_share": self.masked_share},
            {**text.counts(), "tokens": pseudo.tokens, "masked_tokens": masked.tokens, "windows": len(windows)},
        )

    def _causal(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, block_size: int) -> Scored:
        """Slide a window over the whole text."""
        with self._own_keys():
            text = read_text(self.corpus, tokenizer, max_tokens=self.max_tokens, separator=PARAGRAPH)
        ids = np.concatenate(text.documents)
        if len(ids) < 2:
            raise UserError(
                "the text to score is one token, which has nothing before it; give a longer one in task.paths"
            )
        stride = block_size // 2 if self.stride is None else self.stride
        begins = window_begins(len(ids), block_size=block_size, stride=stride)
        batches = causal_batches(ids, tokenizer, block_size=block_size, stride=stride, batch_size=self.batch_size)
        sums = score(model, self._show(batches, len(begins), f"windows of {block_size} tokens"))
        return Scored(
            "perplexity",
            {
                "perplexity": _exp(sums.nll / sums.tokens),
                # Per word of what was scored: windows side by side leave out their first tokens.
                "word_perplexity": _exp(sums.nll / sums.tokens * (len(ids) - 1) / text.words),
            },
            {"stride": stride},
            {**text.counts(), "tokens": sums.tokens, "windows": len(begins)},
        )

    def _show(self, batches: Iterable[ScoredBatch], rows: int, description: str) -> Iterable[ScoredBatch]:
        total = -(-rows // self.batch_size)
        return track(batches, description, total=total, console=Console(stderr=True), transient=True)
