"""The weighted objective of distillation: its terms, their tokens, and what they read of the models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilkit import losses
from distilkit.errors import UserError
from distilkit.fused import fused_losses
from distilkit.language_model import LM, Batch, lm_head, real_mask, token_states
from distilkit.projections import QKV, projections_of
from distilkit.relations import relation_loss
from distilkit.schedule import Points, as_points, check_points, piecewise

_SOFT = ("ce", "cos", "mse", "rel")  # the terms that read the teacher
_NUMBERS = {"relation_heads": 1, "teacher_layer": 0, "student_layer": 0}  # whole, with their least
_CHOICES = {
    "soft_targets": ("all", "masked"),
    "cos_targets": ("all", "masked"),
    "implementation": ("fused", "reference"),
}


# What the terms read of a model: last hidden states (batch * length, width), and one layer's projections.
Read = tuple[Tensor | None, QKV | None]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weight the terms of DistilBERT's loss (arXiv 1910.01108, section 3) and the relations of MiniLMv2 (2012.15828).

    ``alpha_ce`` weights the soft-target KL at ``temperature``, ``alpha_cos`` the cosine between last hidden states, and
    ``alpha_mse`` the squared difference of logits. ``alpha_mlm`` and ``alpha_clm`` weight the hard-target cross-entropy
    of a masked and a causal model. A weight is a number, or points over the training, of which ``at`` takes one step's.
    KL and MSE take ``all`` real tokens or the ``masked`` ones only, as ``soft_targets`` says, and the cosine those of
    ``cos_targets``; a causal model always takes all. ``alpha_rel`` weights the KL between relations of tokens in the
    queries, keys and values of ``student_layer`` and ``teacher_layer``, which count from 0, split into
    ``relation_heads``; see ``relation_layers`` and ``num_relation_heads`` for None. A term of weight zero is not computed.
    ``implementation`` is ``fused``, which never stores all logits, or ``reference``, the plain formulas. A wrong value
    raises a ``UserError``.
    """

    alpha_ce: Points
    alpha_mlm: Points
    alpha_clm: Points
    alpha_cos: Points
    alpha_mse: Points
    temperature: float
    soft_targets: Literal["all", "masked"]
    implementation: Literal["fused", "reference"]
    alpha_rel: Points = 0.0
    relation_heads: int | None = None
    teacher_layer: int | None = None
    student_layer: int | None = None
    cos_targets: Literal["all", "masked"] = "all"

    def __post_init__(self) -> None:
        """Check each value, and that the values fit together."""
        for field in fields(self):
            name, value, choices = field.name, getattr(self, field.name), _CHOICES.get(field.name)
            if choices:
                if value not in choices:
                    raise UserError(f"objective.{name} is {value!r}; it takes {' or '.join(choices)}")
            elif name in _NUMBERS:
                if value is not None and (type(value) is not int or value < _NUMBERS[name]):
                    limit = f"null or a whole number of at least {_NUMBERS[name]}"
                    raise UserError(f"objective.{name}={value}, but it must be {limit}")
            else:
                limit = "a finite number of at least 0"
                value = check_points(value, key=f"objective.{name}", limit=limit, holds=lambda each: each >= 0)
                object.__setattr__(self, name, value)  # plain lists, which checkpoints hold and compare
        if isinstance(self.temperature, list) or self.temperature <= 0:
            raise UserError(f"objective.temperature={self.temperature}, but it must be above 0; the paper uses 2")
        if {"mlm", "clm"} <= self.weights.keys():
            found = f"objective.alpha_mlm={self.alpha_mlm} and objective.alpha_clm={self.alpha_clm} are both set"
            raise UserError(f"{found}, but a model is masked or causal; set one of them to 0")
        self._check_terms()

    def _check_terms(self) -> None:
        """Check that each step has a term; the sum of linear weights is 0 at one of their points, if at all."""
        for share in sorted({0.0, *(at for points in self.weights.values() for at, _ in as_points(points))}):
            if not any(self._alphas(share).values()):
                found = f"all alphas of the objective are 0 at {share:.0%} of the training, so the loss has no term"
                raise UserError(f"{found}; set at least one above 0")

    @property
    def weights(self) -> dict[str, Points]:
        """The terms whose weight is ever positive, by name: ce, mlm, clm, cos, mse, rel."""
        alphas = {name: getattr(self, f"alpha_{name}") for name in ("ce", "mlm", "clm", "cos", "mse", "rel")}
        return {name: alpha for name, alpha in alphas.items() if any(value > 0 for _, value in as_points(alpha))}

    def _alphas(self, progress: float) -> dict[str, float]:
        return {f"alpha_{name}": piecewise(alpha, progress) for name, alpha in self.weights.items()}

    def at(self, progress: float) -> "Objective":
        """Return the objective of one optimizer step, with plain weights."""
        return replace(self, **cast(Any, self._alphas(progress)))

    def of_validation(self) -> "Objective":
        """Return the objective of held-out text: all terms, at their highest weight."""
        highest = {f"alpha_{name}": max(value for _, value in as_points(each)) for name, each in self.weights.items()}
        return replace(self, **cast(Any, highest))

    @property
    def reads_teacher_logits(self) -> bool:
        """Whether a term needs the teacher's language-model head."""
        return "ce" in self.weights or "mse" in self.weights

    @property
    def reads_student_logits(self) -> bool:
        """Whether a term needs the student's language-model head."""
        return self.reads_teacher_logits or "mlm" in self.weights or "clm" in self.weights

    @property
    def reads_teacher(self) -> bool:
        """Whether a term needs the teacher at all."""
        return self.reads_teacher_states or "rel" in self.weights

    @property
    def reads_teacher_states(self) -> bool:
        """Whether a term needs the teacher's last hidden states."""
        return self.reads_teacher_logits or "cos" in self.weights

    @property
    def reads_student_states(self) -> bool:
        """Whether a term needs the student's last hidden states."""
        return self.reads_student_logits or "cos" in self.weights

    def relation_layers(self, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, int]:
        """Return the layers of student and teacher whose relations are compared.

        By default these are the last ones, but in a teacher of more than 12 layers the one at 7 / 8 of its depth, as
        the 21st of 24 (2012.15828, section 4).
        """
        depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        upper = depths[1] if depths[1] <= 12 else round(depths[1] * 21 / 24)
        ours, theirs = self.student_layer, self.teacher_layer
        for name, layer, depth in zip(("student", "teacher"), (ours, theirs), depths, strict=True):
            if layer is not None and layer >= depth:
                found = f"objective.{name}_layer={layer}, but the {name} has layers 0 to {depth - 1}"
                raise UserError(f"{found}; set it within that range, or to null")
        return depths[0] - 1 if ours is None else ours, upper - 1 if theirs is None else theirs

    def _relation_widths(self, student: PreTrainedModel, teacher: PreTrainedModel) -> set[int]:
        """Return the widths of queries, keys and values of both models."""
        pairs = zip((student, teacher), self.relation_layers(student, teacher), strict=True)
        return {width for model, layer in pairs for width in projections_of(model, layer).widths}

    def num_relation_heads(self, student: PreTrainedModel, teacher: PreTrainedModel) -> int:
        """Return the relation heads: by default the most that divide all widths, up to the teacher's width / 16.

        Those are the paper's 48 and 64 for teachers 768 and 1,024 wide and students half as wide (section 4).
        """
        common, most = math.gcd(*self._relation_widths(student, teacher)), max(1, teacher.config.hidden_size // 16)
        return self.relation_heads or max(each for each in range(1, most + 1) if common % each == 0)

    def unread_parameters(self, student: PreTrainedModel) -> set[nn.Parameter]:
        """Return the student's parameters that no term reads: the head, and with relations alone the upper layers."""
        if not self.reads_student_states:
            alone = replace(self, teacher_layer=None)  # the teacher may have more layers
            return projections_of(student, alone.relation_layers(student, student)[0]).unread
        return set() if self.reads_student_logits else set(student.parameters()) - set(student.base_model.parameters())

    def takes_all_rows(self, lm: LM) -> bool:
        """Whether a term needs logits of all real tokens, and not only of labelled ones."""
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
        if "cos" in self.weights and ours != theirs:
            found = f"the student is {ours} wide and the teacher {theirs}"
            cure = "set objective=minilm, or objective.alpha_cos=0"
            raise UserError(f"objective.alpha_cos={self.alpha_cos} compares hidden states, but {found}; {cure}")
        if "rel" in self.weights and teacher is not None:
            self._check_relations(student, teacher)

    def _check_relations(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Check that the relation heads divide the widths of both models."""
        widths = self._relation_widths(student, teacher)
        heads, common = self.num_relation_heads(student, teacher), math.gcd(*widths)
        if common % heads:
            fitting = ", ".join(str(each) for each in range(1, common + 1) if common % each == 0)
            found = f"objective.relation_heads={heads} do not divide the widths {sorted(widths)} of queries, keys and "
            raise UserError(f"{found}values of both models; set one of {fitting}")

    def denominators(self, *, num_tokens: Tensor, num_labels: Tensor, lm: LM) -> dict[str, Tensor]:
        """Return the count that divides each term: real or labelled tokens of the optimizer step, over all ranks."""
        tokens, labels = num_tokens.clamp(min=1), num_labels.clamp(min=1)
        soft = labels if self.soft_targets == "masked" and lm == "mlm" else tokens
        states = labels if self.cos_targets == "masked" and lm == "mlm" else tokens
        by_term = {"ce": soft, "mse": soft, "mlm": labels, "clm": labels, "cos": states, "rel": tokens}
        return {name: by_term[name] for name in self.weights}

    def read(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch, *, whole: bool = False
    ) -> tuple[Read, Read]:
        """Run each model once on a batch, only as far as a term reads it unless ``whole``."""
        if (cached := batch.get("teacher_states")) is not None and teacher is not None:
            alone = self.read(student, None, batch, whole=whole)[0]
            return alone, (cached.to(teacher.dtype), None)
        ours, theirs = (
            self.relation_layers(student, teacher) if "rel" in self.weights and teacher is not None else (None, None)
        )
        found = _read(student, batch, layer=ours, whole=self.reads_student_states or whole)
        if teacher is None:
            return found, (None, None)
        shared = batch.get("teacher_reads", {})  # by what it is: several students read this batch
        what = id(teacher), theirs, self.reads_teacher_states or whole
        batch["teacher_is_read"] = what in shared
        if what not in shared:
            with torch.no_grad():
                shared[what] = _read(teacher, batch, layer=theirs, whole=what[-1])
        return found, shared[what]

    def loss(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batch: Batch,
        *,
        lm: LM,
        denominators: Mapping[str, Tensor],
        read: tuple[Read, Read] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss of a batch and each term's detached contribution to its mean (nats, squared logits).

        The weights are plain numbers, as of ``at``. Each model runs once on the batch, or not at all if what they ``read``
        is given. If no term needs more, logits are computed for labelled tokens only.
        """
        (ours, our_qkv), (theirs, their_qkv) = self.read(student, teacher, batch) if read is None else read
        real, theirs_are_labelled = real_rows(batch), "teacher_states" in batch
        rows = real if self.takes_all_rows(lm) else labelled_rows(batch)  # (rows,), or None: all tokens
        labels = _take(batch["labels"].flatten(), rows)  # (rows,)

        # Weights contain the denominators, so that the sums of all micro-batches and ranks add up to the mean.
        alphas = cast(dict[str, float], self.weights)
        weights = {name: alpha / denominators[name] for name, alpha in alphas.items()}
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
                    targets = lm_head(teacher, theirs if theirs_are_labelled else _take(theirs, rows))
            total, soft, hard, mse = implementation(head, targets, labels, **by_row, temperature=self.temperature)
            weighted = {"ce": soft, lm: hard, "mse": mse}
        if "cos" in weights and ours is not None and theirs is not None:
            compared = labelled_rows(batch) if self.cos_targets == "masked" and lm == "mlm" else real
            states = theirs if theirs_are_labelled else _take(theirs, compared)
            weighted["cos"] = losses.hidden_cosine(_take(ours, compared), states).sum() * weights["cos"]
            total = total + weighted["cos"]
        if "rel" in weights and teacher is not None and our_qkv is not None and their_qkv is not None:
            summed = relation_loss(
                our_qkv,
                their_qkv,
                heads=self.num_relation_heads(student, teacher),
                causal=lm == "clm",
                real=real_mask(batch),
                documents=batch.get("document_ids"),
            )
            weighted["rel"] = summed * weights["rel"]
            total = total + weighted["rel"]
        return total, {name: weighted[name].detach() / alpha for name, alpha in alphas.items()}


def _read(model: PreTrainedModel, batch: Batch, *, layer: int | None, whole: bool) -> Read:
    """Run a model on a batch, up to the projections of ``layer``, or to its end if ``whole``."""
    if layer is not None:
        return projections_of(model, layer).read(batch, whole=whole)
    return token_states(model, batch) if whole else None, None


def real_rows(batch: Batch) -> Tensor | None:
    """Return the flat indices (tokens,) of tokens that count, None if all do; finding them waits for the device."""
    if "real" in batch or (mask := real_mask(batch)) is None:
        return batch.get("real")
    return mask.flatten().nonzero().squeeze(1)


def labelled_rows(batch: Batch) -> Tensor:
    """Return the flat indices (rows,) of the labelled tokens; see ``real_rows``."""
    found = batch.get("labelled")
    return (batch["labels"].flatten() != losses.IGNORE_INDEX).nonzero().squeeze(1) if found is None else found


def _take(tokens: Tensor, rows: Tensor | None) -> Tensor:
    """Index (tokens, ...) by ``rows`` (rows,), or return all tokens for None."""
    return tokens if rows is None else tokens[rows]
