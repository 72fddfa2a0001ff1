"""SQuAD 1.1 without a model: its files, questions as windows of tokens, and answers from logits (arXiv 1606.05250)."""

import json
import lzma
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from torchmetrics.functional.text import squad
from transformers import PreTrainedTokenizerBase

from distilkit.data.corpus import has_surrogate
from distilkit.errors import UserError

Offsets = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, the paragraph that answers it, and the answers that people gave: (text, first character)."""

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


NO_ANSWER = Answer("", 0, 0, 0.0)

# ------------------------------------------------------------------------ files


def read_questions(file: Path) -> list[Question]:
    """Read train-v1.1.json or dev-v1.1.json, plain or as .gz, .xz, .bz2.

    Raises:
        UserError: the file cannot be read, lacks a part of the layout, or an answer is not where it is said to be.
    """
    questions = []
    for number, article in enumerate(_part(_read_json(file), "data", list, place=str(file))):
        at_article = f"{file}: data[{number}]"
        for index, paragraph in enumerate(_part(article, "paragraphs", list, place=at_article)):
            at_paragraph = f"{at_article}.paragraphs[{index}]"
            context = _part(paragraph, "context", str, place=at_paragraph)
            for row, entry in enumerate(_part(paragraph, "qas", list, place=at_paragraph)):
                place = f"{at_paragraph}.qas[{row}]"
                given = [
                    tuple(_part(answer, key, kind, place=f"{place}.answers[{count}]") for key, kind in _ANSWER)
                    for count, answer in enumerate(_part(entry, "answers", list, place=place))
                ]
                questions.append(_question(entry, context=context, answers=given, place=place))
    if not questions:
        raise UserError(f"{file} holds no question; give the official train-v1.1.json or dev-v1.1.json")
    return questions


def questions_of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Question]:
    """Take the rows of rajpurkar/squad, whose ``answers`` are columns ``text`` and ``answer_start``.

    Raises:
        UserError: a row lacks a part, or an answer is not where it is said to be.
    """
    questions = []
    for number, row in enumerate(rows):
        place = f"row {number}"
        answers = _part(row, "answers", dict, place=place)
        columns = (_part(answers, key, list, place=f"{place}.answers") for key, _ in _ANSWER)
        given = list(zip(*columns, strict=True))
        context = _part(row, "context", str, place=place)
        questions.append(_question(row, context=context, answers=given, place=place))
    return questions


_ANSWER = (("text", str), ("answer_start", int))
_JSON_NAMES = {list: "list", str: "text", int: "number", dict: "object"}


def _read_json(file: Path) -> Any:
    try:
        with fsspec.open(str(file), "rt", encoding="utf-8-sig", compression="infer") as stream:
            return json.load(stream)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"cannot read {file}: {error}; it may be missing, cut short or not what its name says"
        ) from error
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(f"{file} is not JSON: {error}; give the official train-v1.1.json or dev-v1.1.json") from error


def _part(node: Any, key: str, kind: type, *, place: str) -> Any:
    if not isinstance(node, Mapping) or not isinstance(node.get(key), kind):
        raise UserError(
            f"{place} has no {key!r} ({_JSON_NAMES[kind]}); SQuAD 1.1's layout is data[].paragraphs[].context and .qas[] "
            "with id, question and answers[].text and .answer_start"
        )
    return node[key]


def _question(node: Mapping[str, Any], *, context: str, answers: Sequence[tuple[Any, ...]], place: str) -> Question:
    key, question = (_part(node, name, str, place=place) for name in ("id", "question"))
    if not answers:
        raise UserError(
            f"{place} has no answer, and SQuAD 1.1 has one to every question; 2.0's files are not read here"
        )
    if has_surrogate(context) or has_surrogate(question):
        raise UserError(f"{place}: half of a surrogate pair is no text; mend or drop that question")
    for text, start in answers:
        if start < 0 or not text or not context.startswith(text, start):
            raise UserError(
                f"{place}: answer {text!r} does not stand at character {start} of its context; mend answer_start, which "
                "counts characters from 0"
            )
    return Question(id=key, question=question, context=context, answers=tuple((text, start) for text, start in answers))


# ---------------------------------------------------------------------- windows


_AT_ONCE = 1000  # questions: as Python's lists of pairs, the offsets of all of SQuAD take gigabytes


def encode_questions(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, max_length: int, doc_stride: int
) -> list[dict[str, Any]]:
    """Turn each question into windows of question and context that share ``doc_stride`` tokens of the context.

    A window has what the tokenizer gives, and ``question``, the number of its question; ``offsets`` (length, 2), the
    characters of each token of the context and -1 elsewhere; ``target``, the first and the last token of the first
    answer, or (0, 0), which is [CLS], where the window does not hold all of it.

    Raises:
        UserError: a question leaves too little room for the context.
    """
    if not questions:
        return []
    asked = [question.question.lstrip() for question in questions]  # as the files have some with blanks before them
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
    """Refuse what the tokenizer would panic at."""
    if doc_stride < 0:
        raise UserError(f"task.doc_stride={doc_stride}, but windows cannot share less than 0 tokens")
    encoded = tokenizer(asked, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    longest = int(np.argmax(lengths))
    room = max_length - lengths[longest] - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= doc_stride:
        raise UserError(
            f"task.max_length={max_length} leaves {max(room, 0)} tokens for the context of question "
            f"{questions[longest].id!r}, which has {lengths[longest]} itself, but windows share "
            f"task.doc_stride={doc_stride}; set task.max_length to {max_length - room + doc_stride + 1} or more, or a "
            "smaller task.doc_stride"
        )


def find_span(offsets: Offsets, start: int, end: int) -> tuple[int, int]:
    """Return the first and the last token that characters ``start`` to ``end`` touch; (0, 0) if not all are in here."""
    tokens = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(tokens) or offsets[tokens[0], 0] > start or offsets[tokens[-1], 1] < end:
        return 0, 0
    first = np.searchsorted(offsets[tokens, 1], start, side="right")
    last = np.searchsorted(offsets[tokens, 0], end, side="left") - 1
    return (int(tokens[first]), int(tokens[last])) if first <= last else (0, 0)


# ---------------------------------------------------------------------- answers


def best_spans(
    start_logits: NDArray[np.float64],
    end_logits: NDArray[np.float64],
    offsets: Offsets,
    *,
    n_best: int,
    max_answer_length: int,
) -> list[tuple[float, int, int]]:
    """List the spans of one window of the highest sums, best first: score, first token, last token.

    All spans of at most ``max_answer_length`` tokens of the context are looked at; logits may be longer than the window.
    """
    tokens = np.flatnonzero(offsets[:, 0] >= 0)  # without a gap: the context is one stretch
    if not len(tokens):
        return []
    ends = np.append(end_logits[tokens], np.full(max_answer_length - 1, -np.inf))
    sums = start_logits[tokens, None] + sliding_window_view(ends, max_answer_length)  # (first token, tokens after it)
    flat = sums.reshape(-1)
    count = min(n_best, len(flat))
    chosen = np.argpartition(-flat, count - 1)[:count]
    chosen = chosen[np.lexsort((chosen, -flat[chosen]))]  # among equals, the earliest
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

    ``logits`` holds for each window those of the start and of the end, (length,) or longer by padding. Where there is no
    span at all, the only answer is empty.

    Raises:
        UserError: a limit is below 1.
    """
    for key, value in (("n_best", n_best), ("max_answer_length", max_answer_length)):
        if value < 1:
            raise UserError(f"task.{key}={value}, but it must be at least 1")
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
        answers.append(
            [Answer(question.context[start:end].strip(), start, end, score) for (start, end), score in ranked]
            or [NO_ANSWER]
        )
    return answers


def predictions(questions: Sequence[Question], answers: Sequence[Sequence[Answer]]) -> dict[str, str]:
    """Return the best answer to each question by its id, as the official script reads it.

    A text is empty only where no answer has any.
    """
    return {question.id: best_text(given) for question, given in zip(questions, answers, strict=True)}


def best_text(answers: Sequence[Answer]) -> str:
    """Return the best answer that has a text, if any."""
    return next((answer.text for answer in answers if answer.text), "")


def squad_scores(questions: Sequence[Question], answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Score the best answers by exact match and F1, as shares, with the normalisation of evaluate-v1.1.py."""
    texts = [best_text(given) for given in answers]
    golds = [list(dict.fromkeys(text for text, _ in question.answers)) for question in questions]
    scores = _squad(texts, golds)
    # An answer of articles and punctuation alone shares no word with any other and has an F1 of 0 in the official script,
    # but torchmetrics, like SQuAD 2.0, gives 1 where the right one is such, too (3 questions of the official dev set).
    bare = [
        row
        for row, text in enumerate(texts)
        if set(filter(str.isalnum, text.lower())) <= set("anthe") and _squad([text], [[""]])["exact_match"]
    ]
    if bare:
        scores["f1"] -= (
            _squad([texts[row] for row in bare], [golds[row] for row in bare])["f1"] * len(bare) / len(texts)
        )
    return scores


def _squad(texts: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    said = [{"id": str(row), "prediction_text": text} for row, text in enumerate(texts)]
    right: Any = [
        {"id": str(row), "answers": {"text": list(given), "answer_start": [0] * len(given)}}
        for row, given in enumerate(golds)
    ]
    return {name: float(value) / 100 for name, value in squad(said, right).items()}
