"""The weighted objective of distillation: its terms, their tokens, and what they read of the models."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distilkit import losses
from distilkit.errors import UserError
from distilkit.fused import fused_losses
from distilkit.language_model import LM, Batch, lm_head, token_states

_SOFT = ("ce", "cos", "mse")  # the terms that read the teacher
_CHOICES = {"soft_targets": ("all", "masked"), "implementation": ("fused", "reference")}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weight the terms of DistilBERT's loss (arXiv 1910.01108, section 3).

    ``alpha_ce`` weights the soft-target KL at ``temperature``, ``alpha_cos`` the cosine between last hidden states, and
    ``alpha_mse`` the squared difference of logits. ``alpha_mlm`` and ``alpha_clm`` weight the hard-target cross-entropy
    of a masked and a causal model. KL and MSE take ``all`` real tokens, or the ``masked`` ones only; a causal model
    always takes all. A term of weight zero is not computed. ``implementation`` is ``fused``, which never stores all
    logits, or ``reference``, the plain formulas. A negative or infinite weight raises a ``UserError``.
    """

    alpha_ce: float
    alpha_mlm: float
    alpha_clm: float
    alpha_cos: float
    alpha_mse: float
    temperature: float
    soft_targets: Literal["all", "masked"]
    implementation: Literal["fused", "reference"]

    def __post_init__(self) -> None:
        """Check each value, and that the values fit together."""
        for field in fields(self):
            value, choices = getattr(self, field.name), _CHOICES.get(field.name)
            if choices:
                if value not in choices:
                    raise UserError(f"objective.{field.name} is {value!r}; it takes {' or '.join(choices)}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise UserError(f"objective.{field.name}={value}, but it must be a finite number of at least 0")
        if self.temperature <= 0:
            raise UserError(f"objective.temperature={self.temperature}, but it must be above 0; the paper uses 2")
        if not self.weights:
            raise UserError("all alphas of the objective are 0, so the loss has no term; set at least one above 0")
        if self.alpha_mlm and self.alpha_clm:
            found = f"objective.alpha_mlm={self.alpha_mlm} and objective.alpha_clm={self.alpha_clm} are both set"
            raise UserError(f"{found}, but a model is masked or causal; set one of them to 0")

    @property
    def weights(self) -> dict[str, float]:
        """The terms with a positive weight, by name: ce, mlm, clm, cos, mse."""
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

    def takes_all_rows(self, lm: LM) -> bool:
        """Whether a term needs logits of all real tokens, and not only of the labelled ones."""
        return lm == "clm" or (self.reads_teacher_logits and self.soft_targets == "all")

    def check_models(self, *, student: PreTrainedModel, teacher: PreTrainedModel | None, lm: LM) -> None:
        """Check that the models have what the terms need."""
        wrong = "clm" if lm == "mlm" else "mlm"
        if wrong in self.weights:
            kind, preset = ("masked", "distilbert or mlm") if lm == "mlm" else ("causal", "distilgpt2 or clm")
            found = f"objective.alpha_{wrong}={self.weights[wrong]} on a {kind} language model"
            raise UserError(f"{found} ({student.config.model_type}); set objective={preset}")
        if self.reads_teacher and teacher is None:
            needs = ", ".join(f"objective.alpha_{name}={self.weights[name]}" for name in _SOFT if name in self.weights)
            raise UserError(f"{needs} need a teacher, but teacher=none; set objective=mlm or objective=clm")
        ours, theirs = student.config.hidden_size, teacher.config.hidden_size if teacher is not None else None
        if self.alpha_cos and ours != theirs:
            found = f"the student is {ours} wide and the teacher {theirs}; set objective.alpha_cos=0"
            raise UserError(f"objective.alpha_cos={self.alpha_cos} compares hidden states, but {found}")

    def denominators(self, *, num_tokens: Tensor, num_labels: Tensor, lm: LM) -> dict[str, Tensor]:
        """Return the count that divides each term: real or labelled tokens of the optimizer step, over all ranks."""
        tokens, labels = num_tokens.clamp(min=1), num_labels.clamp(min=1)
        soft = labels if self.soft_targets == "masked" and lm == "mlm" else tokens
        by_term = {"ce": soft, "mse": soft, "mlm": labels, "clm": labels, "cos": tokens}
        return {name: by_term[name] for name in self.weights}

    def loss(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batch: Batch,
        *,
        lm: LM,
        denominators: Mapping[str, Tensor],
        states: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss of a batch and each term's detached contribution to its mean (nats, squared logits).

        Each model runs once on the batch, or not at all if its ``token_states`` are given. If no term needs more,
        logits are computed for labelled tokens only.
        """
        if states is None:
            with torch.no_grad():
                of_teacher = token_states(teacher, batch) if teacher is not None and self.reads_teacher else None
            states = token_states(student, batch), of_teacher
        ours, theirs = states  # (batch * length, width) each
        real = real_rows(batch)
        rows = real if self.takes_all_rows(lm) else labelled_rows(batch)  # (rows,), or None: all tokens
        labels = _take(batch["labels"].flatten(), rows)  # (rows,)

        # Weights contain the denominators, so that the sums of all micro-batches and ranks add up to the mean.
        weights = {name: alpha / denominators[name] for name, alpha in self.weights.items()}
        weighted: dict[str, Tensor] = {}
        total = torch.zeros((), device=labels.device)
        if self.reads_student_logits:
            implementation = fused_losses if self.implementation == "fused" else losses.reference_losses
            terms = {"soft_weights": "ce", "hard_weights": lm, "mse_weights": "mse"}
            by_row: dict[str, Any] = {  # (rows,) each
                key: weights[name].expand(len(labels)) for key, name in terms.items() if name in weights
            }
            head, targets = lm_head(student, _take(ours, rows)), None
            if teacher is not None and theirs is not None and self.reads_teacher_logits:
                with torch.no_grad():
                    targets = lm_head(teacher, _take(theirs, rows))
            total, soft, hard, mse = implementation(head, targets, labels, **by_row, temperature=self.temperature)
            weighted = {"ce": soft, lm: hard, "mse": mse}
        if self.alpha_cos and theirs is not None:  # over all real tokens, whatever the rows of the logits
            weighted["cos"] = losses.hidden_cosine(_take(ours, real), _take(theirs, real)).sum() * weights["cos"]
            total = total + weighted["cos"]
        return total, {name: weighted[name].detach() / alpha for name, alpha in self.weights.items()}


def real_rows(batch: Batch) -> Tensor | None:
    """Return the flat indices (tokens,) of real tokens, None without padding; finding them waits for the device."""
    if "attention_mask" not in batch:
        return None
    return batch["real"] if "real" in batch else batch["attention_mask"].flatten().nonzero().squeeze(1)


def labelled_rows(batch: Batch) -> Tensor:
    """Return the flat indices (rows,) of the labelled tokens; see ``real_rows``."""
    found = batch.get("labelled")
    return (batch["labels"].flatten() != losses.IGNORE_INDEX).nonzero().squeeze(1) if found is None else found


def _take(tokens: Tensor, rows: Tensor | None) -> Tensor:
    """Index (tokens, ...) by ``rows`` (rows,), or return all tokens for None."""
    return tokens if rows is None else tokens[rows]
