"""SQuAD 1.1 as a task to fine-tune on: where in a paragraph an answer starts and ends (arXiv 1606.05250)."""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.data.corpus import has_surrogate
from distilkit.data.table_files import open_text
from distilkit.errors import UserError
from distilkit.evaluate.fit import finetune_and_score
from distilkit.evaluate.job import Job
from distilkit.evaluate.rows import FileSplit, HubSplit, rows_hashes, some_of
from distilkit.losses import soft_target_kl
from distilkit.records import Result, Rows

Offsets = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, the paragraph that answers it, and the annotated answers: (text, first character)."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


class Answer(NamedTuple):
    """Characters ``start`` to ``end`` of a context, and the sum of their start and end logits."""

    text: str
    start: int
    end: int
    score: float


@dataclass(kw_only=True)
class QuestionTask:
    """Read, encode and score questions on paragraphs.

    A paragraph longer than ``max_length`` tokens is cut into windows that share ``doc_stride`` tokens. The answer to a
    question is the best of ``n_best`` spans from each of its windows, each of at most ``max_answer_length`` tokens.
    """

    trains: ClassVar[bool] = True
    auto_class: ClassVar[Any] = AutoModelForQuestionAnswering
    metrics: ClassVar[Sequence[str]] = ("exact_match", "f1")
    head: ClassVar[dict[str, Any]] = {"num_labels": 2}  # one score for the start and one for the end

    name: str
    max_length: int
    doc_stride: int
    n_best: int
    max_answer_length: int
    max_train_rows: int | None
    max_scored_rows: int | None
    data_dir: str | None
    hub: Mapping[str, str]
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        """Check the arguments; nothing is read yet."""
        for key in ("max_length", "n_best", "max_answer_length", "max_train_rows", "max_scored_rows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"task.{key}={value}, but it must be at least 1")

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read the splits, and return the hash of their questions, paragraphs and answers."""
        return rows_hashes(self, astuple, train=train)

    def measure(self, job: Job) -> list[Result]:
        """Fine-tune a model and score it."""
        return finetune_and_score(self, job)

    def train_examples(self) -> list[Question]:
        """Read the training split."""
        return self._questions("train", self.max_train_rows)

    def scored_examples(self) -> dict[str, list[Question]]:
        """Read the split that is scored."""
        return {"dev": self._questions("scored", self.max_scored_rows)}

    def unlabelled_examples(self) -> dict[str, list[Question]]:
        """Return nothing: no leaderboard takes files of this task."""
        return {}

    def _questions(self, split: str, limit: int | None) -> list[Question]:
        if self.data_dir is None:
            hub = HubSplit(path=self.hub["path"], split=self.hub[split])
            columns = ("id", "question", "context", "answers")
            questions = [question_of(row or {}, place=place) for place, row in hub.rows(columns=columns)]
        else:
            folder = Path(self.data_dir).expanduser()
            questions = read_questions(FileSplit(folder=folder, file=self.files[split]).path())
        return some_of(questions, limit)

    def check_head(self, model: PreTrainedModel, *, name: str) -> None:
        """Make sure that a model has the two outputs of this task."""
        if model.config.num_labels != 2:
            raise UserError(
                f"{name!r} has {model.config.num_labels} outputs a token, but task {self.name} has 2; fine-tune it on "
                "this task first"
            )

    def encode(self, examples: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Turn questions into windows."""
        return encode_questions(examples, tokenizer, max_length=self.max_length, doc_stride=self.doc_stride)

    def logits(self, outputs: Any, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of starts and of ends, each (windows, length), without mass on padding."""
        return tuple(
            logits.float().masked_fill(attention_mask == 0, -1e9)  # finite at any temperature
            for logits in (outputs.start_logits, outputs.end_logits)
        )

    def hard_loss(self, logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of start and end, in nats; ``targets`` is (windows, 2)."""
        start, end = (F.cross_entropy(each, target) for each, target in zip(logits, targets.unbind(dim=1), strict=True))
        return (start + end) / 2

    def soft_loss(
        self, logits: tuple[Tensor, ...], teacher_logits: tuple[Tensor, ...], *, temperature: float
    ) -> Tensor:
        """Return the mean KL over positions from the teacher's starts and ends, times temperature squared."""
        start, end = (
            soft_target_kl(student, teacher, temperature=temperature).mean()
            for student, teacher in zip(logits, teacher_logits, strict=True)
        )
        return (start + end) / 2

    def _answers(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Question]
    ) -> list[list[Answer]]:
        return n_best_answers(examples, features, logits, n_best=self.n_best, max_answer_length=self.max_answer_length)

    def rows(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Question]
    ) -> Rows:
        """Return exact match and F1 of each question by its id, as fractions."""
        ids = np.array([question.id for question in examples])
        return Rows(ids=ids, sums=squad_scores(examples, self._answers(logits, features, examples)))

    def predictions(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Question]
    ) -> dict[str, str]:
        """Return the best answer to each question by its id, as the official script reads it."""
        answers = self._answers(logits, features, examples)
        return {question.id: best_text(given) for question, given in zip(examples, answers, strict=True)}


def read_questions(file: Path) -> list[Question]:
    """Read train-v1.1.json or dev-v1.1.json, plain or compressed."""
    try:
        with open_text(file) as stream:
            content = json.load(stream)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # the latter, and numbers of thousands of digits: Python's limits
        raise UserError(f"{file} is not JSON: {error}; give the official train-v1.1.json or dev-v1.1.json") from error
    questions = []
    for article, at_article in _parts(content, "data", place=str(file), joint=": "):
        for paragraph, at_paragraph in _parts(article, "paragraphs", place=at_article):
            context = _part(paragraph, "context", str, place=at_paragraph)
            for entry, place in _parts(paragraph, "qas", place=at_paragraph):
                given = list(_parts(entry, "answers", place=place))
                answers = {key: [_part(each, key, kind, place=at) for each, at in given] for key, kind in _ANSWER}
                questions.append(question_of({**entry, "context": context, "answers": answers}, place=place))
    if not questions:
        raise UserError(f"{file} holds no question; give the official train-v1.1.json or dev-v1.1.json")
    return questions


_ANSWER = (("text", str), ("answer_start", int))
_JSON_NAMES = {list: "list", str: "text", int: "number", dict: "object"}


def _part(node: Any, key: str, kind: type, *, place: str) -> Any:
    if not isinstance(node, Mapping) or not isinstance(node.get(key), kind):
        raise UserError(
            f"{place} has no {key!r} ({_JSON_NAMES[kind]}); SQuAD 1.1's layout is data[].paragraphs[].context and "
            ".qas[] with id, question and answers[].text and .answer_start"
        )
    return node[key]


def _parts(node: Any, key: str, *, place: str, joint: str = ".") -> Iterator[tuple[Any, str]]:
    """Yield the entries of a list, each with its place in the file."""
    for index, entry in enumerate(_part(node, key, list, place=place)):
        yield entry, f"{place}{joint}{key}[{index}]"


def question_of(row: Mapping[str, Any], *, place: str) -> Question:
    """Check a row as in rajpurkar/squad, whose ``answers`` are columns ``text`` and ``answer_start``."""
    key, question, context = (_part(row, name, str, place=place) for name in ("id", "question", "context"))
    columns = _part(row, "answers", dict, place=place)
    answers = tuple(zip(*(_part(columns, name, list, place=f"{place}.answers") for name, _ in _ANSWER), strict=True))
    if not answers:
        raise UserError(
            f"{place} has no answer, but SQuAD 1.1 has one for every question; files of SQuAD 2.0 are not supported"
        )
    if has_surrogate(context) or has_surrogate(question):
        raise UserError(f"{place}: unpaired surrogate; fix or drop that question")
    for text, start in answers:
        if start < 0 or not text or not context.startswith(text, start):
            raise UserError(
                f"{place}: answer {text!r} is not at character {start} of its context; fix answer_start, which counts "
                "characters from 0"
            )
    return Question(id=key, question=question, context=context, answers=answers)


_AT_ONCE = 1000  # questions; as Python lists, the offsets of all of SQuAD take gigabytes


def encode_questions(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, max_length: int, doc_stride: int
) -> list[dict[str, Any]]:
    """Turn each question into windows of question and context that share ``doc_stride`` tokens of the context.

    A window holds the tokenizer's output and three entries. ``question`` is the number of its question. ``offsets``
    (length, 2) are the characters of each token of the context, and -1 elsewhere. ``target`` is the first and the last
    token of the first answer, or (0, 0), which is [CLS], if the window does not hold all of it.
    """
    if not questions:
        return []
    asked = [question.question.lstrip() for question in questions]  # some start with many blanks
    _check_room(questions, asked, tokenizer, max_length=max_length, doc_stride=doc_stride)
    windows = []
    for begin in range(0, len(questions), _AT_ONCE):
        some = slice(begin, begin + _AT_ONCE)
        encoded = tokenizer(
            asked[some],
            [question.context for question in questions[some]],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=True,
            return_token_type_ids=True,  # a student may have none, and its teacher may need them
            split_special_tokens=True,
        )
        numbers, mapping = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        for row, number in enumerate(numbers):
            in_context = np.array([part == 1 for part in encoded.sequence_ids(row)])
            offsets = np.where(in_context[:, None], np.array(mapping[row], dtype=np.int32), np.int32(-1))
            text, start = questions[begin + number].answers[0]
            window: dict[str, Any] = {name: np.array(values[row], dtype=np.int32) for name, values in encoded.items()}
            window |= {"question": begin + number, "offsets": offsets}
            windows.append(window | {"target": find_span(offsets, start, start + len(text))})
    return windows


def _check_room(
    questions: Sequence[Question],
    asked: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    doc_stride: int,
) -> None:
    """Refuse lengths at which the tokenizer would panic."""
    if doc_stride < 0:
        raise UserError(f"task.doc_stride={doc_stride}, but it must be at least 0 tokens")
    encoded = tokenizer(asked, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    longest = int(np.argmax(lengths))
    room = max_length - lengths[longest] - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= doc_stride:
        raise UserError(
            f"task.max_length={max_length} leaves {max(room, 0)} tokens for the context of question "
            f"{questions[longest].id!r}, which has {lengths[longest]} tokens, but windows share "
            f"task.doc_stride={doc_stride}; set task.max_length to {max_length - room + doc_stride + 1} or more, or a "
            "smaller task.doc_stride"
        )


def find_span(offsets: Offsets, start: int, end: int) -> tuple[int, int]:
    """Return the first and the last token that characters ``start`` to ``end`` touch; (0, 0) if some lie outside."""
    tokens = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(tokens) or offsets[tokens[0], 0] > start or offsets[tokens[-1], 1] < end:
        return 0, 0
    first = np.searchsorted(offsets[tokens, 1], start, side="right")
    last = np.searchsorted(offsets[tokens, 0], end, side="left") - 1
    return (int(tokens[first]), int(tokens[last])) if first <= last else (0, 0)


def best_spans(
    start_logits: NDArray[np.float64],
    end_logits: NDArray[np.float64],
    offsets: Offsets,
    *,
    n_best: int,
    max_answer_length: int,
) -> list[tuple[float, int, int]]:
    """List the spans of one window with the highest sums, best first: score, first token, last token.

    All spans of at most ``max_answer_length`` tokens of the context are searched. Logits may be longer than the window.
    """
    tokens = np.flatnonzero(offsets[:, 0] >= 0)  # contiguous
    if not len(tokens):
        return []
    ends = np.append(end_logits[tokens], np.full(max_answer_length - 1, -np.inf))
    sums = start_logits[tokens, None] + sliding_window_view(ends, max_answer_length)  # (first token, tokens after it)
    flat = sums.reshape(-1)
    count = min(n_best, len(flat))
    chosen = np.argpartition(-flat, count - 1)[:count]
    chosen = chosen[np.lexsort((chosen, -flat[chosen]))]  # the earliest of equals
    first, more = np.divmod(chosen[np.isfinite(flat[chosen])], max_answer_length)
    return list(zip(sums[first, more].tolist(), tokens[first].tolist(), tokens[first + more].tolist(), strict=True))


def n_best_answers(
    questions: Sequence[Question],
    windows: Sequence[Mapping[str, Any]],
    logits: Iterable[Sequence[ArrayLike]],
    *,
    n_best: int,
    max_answer_length: int,
) -> list[list[Answer]]:
    """Return the ``n_best`` answers to each question over all its windows, best first and each span once.

    ``logits`` holds those of the start and of the end for each window, (length,) or longer by padding. If there is no
    span, the only answer is empty.
    """
    found: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    for window, pair in zip(windows, logits, strict=True):
        offsets = window["offsets"]
        start, end = (np.asarray(part, dtype=np.float64) for part in pair)
        spans = found[window["question"]]
        for score, first, last in best_spans(start, end, offsets, n_best=n_best, max_answer_length=max_answer_length):
            characters = int(offsets[first, 0]), int(offsets[last, 1])
            spans[characters] = max(score, spans.get(characters, -np.inf))
    answers = []
    for question, spans in zip(questions, found, strict=True):
        ranked = sorted(spans.items(), key=lambda item: -item[1])[:n_best]
        given = [Answer(question.context[start:end].strip(), start, end, score) for (start, end), score in ranked]
        answers.append(given or [Answer("", 0, 0, 0.0)])
    return answers


def best_text(answers: Sequence[Answer]) -> str:
    """Return the best answer that has a text, if there is one."""
    return next((answer.text for answer in answers if answer.text), "")


def squad_scores(questions: Sequence[Question], answers: Sequence[Sequence[Answer]]) -> dict[str, NDArray[np.float64]]:
    """Score each best answer by exact match and F1, as fractions, with the formulas of evaluate-v1.1.py."""
    exact, f1 = [], []
    for question, given in zip(questions, answers, strict=True):
        said, golds = _words(best_text(given)), [_words(text) for text, _ in question.answers]
        exact.append(said in golds)
        f1.append(max(_f1(said, gold) for gold in golds))
    return {"exact_match": np.array(exact, dtype=np.float64), "f1": np.array(f1, dtype=np.float64)}


def _words(text: str) -> list[str]:
    """Lower the case, drop punctuation and then articles, and split at white space."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(said: list[str], gold: list[str]) -> float:
    """Return the F1 of two bags of words; 0 if they share none, also if both are empty."""
    shared = (Counter(said) & Counter(gold)).total()
    return 2 * shared / (len(said) + len(gold)) if shared else 0.0
