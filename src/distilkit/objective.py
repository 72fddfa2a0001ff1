"""The weighted objective of distillation: which terms count, over which tokens, and what they need."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distilkit import losses
from distilkit.errors import UserError
from distilkit.language_model import Task, last_hidden_state, lm_logits

Batch = dict[str, Any]
"""``input_ids`` and ``labels`` (batch, length); with padding ``attention_mask``; with separation ``document_ids``."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What one forward pass of a model gives: states of all real tokens, logits of the chosen ones.

    ``hidden`` is (tokens, width); ``logits`` is (rows, vocabulary) for the rows that were asked for.
    """

    hidden: Tensor
    logits: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weigh the terms of DistilBERT's loss (arXiv 1910.01108, section 3).

    ``alpha_ce`` weighs the soft-target KL at ``temperature``, ``alpha_mlm`` and ``alpha_clm`` the hard-target
    cross-entropy of a masked and of a causal model, ``alpha_cos`` the cosine between last hidden states, ``alpha_mse``
    the squared difference of logits. ``soft_targets`` takes KL and MSE over ``all`` real tokens or over ``masked``
    ones only; a causal model has no masked tokens and always takes all. A term of weight zero is not computed.

    Raises:
        UserError: a weight is negative, all are zero, the temperature is not positive, or both tasks are weighted.
    """

    alpha_ce: float
    alpha_mlm: float
    alpha_clm: float
    alpha_cos: float
    alpha_mse: float
    temperature: float
    soft_targets: Literal["all", "masked"]

    def __post_init__(self) -> None:
        """Check each value where it is used first."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "soft_targets":
                if value not in ("all", "masked"):
                    raise UserError(f"objective.soft_targets is {value!r}; it takes all or masked")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise UserError(f"objective.{field.name}={value}, but it must be a finite number of at least 0")
        if self.temperature <= 0:
            raise UserError(f"objective.temperature={self.temperature}, but it must be above 0; the paper uses 2")
        if not self.weights:
            raise UserError("all alphas of the objective are 0, so there is nothing to learn; set at least one above 0")
        if self.alpha_mlm and self.alpha_clm:
            raise UserError(
                f"objective.alpha_mlm={self.alpha_mlm} and objective.alpha_clm={self.alpha_clm} are both set, but a model "
                "is masked or causal; set one of them to 0"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The terms that count and their weights, by name: ce, mlm, clm, cos, mse."""
        alphas = {name: getattr(self, f"alpha_{name}") for name in ("ce", "mlm", "clm", "cos", "mse")}
        return {name: alpha for name, alpha in alphas.items() if alpha > 0}

    @property
    def reads_teacher_logits(self) -> bool:
        """Whether a term needs the teacher's language-model head."""
        return self.alpha_ce > 0 or self.alpha_mse > 0

    @property
    def reads_student_logits(self) -> bool:
        """Whether a term needs the student's language-model head."""
        return self.reads_teacher_logits or self.alpha_mlm > 0 or self.alpha_clm > 0

    @property
    def reads_teacher(self) -> bool:
        """Whether a term needs the teacher at all."""
        return self.reads_teacher_logits or self.alpha_cos > 0

    def check_models(self, *, student: PreTrainedModel, teacher: PreTrainedModel | None, task: Task) -> None:
        """Make sure that the terms fit the models, before the first step.

        Raises:
            UserError: a causal weight on a masked model or the reverse, no teacher to read, or widths that differ.
        """
        wrong = "clm" if task == "mlm" else "mlm"
        if wrong in self.weights:
            kind, preset = ("masked", "distilbert or mlm") if task == "mlm" else ("causal", "distilgpt2 or clm")
            raise UserError(
                f"objective.alpha_{wrong}={self.weights[wrong]} on a {kind} language model "
                f"({student.config.model_type}); set objective={preset}"
            )
        if self.reads_teacher and teacher is None:
            needs = [
                f"objective.alpha_{name}={self.weights[name]}" for name in ("ce", "cos", "mse") if name in self.weights
            ]
            raise UserError(f"{', '.join(needs)} need a teacher, but teacher=none; set objective=mlm or objective=clm")
        if self.alpha_cos and teacher is not None and teacher.config.hidden_size != student.config.hidden_size:
            raise UserError(
                f"objective.alpha_cos={self.alpha_cos} compares hidden states, but the student is "
                f"{student.config.hidden_size} wide and the teacher {teacher.config.hidden_size}; set objective.alpha_cos=0"
            )

    def denominators(self, *, num_tokens: Tensor, num_labels: Tensor, task: Task) -> dict[str, Tensor]:
        """Choose for each term the count it is divided by: real tokens, or labelled ones.

        The counts are those of the whole optimizer step, over all micro-batches and ranks.
        """
        tokens, labels = num_tokens.clamp(min=1), num_labels.clamp(min=1)
        soft = labels if self.soft_targets == "masked" and task == "mlm" else tokens
        by_term = {"ce": soft, "mse": soft, "mlm": labels, "clm": labels, "cos": tokens}
        return {name: by_term[name] for name in self.weights}

    def term_sums(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch, *, task: Task
    ) -> dict[str, Tensor]:
        """Compute the sum of each weighted term over the tokens of a batch (nats; squared logits for mse).

        The models see the batch once each. Logits are made for labelled tokens only where no term asks for more.
        """
        real = batch["attention_mask"].bool() if "attention_mask" in batch else None
        labels = batch["labels"].flatten() if real is None else batch["labels"][real]
        all_rows = task == "clm" or (self.reads_teacher_logits and self.soft_targets == "all")
        labelled = None if all_rows else (labels != losses.IGNORE_INDEX).nonzero().squeeze(1)
        row_labels = labels if labelled is None else labels[labelled]

        ours = forward(student, batch, real=real, rows=labelled, with_logits=self.reads_student_logits)
        theirs: Forward | None = None
        if teacher is not None and self.reads_teacher:
            with torch.no_grad():
                theirs = forward(teacher, batch, real=real, rows=labelled, with_logits=self.reads_teacher_logits)

        sums: dict[str, Tensor] = {}
        for name in self.weights:
            match name, ours.logits, theirs:
                case "ce", Tensor() as logits, Forward(logits=Tensor() as targets):
                    sums[name] = losses.soft_target_kl(logits, targets, temperature=self.temperature)
                case "mse", Tensor() as logits, Forward(logits=Tensor() as targets):
                    sums[name] = losses.logit_mse(logits, targets)
                case (("mlm" | "clm"), Tensor() as logits, _):
                    sums[name] = losses.hard_target_cross_entropy(logits, row_labels)
                case "cos", _, Forward(hidden=hidden):
                    sums[name] = losses.hidden_cosine(ours.hidden, hidden)
        assert sums.keys() == self.weights.keys(), "check_models admits no term without its inputs"
        return sums


def forward(
    model: PreTrainedModel, batch: Batch, *, real: Tensor | None, rows: Tensor | None, with_logits: bool = True
) -> Forward:
    """Run a model over a batch and keep its real tokens, with logits of ``rows`` among them (None: of all).

    ``real`` is a boolean (batch, length), None when there is no padding.
    """
    states = last_hidden_state(
        model,
        batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        document_ids=batch.get("document_ids"),
    )
    hidden = states.flatten(0, 1) if real is None else states[real]
    if not with_logits:
        return Forward(hidden=hidden, logits=None)
    return Forward(hidden=hidden, logits=lm_logits(model, hidden if rows is None else hidden[rows]))
