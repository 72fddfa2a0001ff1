"""How well a language model predicts held-out text: pseudo-perplexity, masked accuracy, perplexity."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

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
from distilkit.evaluate.job import Job
from distilkit.evaluate.models import described
from distilkit.language_model import (
    check_positions,
    check_split,
    last_hidden_state,
    lm_head,
    load_language_model,
    max_positions,
    weight_hash,
)
from distilkit.losses import IGNORE_INDEX
from distilkit.losses import score as score_rows
from distilkit.records import Result, cost
from distilkit.student import check_vocabulary

_MAX_BLOCK_SIZE = 512  # tokens, as most encoders have


class Text(NamedTuple):
    """The ids of each document without special tokens, and how many whitespace-separated words they spell."""

    documents: list[Ids]
    words: int

    def counts(self) -> dict[str, int]:
        """Return the size of the text."""
        tokens = sum(map(len, self.documents))
        return {"documents": len(self.documents), "text_tokens": tokens, "words": self.words}


Scored = tuple[dict[str, float], dict[str, Any], dict[str, int]]  # scores, the task's own first; settings; counts


class ScoredBatch(NamedTuple):
    """Padded windows, all (batch, length): ids, the token that each state predicts or -100, and what is real."""

    input_ids: Ids
    labels: Ids
    real: NDArray[np.bool_]


class Sums(NamedTuple):
    """Sums over scored tokens: negative log-likelihood in nats, correct predictions, and the tokens themselves."""

    nll: float
    correct: int
    tokens: int


def read_text(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None, separator: str = ""
) -> Text:
    """Tokenize documents until ``max_tokens`` are read, with ``separator`` between them.

    Text that spells a special token is still text.
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
    """Cut each document into windows with the tokenizer's special tokens around them."""
    before, after = special_tokens_around(tokenizer)
    room = block_size - len(before) - len(after)
    if room < 1:
        raise UserError(
            f"task.block_size={block_size} has no room next to the {len(before) + len(after)} special tokens of a "
            f"window; set task.block_size to {block_size - room + 1} or more"
        )
    pieces = (ids[start : start + room] for ids in text.documents for start in range(0, len(ids), room))
    return [np.array([*before, *piece, *after]) for piece in pieces]


def pseudo_places(
    windows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None
) -> list[tuple[int, int]]:
    """List window and place of each token to mask, or ``max_tokens`` at even intervals, from long windows to short
    ones.

    Special tokens, [UNK] among them, are left out.
    """
    special = tokenizer.all_special_ids
    places = [(row, int(place)) for row, ids in enumerate(windows) for place in np.flatnonzero(~np.isin(ids, special))]
    if not places:
        raise UserError("the tokenizer knows no token of the text; check task.paths, or the tokenizer of the model")
    if max_tokens is not None and len(places) > max_tokens:
        places = [places[number * len(places) // max_tokens] for number in range(max_tokens)]
    return sorted(places, key=lambda place: -len(windows[place[0]]))


def pseudo_batches(
    windows: Sequence[Ids], places: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> Iterator[ScoredBatch]:
    """Mask one token of a window at a time (Salazar et al. 2020, section 2)."""
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
    """Mask a share of each window at once, drawn from the seed and the window's number, always by the mask token."""
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
    """Slide a window over one stream of tokens, as in transformers' guide to the perplexity of fixed-length models.

    The first window predicts all its tokens except the first, later ones their last ``stride``. A window never predicts
    its own first token, so ``stride == block_size`` leaves out one token of each window.
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
    """Sum the scores of the labelled tokens; logits are computed for their states only."""
    nll, correct, tokens = 0.0, 0, 0
    for batch in batches:
        input_ids, labels, real = (torch.from_numpy(part).to(model.device) for part in batch)
        states = last_hidden_state(model, input_ids, attention_mask=None if batch.real.all() else real.long())
        scored = labels != IGNORE_INDEX
        targets = labels[scored]
        nlls, predictions = score_rows(lm_head(model, states[scored]), targets)
        nll += nlls.double().sum().item()
        correct += int((predictions == targets).sum())
        tokens += len(targets)
    return Sums(nll, correct, tokens)


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA if available."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"task.device={name!r} cannot be used ({reason}); set task.device=auto or cpu") from error
    return device


def _exp(nats: float) -> float:
    """Return a perplexity; a text without spaces has words whose perplexity exceeds the largest float."""
    return math.exp(min(nats, 700.0))


@dataclass(kw_only=True)
class LanguageScore:
    """Score language models on held-out text.

    Masked models get a pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659: each token masked in turn), and
    accuracy and cross-entropy with ``masked_share`` of a window masked at once. Causal models get the perplexity of the
    text as one stream, documents joined by an empty line, per token and per whitespace-separated word.
    """

    trains: ClassVar[bool] = False
    name: str
    paths: str | Sequence[str] | None
    column: str
    dataset: Corpus
    max_tokens: int | None
    max_pseudo_tokens: int | None
    block_size: int | None
    stride: int | None
    batch_size: int
    device: str
    masked_share: float

    def __post_init__(self) -> None:
        """Check the values; no text is read and no model is loaded yet."""
        least = {"max_tokens": 2, "max_pseudo_tokens": 1, "block_size": 2, "stride": 1, "batch_size": 1}
        for key, lowest in least.items():
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise UserError(f"task.{key}={value}, but it must be at least {lowest}")
        if not 0 < self.masked_share < 1:
            raise UserError(f"task.masked_share={self.masked_share}, but it must be above 0 and below 1 (BERT: 0.15)")
        self.place, self.corpus = choose_device(self.device), self.dataset
        if self.paths is not None:
            paths = self.paths if isinstance(self.paths, str) else list(self.paths)
            with self._own_keys():
                self.corpus = TextFiles(paths=paths, column=self.column)

    @contextlib.contextmanager
    def _own_keys(self) -> Iterator[None]:
        """Let the errors of a corpus name the keys of this task."""
        try:
            yield
        except UserError as error:
            keys = "task.dataset." if self.paths is None else "task."
            raise UserError(str(error).replace("data.corpus.", keys)) from error

    def check_data(self) -> None:
        """Read the first document."""
        with self._own_keys():
            next(self.corpus.documents(), None)

    def measure(self, job: Job) -> list[Result]:
        """Score one model; the seed draws the masks of masked accuracy."""
        model, kind = load_language_model(job.model, revision=job.revision)
        model.eval().requires_grad_(False).to(self.place)
        tokenizer = load_tokenizer(name=job.tokenizer or job.model, revision="main" if job.tokenizer else job.revision)
        check_vocabulary(model, tokenizer, name=job.model)
        check_split(model)
        tensors = weight_hash(model)  # the id of a teacher in training runs
        block_size = self._window(model, name=job.model)
        start = time.perf_counter()
        if kind == "mlm":
            scores, own, counts = self._masked(model, tokenizer, block_size=block_size, seed=job.seed)
        else:
            scores, own, counts = self._causal(model, tokenizer, block_size=block_size)
        task = next(iter(scores))
        seconds = time.perf_counter() - start
        settings = {"text": self.corpus.fingerprint(), "max_tokens": self.max_tokens, "block_size": block_size}
        return [
            Result(
                name=job.name,
                model=job.model,
                sha256=job.sha256,
                **described(model),
                task=task,
                kind="language_model",
                seed=job.seed if kind == "mlm" else None,  # the perplexity of a causal model draws nothing
                settings={**settings, "vocabulary": len(tokenizer), **own},
                scores=scores,
                score=scores[task],
                higher_is_better=False,
                details={**counts, "weights_sha256": tensors},
                cost=cost(seconds=seconds, tokens=counts["tokens"], device=str(self.place)),
            )
        ]

    def _window(self, model: PreTrainedModel, *, name: str) -> int:
        """Return the tokens of a window, which must fit the model and the stride."""
        size = min(max_positions(model), _MAX_BLOCK_SIZE) if self.block_size is None else self.block_size
        check_positions(model, size, key="task.block_size", name=name)
        if self.stride is not None and self.stride > size:
            raise UserError(
                f"task.stride={self.stride} would skip tokens between windows of {size}; set task.stride={size} or less"
            )
        return size

    def _masked(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, block_size: int, seed: int
    ) -> Scored:
        """Mask each token in turn, then a share of each window at once; return scores, settings and counts."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"the tokenizer of a masked {model.config.model_type} has no mask token; give the model's own, "
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
        scores = {
            "pseudo_perplexity": _exp(pseudo.nll / pseudo.tokens),
            "masked_accuracy": masked.correct / masked.tokens,
            "masked_cross_entropy": masked.nll / masked.tokens,
        }
        settings = {"max_pseudo_tokens": self.max_pseudo_tokens, "masked_share": self.masked_share}
        counts = {"tokens": pseudo.tokens, "masked_tokens": masked.tokens, "windows": len(windows)}
        return scores, settings, {**text.counts(), **counts}

    def _causal(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, block_size: int) -> Scored:
        """Slide a window over the whole text; return scores, settings and counts."""
        with self._own_keys():
            text = read_text(self.corpus, tokenizer, max_tokens=self.max_tokens, separator="\n\n")
        ids = np.concatenate(text.documents)
        if len(ids) < 2:
            raise UserError(
                "the text to score is one token, but the first token is never predicted; give a longer text in "
                "task.paths"
            )
        stride = block_size // 2 if self.stride is None else self.stride
        begins = window_begins(len(ids), block_size=block_size, stride=stride)
        batches = causal_batches(ids, tokenizer, block_size=block_size, stride=stride, batch_size=self.batch_size)
        sums = score(model, self._show(batches, len(begins), f"windows of {block_size} tokens"))
        mean = sums.nll / sums.tokens
        # Per word of the scored text: adjacent windows leave out their first tokens.
        scores = {"perplexity": _exp(mean), "word_perplexity": _exp(mean * (len(ids) - 1) / text.words)}
        counts = {"tokens": sums.tokens, "windows": len(begins)}
        return scores, {"stride": stride}, {**text.counts(), **counts}

    def _show(self, batches: Iterable[ScoredBatch], rows: int, description: str) -> Iterable[ScoredBatch]:
        total = -(-rows // self.batch_size)
        return track(batches, description, total=total, console=Console(stderr=True), transient=True)
