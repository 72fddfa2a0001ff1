"""The terms of the distillation objective as plain formulas, with one value for each token.

No function returns a mean. The caller divides once by the number of tokens of the whole optimizer step, over all
micro-batches and ranks. A mean of means would weight tokens unevenly, because batches mask different numbers of tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the label of a token without a target, as in transformers


def soft_target_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Return the KL divergence from teacher to student, times temperature squared, in nats (tokens,).

    Both logits are (tokens, vocabulary). The factor keeps gradients comparable across temperatures (Hinton 2015, 2).
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def hard_target_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the LM loss (tokens,) in nats of logits (tokens, vocabulary), 0 at label -100 (arXiv 1810.04805, 3.1)."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")


def hidden_cosine(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Return 1 - cos (tokens,) of last hidden states (tokens, width) (DistilBERT, arXiv 1910.01108, section 3)."""
    return 1.0 - F.cosine_similarity(student_hidden.float(), teacher_hidden.float(), dim=-1)


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the squared difference of the logits, summed over the vocabulary, in squared logits (tokens,)."""
    return F.mse_loss(student_logits.float(), teacher_logits.float(), reduction="none").sum(dim=-1)


class Head(NamedTuple):
    """The parts of logits: ``features`` (rows, width), ``weight`` (vocabulary, width), ``bias`` (vocabulary,)."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None


class VocabularyLosses(NamedTuple):
    """Sums over weighted rows, scalars: ``total`` has a gradient; the terms are detached, and 0 when not computed."""

    total: Tensor
    soft: Tensor
    hard: Tensor
    mse: Tensor


def reference_losses(
    student: Head,
    teacher: Head | None,
    labels: Tensor,
    *,
    soft_weights: Tensor | None = None,
    hard_weights: Tensor | None = None,
    mse_weights: Tensor | None = None,
    temperature: float = 1.0,
) -> VocabularyLosses:
    """Sum KL times temperature squared, cross-entropy and squared logit difference, each row times its weight.

    ``labels`` is (rows,), with -100 where there is no target. Each ``*_weights`` is (rows,), or None to skip the term.
    If the two vocabularies are padded to different sizes, words that only one has get no probability mass.
    """
    vocabulary = min(len(head.weight) for head in (student, teacher) if head is not None)
    logits = F.linear(*student)[:, :vocabulary]  # (rows, vocabulary)
    soft = hard = mse = torch.zeros((), device=logits.device)
    if teacher is not None:
        targets = F.linear(*teacher)[:, :vocabulary].detach()
        if soft_weights is not None:
            soft = (soft_weights * soft_target_kl(logits, targets, temperature=temperature)).sum()
        if mse_weights is not None:
            mse = (mse_weights * logit_mse(logits, targets)).sum()
    if hard_weights is not None:
        hard = (hard_weights * hard_target_cross_entropy(logits, labels)).sum()
    return VocabularyLosses(soft + hard + mse, soft.detach(), hard.detach(), mse.detach())


def score(head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross-entropy in nats and predictions, both (rows,), with the logits of 512 rows at a time in memory."""
    nlls, predictions = [], []
    for features, labels in zip(head.features.split(512), targets.split(512), strict=True):
        logits = F.linear(features, head.weight, head.bias)
        nlls.append(hard_target_cross_entropy(logits, labels))
        predictions.append(logits.argmax(dim=-1))
    return torch.cat(nlls), torch.cat(predictions)
