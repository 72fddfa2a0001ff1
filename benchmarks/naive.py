"""The baseline of the benchmarks: the original scripts' formulas on current torch.

Both models compute all logits, with an attention mask of ones. Tokens are selected by ``masked_select`` copies, and each
term is a mean (arXiv 1910.01108, section 3). Nothing of distilkit's losses is used, so that it also serves as an oracle.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from distilkit.language_model import LM, Batch
from distilkit.objective import Objective


def naive_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, *, objective: Objective, lm: LM
) -> Tensor:
    """Return the weighted loss of a batch of full blocks."""
    ids, labels = batch["input_ids"], batch["labels"]
    alphas: dict[str, Any] = vars(objective)  # numbers
    attention_mask = torch.ones_like(ids)
    with torch.no_grad():
        theirs = teacher(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True)
    ours = student(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True)

    masked_only = objective.soft_targets == "masked" and lm == "mlm"
    chosen = labels > -1 if masked_only else attention_mask.bool()
    loss = alphas["alpha_ce"] * naive_kl(ours.logits, theirs.logits, chosen, temperature=objective.temperature)
    if lm == "mlm":
        loss = loss + alphas["alpha_mlm"] * naive_cross_entropy(ours.logits, labels)
    else:  # position t predicts token t + 1
        shifted = ours.logits[:, :-1].contiguous()
        loss = loss + alphas["alpha_clm"] * naive_cross_entropy(shifted, ids[:, 1:].contiguous())
    hidden = ours.hidden_states[-1], theirs.hidden_states[-1]
    total: Tensor = loss + alphas["alpha_cos"] * naive_cosine(*hidden, attention_mask.bool())
    return total


def naive_kl(student_logits: Tensor, teacher_logits: Tensor, chosen: Tensor, *, temperature: float) -> Tensor:
    """Average the KL divergence over the chosen tokens, times temperature squared; logits are (..., vocabulary)."""
    mask = chosen.unsqueeze(-1).expand_as(student_logits)
    vocabulary = student_logits.size(-1)
    student = torch.masked_select(student_logits, mask).view(-1, vocabulary)
    teacher = torch.masked_select(teacher_logits, mask).view(-1, vocabulary)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1), F.softmax(teacher / temperature, dim=-1), reduction="batchmean"
    )
    return divergence * temperature**2


def naive_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Average the cross-entropy over the labelled tokens."""
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-100)


def naive_cosine(student_hidden: Tensor, teacher_hidden: Tensor, chosen: Tensor) -> Tensor:
    """Average 1 - cos over the chosen tokens; hidden states are (..., width)."""
    mask = chosen.unsqueeze(-1).expand_as(student_hidden)
    width = student_hidden.size(-1)
    student = torch.masked_select(student_hidden, mask).view(-1, width)
    teacher = torch.masked_select(teacher_hidden, mask).view(-1, width)
    return F.cosine_embedding_loss(student, teacher, student.new_ones(student.size(0)))
