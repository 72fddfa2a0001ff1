"""The vocabulary-wide terms of the objective, from hidden states to gradients, without ever holding all logits.

For a chunk of rows two matrix products give the logits of both models, one elementwise core turns the student's in
place into the gradient of all terms together, and two matrix products carry it to the hidden states and to the output
embeddings. Backward only scales what forward made: four products are all there is, and memory does not grow with the
number of rows. The plain formulas are in ``losses.py``.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.function import once_differentiable

from distilkit.losses import Head, VocabularyLosses

log = logging.getLogger(__name__)

_BYTES_OF_LOGITS = {"cpu": 64 * 2**20, "cuda": 2**30}  # both models'; more spills the caches, less starves the products
_FEWEST_ROWS = 128
_VOCABULARY_MULTIPLE = {"cpu": 1, "cuda": 128}  # tensor cores want whole tiles
_WORTH_COMPILING = 10**7  # logits of a call; below that, compiling takes longer than it ever saves


def fused_losses(
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

    ``labels`` is (rows,), -100 where there is no target, else a word that both vocabularies have; each ``*_weights``
    (rows,), None to leave the term out. Products run in autocast's precision, sums and weight gradients in float32 or
    better. Where the two vocabularies are padded to different sizes, the words that only one has carry no mass.
    Gradients reach the student alone.
    """
    if not torch.is_grad_enabled():  # or else the function would be told that weights want gradients
        student = Head(*(tensor if tensor is None else tensor.detach() for tensor in student))  # type: ignore[arg-type]
    targets = teacher if teacher is not None else (None, None, None)
    row_weights = soft_weights, hard_weights, mse_weights
    return VocabularyLosses(*_Fused.apply(*student, *targets, labels, row_weights, temperature))


class _Projection:
    """A model's output embeddings, cast once, and a buffer for the logits of one chunk."""

    def __init__(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, *, vocabulary: int, dtype: torch.dtype, rows: int
    ) -> None:
        padded = vocabulary + -vocabulary % _VOCABULARY_MULTIPLE.get(features.device.type, 1)
        self.features, self.weight = features.to(dtype), _cast_rows(weight, vocabulary, padded, dtype)
        self.bias = None if bias is None else _cast_rows(bias, vocabulary, padded, dtype)
        self.buffer = self.weight.new_empty(rows, len(self.weight))

    def logits(self, chunk: slice) -> Tensor:
        """Return the logits (rows, padded vocabulary) of a chunk, valid until the next call."""
        features = self.features[chunk]
        out = self.buffer[: len(features)]
        if self.bias is None:
            return torch.mm(features, self.weight.t(), out=out)
        return torch.addmm(self.bias, features, self.weight.t(), out=out)


def _cast_rows(tensor: Tensor, rows: int, padded: int, dtype: torch.dtype) -> Tensor:
    """Cast the first rows and add zeros up to ``padded`` rows, with one copy at most."""
    if rows == padded:
        return tensor[:rows].to(dtype)
    result = torch.empty(padded, *tensor.shape[1:], dtype=dtype, device=tensor.device)
    result[:rows] = tensor[:rows]
    result[rows:] = 0
    return result


class _Fused(torch.autograd.Function):
    """Make the gradient in forward, where the logits are at hand, and scale it in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_features: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor,
        row_weights: tuple[Tensor | None, ...],
        temperature: float,
    ) -> tuple[Tensor, ...]:
        device, rows = features.device.type, len(features)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
        exact = torch.promote_types(features.dtype, torch.float32)
        models = [Head(features, weight, bias)]
        if teacher_features is not None and teacher_weight is not None:
            models.append(Head(teacher_features, teacher_weight, teacher_bias))
        vocabulary = min(len(model.weight) for model in models)
        per_chunk = _rows_per_chunk(rows, bytes_per_row=vocabulary * dtype.itemsize * len(models), device=device)

        wanted = ctx.needs_input_grad[:3]
        to_features = torch.empty_like(features, dtype=exact) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        to_bias = torch.zeros_like(bias, dtype=exact) if wanted[2] and bias is not None else None
        # Weights are alphas over token counts. Their size is kept out of the logits' gradient, which may be in half
        # precision, and given back in backward.
        unit = features.new_ones((), dtype=exact)
        if rows:
            unit = torch.stack([weights.amax() for weights in row_weights if weights is not None]).amax().to(exact)
            unit = torch.where(unit > 0, unit, 1)
        relative = [None if weights is None else weights.to(exact) / unit for weights in row_weights]
        core, add = _elementwise(device) if rows * vocabulary >= _WORTH_COMPILING else (_core_in_parts, _add)
        sums = features.new_zeros(3, dtype=exact)
        with torch.autocast(device, enabled=False):
            heads = [_Projection(*model, vocabulary=vocabulary, dtype=dtype, rows=per_chunk) for model in models]
            for begin in range(0, rows, per_chunk):
                chunk = slice(begin, begin + per_chunk)
                logits, *targets = [head.logits(chunk) for head in heads]
                sums += core(
                    logits[:, :vocabulary],
                    targets[0][:, :vocabulary] if targets else None,
                    labels[chunk],
                    *[None if weights is None else weights[chunk] for weights in relative],
                    temperature=temperature,
                )
                gradient = logits  # the core has turned the one into the other
                gradient[:, vocabulary:] = 0
                if to_features is not None:
                    to_features[chunk] = gradient @ heads[0].weight
                if to_weight is not None:
                    if dtype == exact:
                        to_weight[:vocabulary].addmm_(gradient[:, :vocabulary].t(), heads[0].features[chunk])
                    else:
                        add(to_weight[:vocabulary], (gradient.t() @ heads[0].features[chunk])[:vocabulary])
                if to_bias is not None:  # a product with ones is ten times as fast as a sum over rows on CPU
                    to_bias[:vocabulary] += (gradient.new_ones(1, len(gradient)) @ gradient)[0, :vocabulary]
        ctx.save_for_backward(unit, to_features, to_weight, to_bias)
        soft, hard, mse = (sums * unit).unbind()
        ctx.mark_non_differentiable(soft, hard, mse)
        return soft + hard + mse, soft, hard, mse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        unit, *gradients = ctx.saved_tensors
        scale = upstream * unit
        return (*(None if gradient is None else gradient * scale for gradient in gradients), *[None] * 6)


def _rows_per_chunk(rows: int, *, bytes_per_row: int, device: str) -> int:
    """Cut the rows into equal chunks that fit the budget: a size that changes costs a new memory plan each time."""
    most = max(_FEWEST_ROWS, _BYTES_OF_LOGITS.get(device, _BYTES_OF_LOGITS["cuda"]) // bytes_per_row)
    return max(1, math.ceil(rows / max(1, math.ceil(rows / most))))


def _core(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    soft_weights: Tensor | None,
    hard_weights: Tensor | None,
    mse_weights: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    """Turn the student's logits (rows, vocabulary) in place into their gradient, and return the three weighted sums."""
    logits = student.to(torch.promote_types(student.dtype, torch.float32))
    gradient = torch.zeros_like(logits)
    soft = hard = mse = logits.new_zeros(())
    if teacher is not None:
        targets = teacher.to(logits.dtype)
        if soft_weights is not None:
            log_q = F.log_softmax(logits / temperature, dim=-1)
            log_p = F.log_softmax(targets / temperature, dim=-1)
            p = log_p.exp()
            soft = (soft_weights * (p * (log_p - log_q)).sum(dim=-1)).sum() * temperature**2
            gradient = gradient + (soft_weights * temperature)[:, None] * (log_q.exp() - p)
        if mse_weights is not None:
            difference = logits - targets
            mse = (mse_weights * difference.square().sum(dim=-1)).sum()
            gradient = gradient + 2 * mse_weights[:, None] * difference
    if hard_weights is not None:
        weights = torch.where(labels >= 0, hard_weights, 0)
        log_q = F.log_softmax(logits, dim=-1)
        is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
        hard = -(weights * torch.where(is_label, log_q, 0).sum(dim=-1)).sum()
        gradient = gradient + weights[:, None] * (log_q.exp() - is_label.to(logits.dtype))
    student.copy_(gradient)
    return torch.stack([soft, hard, mse])


def _core_in_parts(*tensors: Tensor | None, temperature: float) -> Tensor:
    """Run the core as it stands, on an eighth of the rows at a time: uncompiled, it holds eight float32 copies of them."""
    logits = tensors[0]
    assert logits is not None
    size = max(_FEWEST_ROWS, math.ceil(len(logits) / 8))
    parts = range(0, len(logits), size)
    chosen = ([None if tensor is None else tensor[begin : begin + size] for tensor in tensors] for begin in parts)
    return torch.stack([_core(*each, temperature=temperature) for each in chosen]).sum(dim=0)  # type: ignore[arg-type]


def _add(total: Tensor, part: Tensor) -> None:
    """Add in the precision of ``total``."""
    total.add_(part)


@functools.cache
def _elementwise(device: str) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """Compile the elementwise parts where that works on this machine, with a line in the log that says which."""
    core: Callable[..., Tensor] = torch.compile(_core)
    add = torch.compile(_add)

    def log_eager(error: Exception) -> None:
        log.info("the loss runs without torch.compile: %s", str(error).partition("\n")[0])

    try:
        add(torch.zeros(2, 2, device=device), torch.zeros(2, 2, device=device, dtype=torch.bfloat16))
    except Exception as error:  # no compiler, no Triton, an unknown processor: whatever it is, eager works
        log_eager(error)
        return _core_in_parts, _add
    log.info("compiling the loss for %s", device)
    # Each choice of terms is a graph of its own, and the jobs of a sweep share the limit.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def core_of_any_size(*tensors: Any, temperature: float) -> Tensor:
        nonlocal core
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one compilation for all numbers of rows
        try:
            return core(*tensors, temperature=temperature)
        except TorchDynamoException as error:  # in compiling, before anything has run
            log_eager(error)
            core = _core_in_parts
            return core(*tensors, temperature=temperature)

    return core_of_any_size, add
