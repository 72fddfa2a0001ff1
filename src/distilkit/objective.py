"""The weighted objective of distillation: its terms, their tokens, and what they read of the models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilkit import losses, relations
from distilkit.errors import UserError
from distilkit.fused import fused_losses
from distilkit.language_model import LM, Batch, lm_head, token_states

_SOFT = ("ce", "cos", "mse", "rel")  # the terms that read the teacher
_NUMBERS = {"relation_heads": 1, "teacher_layer": 0, "student_layer": 0}  # whole or null, with their least
_CHOICES = {"soft_targets": ("all", "masked"), "implementation": ("fused", "reference")}


class States(NamedTuple):
    """What the terms read of both models: last hidden states (batch * length, width), and one layer's projections."""

    student: Tensor | None
    teacher: Tensor | None
    student_qkv: relations.QKV | None = None
    teacher_qkv: relations.QKV | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weight the terms of DistilBERT's loss (arXiv 1910.01108, section 3) and the relations of MiniLMv2 (2012.15828).

    ``alpha_ce`` weights the soft-target KL at ``temperature``, ``alpha_cos`` the cosine between last hidden states, and
    ``alpha_mse`` the squared difference of logits. ``alpha_mlm`` and ``alpha_clm`` weight the hard-target cross-entropy
    of a masked and a causal model. KL and MSE take ``all`` real tokens, or the ``masked`` ones only; a causal model
    always takes all. ``alpha_rel`` weights the KL between relations of tokens in the queries, keys and values of
    ``student_layer`` and ``teacher_layer``, which count from 0, split into ``relation_heads``; see ``relation_layers``
    and ``num_relation_heads`` for None. A term of weight zero is not computed. ``implementation`` is ``fused``, which
    never stores all logits, or ``reference``, the plain formulas. A wrong value raises a ``UserError``.
    """

    alpha_ce: float
    alpha_mlm: float
    alpha_clm: float
    alpha_cos: float
    alpha_mse: float
    temperature: float
    soft_targets: Literal["all", "masked"]
    implementation: Literal["fused", "reference"]
    alpha_rel: float = 0.0
    relation_heads: int | None = None
    teacher_layer: int | None = None
    student_layer: int | None = None

    def __post_init__(self) -> None:
        """Check each value, and that the values fit together."""
        for field in fields(self):
            value, choices = getattr(self, field.name), _CHOICES.get(field.name)
            if choices:
                if value not in choices:
                    raise UserError(f"objective.{field.name} is {value!r}; it takes {' or '.join(choices)}")
            elif field.name in _NUMBERS:
                least = _NUMBERS[field.name]
                if value is not None and (type(value) is not int or value < least):
                    found = f"objective.{field.name}={value}"
                    raise UserError(f"{found}, but it must be null or a whole number of at least {least}")
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
        """The terms with a positive weight, by name: ce, mlm, clm, cos, mse, rel."""
        alphas = {name: getattr(self, f"alpha_{name}") for name in ("ce", "mlm", "clm", "cos", "mse", "rel")}
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
        return self.reads_teacher_states or self.alpha_rel > 0

    @property
    def reads_teacher_states(self) -> bool:
        """Whether a term needs the teacher's last hidden states."""
        return self.reads_teacher_logits or self.alpha_cos > 0

    @property
    def reads_student_states(self) -> bool:
        """Whether a term needs the student's last hidden states."""
        return self.reads_student_logits or self.alpha_cos > 0

    def relation_layers(self, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, int]:
        """Return the layers of student and teacher whose relations are compared.

        By default these are the last ones, but in a teacher of more than 12 layers the one at 7 / 8 of its depth, as
        the 21st of 24 (2012.15828, section 4).
        """
        depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        upper = depths[1] if depths[1] <= 12 else round(depths[1] * 21 / 24)
        ours, theirs = self.student_layer, self.teacher_layer
        return depths[0] - 1 if ours is None else ours, upper - 1 if theirs is None else theirs

    def num_relation_heads(self, teacher: PreTrainedModel) -> int:
        """Return the relation heads: by default one per 16 of the teacher's width, as the paper's 48 and 64."""
        return self.relation_heads or max(1, teacher.config.hidden_size // 16)

    def unread_parameters(self, student: PreTrainedModel) -> set[nn.Parameter]:
        """Return the student's parameters that no term reads: the head, and with relations alone the upper layers."""
        if not self.reads_student_states:
            return relations.unread(student, self.relation_layers(student, student)[0])
        return set() if self.reads_student_logits else set(student.parameters()) - set(student.base_model.parameters())

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
            found = (
                f"the student is {ours} wide and the teacher {theirs}; set objective=minilm, or objective.alpha_cos=0"
            )
            raise UserError(f"objective.alpha_cos={self.alpha_cos} compares hidden states, but {found}")
        if self.alpha_rel and teacher is not None:
            self._check_relations(student, teacher)

    def _check_relations(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Check that both models have the layers, and that the relation heads divide their widths."""
        widths: set[int] = set()
        named = (("student", student), ("teacher", teacher))
        for (of, model), layer in zip(named, self.relation_layers(student, teacher), strict=True):
            if layer >= (depth := model.config.num_hidden_layers):
                found = f"objective.{of}_layer={layer}, but the {of} has layers 0 to {depth - 1}"
                raise UserError(f"{found}; set it within that range, or to null")
            widths |= set(relations.widths(model, layer))
        heads, common = self.num_relation_heads(teacher), math.gcd(*widths)
        if common % heads:
            fitting = ", ".join(str(each) for each in range(1, common + 1) if common % each == 0)
            found = f"objective.relation_heads={heads} do not divide the widths {sorted(widths)} of queries, keys and "
            raise UserError(f"{found}values of both models; set one of {fitting}")

    def denominators(self, *, num_tokens: Tensor, num_labels: Tensor, lm: LM) -> dict[str, Tensor]:
        """Return the count that divides each term: real or labelled tokens of the optimizer step, over all ranks."""
        tokens, labels = num_tokens.clamp(min=1), num_labels.clamp(min=1)
        soft = labels if self.soft_targets == "masked" and lm == "mlm" else tokens
        by_term = {"ce": soft, "mse": soft, "mlm": labels, "clm": labels, "cos": tokens, "rel": tokens}
        return {name: by_term[name] for name in self.weights}

    def states(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch, *, whole: bool = False
    ) -> States:
        """Run each model once on a batch, only as far as a term reads it unless ``whole``."""
        layers = self.relation_layers(student, teacher) if self.alpha_rel and teacher is not None else None

        def run(model: PreTrainedModel, *, layer: int | None, to_the_end: bool) -> tuple[Tensor | None, Any]:
            if layer is not None:
                return relations.read(model, batch, layer=layer, whole=to_the_end)
            return token_states(model, batch) if to_the_end else None, None

        ours = run(student, layer=layers[0] if layers else None, to_the_end=whole or self.reads_student_states)
        theirs: tuple[Tensor | None, Any] = None, None
        if teacher is not None:
            with torch.no_grad():
                read = layers[1] if layers else None
                theirs = run(teacher, layer=read, to_the_end=whole or self.reads_teacher_states)
        return States(ours[0], theirs[0], ours[1], theirs[1])

    def loss(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batch: Batch,
        *,
        lm: LM,
        denominators: Mapping[str, Tensor],
        states: States | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss of a batch and each term's detached contribution to its mean (nats, squared logits).

        Each model runs once on the batch, or not at all if its ``states`` are given. If no term needs more, logits are
        computed for labelled tokens only.
        """
        ours, theirs, our_qkv, their_qkv = self.states(student, teacher, batch) if states is None else states
        real = real_rows(batch)
        rows = real if self.takes_all_rows(lm) else labelled_rows(batch)  # (rows,), or None: all tokens
        labels = _take(batch["labels"].flatten(), rows)  # (rows,)

        # Weights contain the denominators, so that the sums of all micro-batches and ranks add up to the mean.
        weights = {name: alpha / denominators[name] for name, alpha in self.weights.items()}
        weighted: dict[str, Tensor] = {}
        total = torch.zeros((), device=labels.device)
        if self.reads_student_logits and ours is not None:
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
        if (
            self.alpha_cos and ours is not None and theirs is not None
        ):  # over all real tokens, whatever the rows of the logits
            weighted["cos"] = losses.hidden_cosine(_take(ours, real), _take(theirs, real)).sum() * weights["cos"]
            total = total + weighted["cos"]
        if self.alpha_rel and teacher is not None and our_qkv is not None and their_qkv is not None:
            summed = relations.relation_loss(
                our_qkv,
                their_qkv,
                heads=self.num_relation_heads(teacher),
                causal=lm == "clm",
                real=batch.get("attention_mask"),
                documents=batch.get("document_ids"),
            )
            weighted["rel"] = summed * weights["rel"]
            total = total + weighted["rel"]
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
