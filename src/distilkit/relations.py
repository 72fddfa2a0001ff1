"""Relations between tokens in one layer's queries, keys and values, as MiniLMv2 distils them (arXiv 2012.15828).

A relation is the softmax of the scaled products of all pairs of queries, or of keys, or of values. It has the shape of
attention, so that a student of any width, depth and number of heads can learn it.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilkit.attention import dense_mask
from distilkit.projections import QKV

_CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 2**28}  # of one float32 matrix of relations; some ten live at a time


def relation_loss(
    student: QKV,
    teacher: QKV,
    *,
    heads: int,
    causal: bool,
    real: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the sum over real tokens of KL(teacher || student) of their relations, in nats (2012.15828, section 3.1).

    It is the mean over ``heads`` relation heads, into which all widths are split, and the sum of the relations of
    queries, of keys and of values. A token relates to the real tokens of its document: by ``documents`` (batch, length),
    else by ``real`` (batch, length), 0 on padding. A causal model's tokens relate to earlier ones and themselves, as in
    its attention. No more than ``chunk`` pairs of sequence and head are in memory at a time (None: by device), in
    backward neither. All is in float32, whatever autocast says; only the student gets gradients.
    """
    if not torch.is_grad_enabled():  # inside the function, ``needs_input_grad`` would still be true
        student = QKV(*(each.detach() for each in student))
    tokens = student.query
    weights = torch.ones(tokens.shape[:2], device=tokens.device) if real is None else real
    segments = real if documents is None else documents
    sums = [
        _Relation.apply(ours, theirs.detach(), weights, segments, heads, causal, chunk)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(cast(list[Tensor], sums)).sum()


class _Relation(torch.autograd.Function):
    """Compute the gradient in forward, while a chunk's relations exist, and scale it in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (batch, length, width)
        teacher: Tensor,  # (batch, length, another width)
        weights: Tensor,  # (batch, length), 0 for tokens that do not count
        segments: Tensor | None,  # (batch, length)
        heads: int,
        causal: bool,
        chunk: int | None,
    ) -> Tensor:
        device, length, exact = student.device, student.shape[1], torch.promote_types(student.dtype, torch.float32)
        with torch.autocast(device.type, enabled=False):
            ours, theirs = (_split(each.to(exact), heads) for each in (student, teacher))  # (batch * heads, length, d)
            size = chunk or max(1, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * length * length))
            gradient = torch.empty_like(ours) if ctx.needs_input_grad[0] else None
            total = ours.new_zeros(())
            for begin in range(0, len(ours), size):
                part = slice(begin, begin + size)
                batch = torch.arange(begin, min(begin + size, len(ours)), device=device) // heads  # (pairs,)
                of = None if segments is None else segments[batch]
                mask = None  # in full blocks all tokens relate, and nothing is to be filled
                if of is not None or causal:
                    mask = dense_mask(of, length=length, causal=causal, reach=length, device=device)[:, 0]
                weight = weights[batch].to(exact)[..., None] / heads  # (pairs, length, 1)
                log_q, log_p = (_log_relation(each[part], mask) for each in (ours, theirs))
                p = log_p.exp()
                gaps = log_p - log_q
                total += (weight * p * (gaps if mask is None else gaps.masked_fill_(~mask, 0))).sum()
                if gradient is not None:
                    # The derivative by the scores is q - p, and a score is a product of two rows: it goes to both.
                    by_scores = log_q.exp_().sub_(p).mul_(weight)  # (pairs, length, length)
                    by_scores = by_scores + by_scores.mT
                    gradient[part] = by_scores @ ours[part] / ours.shape[-1] ** 0.5
        ctx.save_for_backward(None if gradient is None else _merge(gradient, heads))
        ctx.dtype = student.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(ctx.dtype), *[None] * 6


def _split(states: Tensor, heads: int) -> Tensor:
    """Split the width into relation heads: (batch, length, width) -> (batch * heads, length, width / heads)."""
    batch, length, width = states.shape
    return states.view(batch, length, heads, width // heads).transpose(1, 2).flatten(0, 1)


def _merge(states: Tensor, heads: int) -> Tensor:
    """Undo ``_split``."""
    return states.view(-1, heads, *states.shape[1:]).transpose(1, 2).flatten(2)


def _log_relation(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logarithm of the relation (pairs, length, length) of (pairs, length, d); -inf outside the mask."""
    scores = states @ states.mT / states.shape[-1] ** 0.5
    return F.log_softmax(scores if mask is None else scores.masked_fill_(~mask, -torch.inf), dim=-1)
