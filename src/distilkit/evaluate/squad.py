"""SQuAD 1.1 as a task to fine-tune on: where in a paragraph an answer starts and ends (arXiv 1606.05250)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.evaluate.rows import FileSplit, HubSplit
from distilkit.evaluate.squad_answers import (
    Answer,
    Question,
    encode_questions,
    n_best_answers,
    predictions,
    questions_of_rows,
    read_questions,
    squad_scores,
)
from distilkit.losses import soft_target_kl

_COLUMNS = ("id", "question", "context", "answers")


class QuestionTask:
    """Read, encode and score questions on paragraphs.

    A paragraph that is longer than ``max_length`` tokens becomes several windows, which share ``doc_stride`` tokens; the
    answer to a question is the best of ``n_best`` spans of each of its windows, of ``max_answer_length`` tokens at most.

    Raises:
        UserError: an argument is out of range.
    """

    auto_class: ClassVar[Any] = AutoModelForQuestionAnswering
    head: ClassVar[dict[str, Any]] = {"num_labels": 2}  # one score for the start and one for the end

    def __init__(
        self,
        *,
        name: str,
        max_length: int,
        doc_stride: int,
        n_best: int,
        max_answer_length: int,
        max_train_rows: int | None,
        max_scored_rows: int | None,
        data_dir: str | None,
        hub: Mapping[str, str],
        files: Mapping[str, str],
    ) -> None:
        """Check the arguments; nothing is read yet."""
        limits = {"max_length": max_length, "n_best": n_best, "max_answer_length": max_answer_length}
        for key, value in {**limits, "max_train_rows": max_train_rows, "max_scored_rows": max_scored_rows}.items():
            if value is not None and value < 1:
                raise UserError(f"task.{key}={value}, but it must be at least 1")
        self.name, self.max_length, self.doc_stride = name, max_length, doc_stride
        self.n_best, self.max_answer_length = n_best, max_answer_length
        self.max_train_rows, self.max_scored_rows = max_train_rows, max_scored_rows
        self.data_dir, self.hub, self.files = data_dir, hub, files

    def _questions(self, split: str, limit: int | None) -> list[Question]:
        if self.data_dir is None:
            hub = HubSplit(path=self.hub["path"], split=self.hub[split])
            questions = questions_of_rows(row for _, row in hub.rows(columns=_COLUMNS) if row is not None)
        else:
            folder = Path(self.data_dir).expanduser()
            questions = read_questions(FileSplit(folder=folder, file=self.files[split]).path())
        if limit is not None and limit < len(questions):
            order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0))
            questions = [questions[int(index)] for index in order[:limit]]
        return questions

    def train_examples(self) -> list[Question]:
        """Read the training split."""
        return self._questions("train", self.max_train_rows)

    def scored_examples(self) -> dict[str, list[Question]]:
        """Read the split that is scored."""
        return {"dev": self._questions("scored", self.max_scored_rows)}

    def check_head(self, model: PreTrainedModel, *, name: str) -> None:
        """Make sure that a model scores starts and ends, which is all that it can have been trained for.

        Raises:
            UserError: it does not.
        """
        if model.config.num_labels != 2:
            raise UserError(
                f"{name!r} has {model.config.num_labels} outputs a token, but task {self.name} has 2; fine-tune it on this task "
                "first"
            )

    def encode(
        self, examples: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, train: bool
    ) -> list[dict[str, Any]]:
        """Turn questions into windows."""
        return encode_questions(examples, tokenizer, max_length=self.max_length, doc_stride=self.doc_stride)

    def logits(self, outputs: Any, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of starts and of ends, each (rows, length), with no mass on padding."""
        return tuple(
            logits.float().masked_fill(attention_mask == 0, -1e9)  # finite, whatever the temperature
            for logits in (outputs.start_logits, outputs.end_logits)
        )

    def hard_loss(self, logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of start and end, in nats; ``targets`` is (rows, 2)."""
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

    def scores(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Question]
    ) -> dict[str, float]:
        """Score by exact match and F1, as shares."""
        return squad_scores(examples, self._answers(logits, features, examples))

    def predictions(
        self, logits: Sequence[tuple[Tensor, ...]], features: Sequence[Mapping[str, Any]], examples: Sequence[Question]
    ) -> dict[str, str]:
        """Return the answers in the layout that the official script reads."""
        return predictions(examples, self._answers(logits, features, examples))
