"""The vocabulary-wide terms of the objective and their gradients, without the full logits; formulas in ``losses.py``.

The rows are processed in chunks. For each chunk, two matrix products compute the logits of both models. One elementwise
function replaces the student's logits by the gradient of all terms. Two more products propagate it to the hidden states
and to the output embeddings. Backward only scales the stored gradients, so memory does not grow with the rows.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.function import once_differentiable

from distilkit.losses import Head, VocabularyLosses

log = logging.getLogger(__name__)

_LOGIT_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}  # both models; more leaves the caches, less slows the products
_MIN_ROWS = 128
_VOCABULARY_MULTIPLE = {"cpu": 1, "cuda": 128}  # tensor cores need full tiles


def fused_losses(
    student: Head,
    teacher: Head | None,
    labels: Tensor,
    *,
    soft_weights: Tensor | None = None,
    hard_weights: Tensor | None = None,
    mse_weights: Tensor | None = None,
    temperature: float = 1.0,
    logit_bytes: int | None = None,
    min_rows: int = _MIN_ROWS,
    compile_from: int = 10**7,
) -> VocabularyLosses:
    """Sum the terms of ``reference_losses``, with the same arguments, and compute their gradients chunk by chunk.

    Products use autocast's precision. Sums and weight gradients use at least float32. Only the student receives
    gradients. A chunk holds ``logit_bytes`` of logits (None: by device), but at least ``min_rows``. From
    ``compile_from`` logits on, the elementwise part is compiled: below that, compiling costs more time than it saves.
    """
    if not torch.is_grad_enabled():  # inside the function, ``needs_input_grad`` would still be true
        student = Head(*(tensor if tensor is None else tensor.detach() for tensor in student))  # type: ignore[arg-type]
    row_weights, limits = (soft_weights, hard_weights, mse_weights), (logit_bytes, min_rows, compile_from)
    return VocabularyLosses(*_Fused.apply(*student, teacher, labels, row_weights, temperature, limits))


class _Projection:
    """A model's output embeddings in the products' precision, and a buffer for the logits of one chunk."""

    def __init__(self, head: Head, *, vocabulary: int, dtype: torch.dtype, rows: int) -> None:
        padded = vocabulary + -vocabulary % _VOCABULARY_MULTIPLE.get(head.features.device.type, 1)
        self.features = head.features.to(dtype)  # (all rows, width)
        self.weight = _cast_rows(head.weight, vocabulary, padded, dtype)  # (padded, width)
        self.bias = None if head.bias is None else _cast_rows(head.bias, vocabulary, padded, dtype)  # (padded,)
        self.buffer = self.weight.new_empty(rows, padded)

    def logits(self, chunk: slice) -> Tensor:
        """Return the logits (rows, padded) of a chunk, valid until the next call."""
        features = self.features[chunk]
        out = self.buffer[: len(features)]
        if self.bias is None:
            return torch.mm(features, self.weight.t(), out=out)
        return torch.addmm(self.bias, features, self.weight.t(), out=out)


def _cast_rows(tensor: Tensor, rows: int, padded: int, dtype: torch.dtype) -> Tensor:
    """Cast the first rows and append zeros up to ``padded`` rows, with at most one copy, which frozen embeddings keep."""
    if rows == padded and tensor.dtype == dtype:
        return tensor[:rows]
    frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    state = (tensor.data_ptr(), tensor._version, rows, padded, dtype) if frozen else None
    if frozen and getattr(tensor, "_distilkit_cast", (None,))[0] == state:
        return cast(Tensor, tensor._distilkit_cast[1])  # type: ignore[attr-defined]
    result = torch.empty(padded, *tensor.shape[1:], dtype=dtype, device=tensor.device)
    result[:rows] = tensor[:rows]
    result[rows:] = 0
    if frozen:
        tensor._distilkit_cast = state, result  # type: ignore[attr-defined]
    return result


class _Fused(torch.autograd.Function):
    """Compute the gradient in forward, while the logits exist, and scale it in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,  # (rows, width)
        weight: Tensor,  # (vocabulary, width)
        bias: Tensor | None,  # (vocabulary,)
        teacher: Head | None,  # in a tuple, which autograd does not look into
        labels: Tensor,  # (rows,)
        row_weights: tuple[Tensor | None, ...],  # three times (rows,)
        temperature: float,
        limits: tuple[int | None, int, int],
    ) -> tuple[Tensor, ...]:
        device, rows, (logit_bytes, min_rows, compile_from) = features.device.type, len(features), limits
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
        exact = torch.promote_types(features.dtype, torch.float32)
        models = [Head(features, weight, bias), *([] if teacher is None else [teacher])]
        vocabulary = min(len(model.weight) for model in models)
        budget = _LOGIT_BYTES.get(device, _LOGIT_BYTES["cuda"]) if logit_bytes is None else logit_bytes
        most = max(min_rows, budget // (vocabulary * dtype.itemsize * len(models)))
        # Chunks of equal size: each new size costs a new memory plan.
        per_chunk = max(1, math.ceil(rows / max(1, math.ceil(rows / most))))

        wanted = ctx.needs_input_grad[:3]
        to_features = torch.empty_like(features, dtype=exact) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        to_bias = torch.zeros_like(bias, dtype=exact) if wanted[2] and bias is not None else None
        # 1. Row weights are alphas over token counts, and the logits' gradient may be in half precision, where they
        #    underflow. So each chunk uses weights of at most 1, and backward multiplies by ``unit``.
        unit = features.new_ones((), dtype=exact)
        if rows:
            unit = torch.stack([weights.amax() for weights in row_weights if weights is not None]).amax().to(exact)
            unit = torch.where(unit > 0, unit, 1)
        relative = [None if weights is None else weights.to(exact) / unit for weights in row_weights]
        core, add = _elementwise(device) if rows * vocabulary >= compile_from else (_core_in_parts, _add)
        sums = features.new_zeros(3, dtype=exact)
        with torch.autocast(device, enabled=False):
            heads = [_Projection(model, vocabulary=vocabulary, dtype=dtype, rows=per_chunk) for model in models]
            for begin in range(0, rows, per_chunk):
                chunk = slice(begin, begin + per_chunk)
                logits, *targets = [head.logits(chunk) for head in heads]  # (chunk, padded) each
                sums += core(
                    logits[:, :vocabulary],
                    targets[0][:, :vocabulary] if targets else None,
                    labels[chunk],
                    *[None if weights is None else weights[chunk] for weights in relative],
                    temperature=temperature,
                )
                # 2. The core has overwritten the logits. Padded columns are cleared because the products read them.
                gradient = logits
                gradient[:, vocabulary:] = 0
                if to_features is not None:
                    to_features[chunk] = gradient @ heads[0].weight  # (chunk, padded) @ (padded, width)
                # 3. Chunks are summed in ``exact``: half precision would lose the small ones.
                if to_weight is not None:
                    if dtype == exact:
                        to_weight[:vocabulary].addmm_(gradient[:, :vocabulary].t(), heads[0].features[chunk])
                    else:
                        add(to_weight[:vocabulary], (gradient.t() @ heads[0].features[chunk])[:vocabulary])
                if to_bias is not None:  # on CPU, a product with ones is ten times as fast as a sum over rows
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
        # In place, unless backward may run again: the gradient of the embeddings is as large as the embeddings.
        times = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        return (*(None if gradient is None else times(gradient, scale) for gradient in gradients), *[None] * 5)


def _core(
    student: Tensor, teacher: Tensor | None, labels: Tensor, *row_weights: Tensor | None, temperature: float
) -> Tensor:
    """Replace the student's logits (rows, vocabulary) by their gradient, and return the three weighted sums (3,).

    Compiled, it reads the logits three times: for maxima, for sums of powers, and for the gradient. Powers are computed
    again in the third pass, because to store and read them takes longer.
    """
    soft_weights, hard_weights, mse_weights = row_weights  # (rows,) each
    logits = student.to(torch.promote_types(student.dtype, torch.float32))
    top = logits.amax(dim=-1, keepdim=True)  # (rows, 1), as all sums over the vocabulary here
    gradient = torch.zeros_like(logits)
    soft = hard = mse = logits.new_zeros(())
    if teacher is not None:
        targets = teacher.to(logits.dtype)
        if soft_weights is not None:
            weights = soft_weights[:, None]
            ours, total = _powers(logits / temperature, top / temperature)
            theirs, their_total = _powers(targets / temperature, targets.amax(dim=-1, keepdim=True) / temperature)
            # KL(p || q) = sum p (log p - log q), of logarithms without their common log-sums.
            apart = (theirs.exp() * (theirs - ours)).sum(dim=-1, keepdim=True) / their_total.exp()
            soft = (weights * (apart + total - their_total)).sum() * temperature**2
            # d/dz of T^2 KL(p || softmax(z / T)) = T (q - p)
            gradient = gradient + weights * temperature * ((ours - total).exp() - (theirs - their_total).exp())
        if mse_weights is not None:
            difference = logits - targets
            mse = (mse_weights * difference.square().sum(dim=-1)).sum()
            gradient = gradient + 2 * mse_weights[:, None] * difference
    if hard_weights is not None:
        labels = labels[:, None]
        weights = torch.where(labels >= 0, hard_weights[:, None], 0)
        shifted, total = _powers(logits, top)
        hard = (weights * torch.where(labels >= 0, total - shifted.gather(1, labels.clamp(min=0)), 0)).sum()
        # A comparison, not a scatter, which would end the fused kernel.
        is_label = torch.arange(logits.shape[1], device=logits.device) == labels  # (rows, vocabulary)
        gradient = gradient + weights * ((shifted - total).exp() - is_label.to(logits.dtype))
    student.copy_(gradient)
    return torch.stack([soft, hard, mse])


def _powers(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits below their maximum (rows, vocabulary), and the logarithm of the sum of their powers (rows, 1)."""
    shifted = logits - top
    return shifted, shifted.exp().sum(dim=-1, keepdim=True).log()


def _core_in_parts(student: Tensor, *others: Tensor | None, temperature: float, min_rows: int = _MIN_ROWS) -> Tensor:
    """Run the eager core on an eighth of the rows at a time, because it holds eight float32 copies of them."""
    size = max(min_rows, math.ceil(len(student) / 8))
    parts = (itertools.repeat(None) if tensor is None else tensor.split(size) for tensor in others)
    sums = [_core(*part, temperature=temperature) for part in zip(student.split(size), *parts, strict=False)]
    return torch.stack(sums).sum(dim=0)


def _add(total: Tensor, part: Tensor) -> None:
    """Add in the precision of ``total``."""
    total.add_(part)


def _log_eager(error: Exception) -> None:
    log.info("the loss runs without torch.compile: %s", str(error).partition("\n")[0])


@functools.cache
def _elementwise(device: str) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """Compile the elementwise parts, or return the eager ones if this machine cannot compile; log which."""
    core: Callable[..., Tensor] = torch.compile(_core)
    add = torch.compile(_add)
    try:
        add(torch.zeros(2, 2, device=device), torch.zeros(2, 2, device=device, dtype=torch.bfloat16))
    except Exception as error:  # no compiler, no Triton or an unknown processor; eager always works
        _log_eager(error)
        return _core_in_parts, _add
    log.info("compiling the loss for %s", device)

    def core_of_any_size(*tensors: Any, temperature: float) -> Tensor:
        nonlocal core
        for tensor in filter(torch.is_tensor, tensors):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one compilation for all numbers of rows
        # Each choice of terms is a separate graph, and the jobs of a sweep share them. Threads have a limit of their own.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        try:
            return core(*tensors, temperature=temperature)
        except TorchDynamoException as error:  # raised by the compiler, before anything has run
            _log_eager(error)
            core = _core_in_parts
            return core(*tensors, temperature=temperature)

    return core_of_any_size, add
