"""The terms of the distillation objective, each a sum over tokens in nats or squared logits.

Every function returns a sum, not a mean: the caller divides once by the number of tokens of the whole optimizer step,
over all micro-batches and ranks. A mean of means would weigh tokens unevenly, because batches mask different numbers.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the label of a token without a target, as everywhere in transformers


def soft_target_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Sum the KL divergence from teacher to student over tokens, times temperature squared.

    Both logits are (tokens, vocabulary). The factor keeps gradients comparable across temperatures (Hinton et al. 2015,
    section 2). Returns a scalar in nats; divide by the token count once per step.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def hard_target_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy over the labelled tokens: the masked-LM loss, or the causal one on shifted labels.

    Logits are (tokens, vocabulary), labels (tokens,) with -100 where there is no target (BERT, arXiv 1810.04805,
    section 3.1). Returns a scalar in nats, zero when nothing is labelled.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


def hidden_cosine(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Sum 1 - cos(student, teacher) over the last hidden states.

    Both are (tokens, width) of one width (DistilBERT, arXiv 1910.01108, section 3). Returns a scalar without unit.
    """
    return (1.0 - F.cosine_similarity(student_hidden.float(), teacher_hidden.float(), dim=-1)).sum()


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Sum the squared difference of the logits over the vocabulary and over tokens.

    Both are (tokens, vocabulary). Returns a scalar in squared logits.
    """
    return F.mse_loss(student_logits.float(), teacher_logits.float(), reduction="sum")
