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
from distilkit.evaluate.rows import rows_hash
from distilkit.language_model import (
    LM,
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
from distilkit.metrics import measure
from distilkit.records import Result, Rows, cost, write_rows
from distilkit.student import check_vocabulary

_MAX_BLOCK_SIZE = 512  # tokens, as most encoders have


class Text(NamedTuple):
    """The ids of each document without special tokens, its whitespace-separated words, and its place in the corpus."""

    documents: list[Ids]
    words: list[int]
    places: list[int]

    def counts(self) -> dict[str, int]:
        """Return the size of the text."""
        tokens = sum(map(len, self.documents))
        return {"documents": len(self.documents), "text_tokens": tokens, "words": max(1, sum(self.words))}


Scored = tuple[Rows, dict[str, Any], dict[str, int]]  # one a document; settings; counts
_METRICS = {  # the first is the score
    "mlm": ("pseudo_perplexity", "masked_accuracy", "masked_cross_entropy"),
    "clm": ("perplexity", "word_perplexity"),
}


class ScoredBatch(NamedTuple):
    """Padded windows, all (batch, length): ids, the token that each state predicts or -100, what is real, documents."""

    input_ids: Ids
    labels: Ids
    real: NDArray[np.bool_]
    documents: Ids


class Sums(NamedTuple):
    """Sums over the scored tokens of each document: negative log-likelihood in nats, correct predictions, tokens."""

    nll: NDArray[np.float64]
    correct: NDArray[np.float64]
    tokens: NDArray[np.float64]


def read_text(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None, separator: str = ""
) -> Text:
    """Tokenize documents until ``max_tokens`` are read, with ``separator`` between them.

    Text that spells a special token is still text.
    """
    documents: list[Ids] = []
    words: list[int] = []
    places: list[int] = []
    left = max_tokens
    for place, document in enumerate(corpus.documents()):
        text = separator + document if documents else document
        encoding = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(encoding["input_ids"][:left], dtype=np.int64)
        if len(ids):
            documents.append(ids)
            words.append(len(text[: encoding["offset_mapping"][len(ids) - 1][1]].split()))
            places.append(place)
        left = None if left is None else left - len(ids)
        if left == 0:
            break
    if not documents:
        raise UserError("the text to score is empty; check task.paths, or the split of task.dataset")
    return Text(documents, words, places)


Window = tuple[int, Ids]  # the number of its document, and its ids


def masked_windows(text: Text, tokenizer: PreTrainedTokenizerBase, *, block_size: int) -> list[Window]:
    """Cut each document into windows with the tokenizer's special tokens around them."""
    before, after = special_tokens_around(tokenizer)
    room = block_size - len(before) - len(after)
    if room < 1:
        raise UserError(
            f"task.block_size={block_size} has no room next to the {len(before) + len(after)} special tokens of a "
            f"window; set task.block_size to {block_size - room + 1} or more"
        )
    return [
        (number, np.array([*before, *ids[start : start + room], *after]))
        for number, ids in enumerate(text.documents)
        for start in range(0, len(ids), room)
    ]


def pseudo_places(
    windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None
) -> list[tuple[int, int]]:
    """List window and place of each token to mask, or ``max_tokens`` at even intervals, from long windows to short
    ones.

    Special tokens, [UNK] among them, are left out.
    """
    special = tokenizer.all_special_ids
    known = [np.flatnonzero(~np.isin(ids, special)) for _, ids in windows]
    places = [(row, int(place)) for row, own in enumerate(known) for place in own]
    if not places:
        raise UserError("the tokenizer knows no token of the text; check task.paths, or the tokenizer of the model")
    if max_tokens is not None and len(places) > max_tokens:
        places = [places[number * len(places) // max_tokens] for number in range(max_tokens)]
    return sorted(places, key=lambda place: -len(windows[place[0]][1]))


def pseudo_batches(
    windows: Sequence[Window], places: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> Iterator[ScoredBatch]:
    """Mask one token of a window at a time (Salazar et al. 2020, section 2)."""
    for start in range(0, len(places), batch_size):
        chosen = places[start : start + batch_size]
        batch = padded([windows[row][1] for row, _ in chosen], tokenizer)
        batch.documents[:] = np.array([windows[row][0] for row, _ in chosen])[:, None]
        index = (np.arange(len(chosen)), np.array([place for _, place in chosen]))
        batch.labels[index] = batch.input_ids[index]
        batch.input_ids[index] = cast(int, tokenizer.mask_token_id)
        yield batch


def masked_batches(
    windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase, *, batch_size: int, masked_share: float, seed: int
) -> Iterator[ScoredBatch]:
    """Mask a share of each window at once, drawn from the seed and the window's number, always by the mask token."""
    masking = Masking(mlm_probability=masked_share, mask_share=1.0, random_share=0.0, smoothing=0.0, whole_word=False)
    masker = Masker(masking, tokenizer=tokenizer, token_counts=np.zeros(0, dtype=np.int64), seed=seed)
    order = np.argsort([-len(ids) for _, ids in windows], kind="stable")
    for start in range(0, len(order), batch_size):
        samples = order[start : start + batch_size]
        batch = padded([windows[sample][1] for sample in samples], tokenizer)
        batch.documents[:] = np.array([windows[sample][0] for sample in samples])[:, None]
        lengths = batch.real.sum(axis=1)
        masked = masker(batch.input_ids, epoch=VALIDATION_EPOCH, samples=samples, lengths=lengths)
        yield ScoredBatch(*masked, batch.real, batch.documents)


def window_begins(num_tokens: int, *, block_size: int, stride: int) -> range:
    """Return where the windows begin; the last one reaches the end of the text."""
    return range(0, max(1, num_tokens - block_size + stride), stride)


def causal_batches(
    documents: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, *, block_size: int, stride: int, batch_size: int
) -> Iterator[ScoredBatch]:
    """Slide a window over documents as one stream of tokens, as in transformers' guide to the perplexity of fixed-length models.

    The first window predicts all its tokens except the first, later ones their last ``stride``. A window never predicts
    its own first token, so ``stride == block_size`` leaves out one token of each window.
    """
    ids, numbers = np.concatenate(documents), np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
    all_begins = window_begins(len(ids), block_size=block_size, stride=stride)
    for start in range(0, len(all_begins), batch_size):
        begins = all_begins[start : start + batch_size]
        batch = padded([ids[begin : begin + block_size] for begin in begins], tokenizer)
        for row, begin in enumerate(begins):
            end = min(begin + block_size, len(ids))
            scored = max(begin + 1, begin + block_size - stride if begin else 0)
            batch.labels[row, scored - begin - 1 : end - begin - 1] = ids[scored:end]
            batch.documents[row, scored - begin - 1 : end - begin - 1] = numbers[scored:end]
        yield batch


def padded(rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase) -> ScoredBatch:
    """Pad windows to the longest; no label is set yet."""
    real = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    input_ids = np.full(real.shape, tokenizer.pad_token_id or 0, dtype=np.int64)
    input_ids[real] = np.concatenate(rows)
    return ScoredBatch(input_ids, np.full(real.shape, IGNORE_INDEX, dtype=np.int64), real, np.zeros_like(input_ids))


@torch.inference_mode()
def score(model: PreTrainedModel, batches: Iterable[ScoredBatch], *, num_documents: int) -> Sums:
    """Sum the scores of the labelled tokens by document; logits are computed for their states only."""
    sums = Sums(*np.zeros((3, num_documents)))
    for batch in batches:
        input_ids, labels, real = (torch.from_numpy(part).to(model.device) for part in batch[:3])
        states = last_hidden_state(model, input_ids, attention_mask=None if batch.real.all() else real.long())
        scored = labels != IGNORE_INDEX
        targets = labels[scored]
        nlls, predictions = score_rows(lm_head(model, states[scored]), targets)
        numbers = batch.documents[batch.labels != IGNORE_INDEX]
        for part, values in zip(sums, (nlls, predictions == targets, torch.ones_like(targets)), strict=True):
            part += np.bincount(numbers, values.double().cpu().numpy(), minlength=num_documents)
    return sums


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA if available."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"task.device={name!r} cannot be used ({reason}); set task.device=auto or cpu") from error
    return device


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

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read the text, and return its hash; a document has at least as many tokens as words."""
        left = math.inf if self.max_tokens is None else self.max_tokens
        documents = []
        with self._own_keys():
            for document in self.corpus.documents():
                documents.append(rows_hash([document]))
                left -= len(document.split())
                if left <= 0:
                    break
        return {"scored_data": rows_hash(documents)}

    def measure(self, job: Job) -> list[Result]:
        """Score one model; the seed draws the masks of masked accuracy."""
        model, kind, _ = load_language_model(job.model, revision=job.revision)
        tokenizer = load_tokenizer(name=job.tokenizer or job.model, revision="main" if job.tokenizer else job.revision)
        return [self.result(job, model, tokenizer, kind=kind)]

    def result(self, job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, kind: LM) -> Result:
        """Score a loaded model, which is a job's or was fine-tuned from it."""
        model.eval().requires_grad_(False).to(self.place)
        check_vocabulary(model, tokenizer, name=job.model)
        check_split(model)
        tensors = weight_hash(model)  # the id of a teacher in training runs
        block_size = self._window(model, name=job.model)
        start = time.perf_counter()
        if kind == "mlm":
            rows, own, counts = self._masked(model, tokenizer, block_size=block_size, seed=job.seed)
        else:
            rows, own, counts = self._causal(model, tokenizer, block_size=block_size)
        write_rows(job.folder, "text", rows)
        scores = measure(_METRICS[kind], rows)
        task = next(iter(scores))
        seconds = time.perf_counter() - start
        settings = {"max_tokens": self.max_tokens, "block_size": block_size}
        return Result(
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
            details={**counts, "rows": {"text": len(rows)}, "weights_sha256": tensors},
            cost=cost(seconds=seconds, tokens=counts["tokens"], device=str(self.place)),
        )

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
        """Mask each token in turn, then a share of each window at once; return rows, settings and counts."""
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
        number = {"num_documents": len(text.documents)}
        pseudo = score(model, self._show(one, len(places), "one token masked at a time"), **number)
        many = masked_batches(windows, tokenizer, batch_size=self.batch_size, masked_share=self.masked_share, seed=seed)
        masked = score(model, self._show(many, len(windows), f"{self.masked_share:.0%} masked at once"), **number)
        sums = pseudo._asdict() | {f"masked_{name}": part for name, part in masked._asdict().items()}
        settings = {"max_pseudo_tokens": self.max_pseudo_tokens, "masked_share": self.masked_share}
        counts = {
            "tokens": int(pseudo.tokens.sum()),
            "masked_tokens": int(masked.tokens.sum()),
            "windows": len(windows),
        }
        return Rows(ids=np.array(text.places), sums=sums), settings, {**text.counts(), **counts}

    def _causal(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, block_size: int) -> Scored:
        """Slide a window over the whole text; return rows, settings and counts."""
        with self._own_keys():
            text = read_text(self.corpus, tokenizer, max_tokens=self.max_tokens, separator="\n\n")
        lengths = np.array([len(ids) for ids in text.documents], dtype=np.float64)
        num_tokens = int(lengths.sum())
        if num_tokens < 2:
            raise UserError(
                "the text to score is one token, but the first token is never predicted; give a longer text in "
                "task.paths"
            )
        stride = block_size // 2 if self.stride is None else self.stride
        begins = window_begins(num_tokens, block_size=block_size, stride=stride)
        windows: Any = {"block_size": block_size, "stride": stride, "batch_size": self.batch_size}
        batches = self._show(
            causal_batches(text.documents, tokenizer, **windows), len(begins), f"windows of {block_size} tokens"
        )
        sums = score(model, batches, num_documents=len(lengths))
        lengths[0] -= 1  # the first token is never predicted
        parts = {**sums._asdict(), "text_tokens": lengths, "words": np.array(text.words, dtype=np.float64)}
        counts = {"tokens": int(sums.tokens.sum()), "windows": len(begins)}
        return Rows(ids=np.array(text.places), sums=parts), {"stride": stride}, {**text.counts(), **counts}

    def _show(self, batches: Iterable[ScoredBatch], rows: int, description: str) -> Iterable[ScoredBatch]:
        total = -(-rows // self.batch_size)
        return track(batches, description, total=total, console=Console(stderr=True), transient=True)
