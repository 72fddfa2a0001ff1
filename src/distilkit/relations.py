"""Relations between tokens in one layer's queries, keys and values, as MiniLMv2 distils them (arXiv 2012.15828).

A relation is the softmax of the scaled products of all pairs of queries, or of keys, or of values. It has the shape of
attention, so a student of any width, depth and number of heads can learn it. Recorded are the outputs of the layer's
projections. Rotary positions and norms of queries and keys come after them, and the paper's models have neither.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from distilkit.attention import dense_mask
from distilkit.errors import UserError
from distilkit.language_model import Batch, num_embeddings, token_states

_CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 2**28}  # of one float32 matrix of relations; some ten live at a time
_NAMES = (("query", "key", "value"), ("q", "k", "v"))  # of three projections, as parts of longer names
_NUMBERED = re.compile(r"(?P<stack>(?:[^.\d][^.]*\.)+)(?P<layer>\d+)")  # a path up to its first integer
_DRAWS = 16  # in a single draw, an output may happen to change little
_ATTRIBUTE = "_distilkit_relations"


class QKV(NamedTuple):
    """Queries, keys and values of all heads of a layer, (batch, length, width) each; widths may differ."""

    query: Tensor
    key: Tensor
    value: Tensor


class _StopForward(BaseException):
    """Ends a forward whose further layers nobody reads; like ``GeneratorExit``, it is no error."""


class _Part(NamedTuple):
    module: nn.Module  # a projection
    columns: Tensor | None  # (width,), which of its outputs; None: all


class _Reader:
    """Keep the projections of one layer while its model runs.

    The hooks stay on the model, because a graph of torch.compile contains those that it found at its first call.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = list(parts)
        self.active = self.stops = False
        self.found: list[Tensor | None] = [None] * len(self.parts)
        for module in dict.fromkeys(part.module for part in parts):
            module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, _: Any, output: Any) -> None:
        if not self.active:
            return
        outputs: Tensor = output[0] if isinstance(output, tuple) else output
        for i, (of, columns) in enumerate(self.parts):
            if of is module and self.found[i] is None:  # DeBERTa projects its distances after its tokens
                if columns is not None and columns.device != outputs.device:
                    columns = columns.to(outputs.device)
                    self.parts[i] = _Part(of, columns)
                self.found[i] = outputs if columns is None else outputs.index_select(-1, columns)
        if self.stops and all(each is not None for each in self.found):
            raise _StopForward


def read(model: PreTrainedModel, batch: Batch, *, layer: int, whole: bool) -> tuple[Tensor | None, QKV]:
    """Run the backbone on a batch, and return its ``token_states`` and the queries, keys and values of ``layer``.

    Without ``whole`` the states are None, and the forward ends at the layer where it can: not in a compiled graph, nor
    where activations are computed again or parameters gathered.
    """
    reader, states = _reader(model, layer), None
    reader.active, reader.stops = True, not whole and _can_stop(model)
    try:
        states = token_states(model, batch)
    except _StopForward:
        pass
    finally:
        found, reader.found, reader.active = reader.found, [None] * 3, False
    return (states if whole else None), QKV(*cast(list[Tensor], found))


def _can_stop(model: PreTrainedModel) -> bool:
    sharded = any("_fsdp" in name for name, _ in model.named_modules())
    compiled = model.base_model._compiled_call_impl is not None and not torch.compiler.is_dynamo_compiling()
    return not (sharded or compiled or model.is_activation_checkpointing)


def _probe_batch(model: PreTrainedModel, *shape: int) -> Batch:
    ids = (torch.arange(torch.Size(shape).numel(), device=model.device) + 4) % num_embeddings(model)
    return {"input_ids": ids.reshape(shape), "labels": ids.reshape(shape)}


def _reader(model: PreTrainedModel, layer: int) -> _Reader:
    """Return the reader of a layer, which the model keeps."""
    readers: dict[int, _Reader] = model.__dict__.setdefault(_ATTRIBUTE, {})
    if layer not in readers:
        blocks = list(_blocks(model, layer))
        parts = next((found for block in blocks if (found := _separate(block))), None)
        parts = parts or next((found for block in blocks if (found := _fused(model, block))), None)
        if parts is None:
            raise UserError(_unknown(model, layer))
        readers[layer] = _Reader(parts)
    return readers[layer]


def _unknown(model: PreTrainedModel, layer: int) -> str:
    found = f"layer {layer} of a {model.config.model_type} has no queries, keys and values that are recognised"
    return f"objective.alpha_rel is above 0, but {found}; set objective.alpha_rel=0, or choose another layer or model"


def _blocks(model: PreTrainedModel, layer: int) -> Iterator[nn.Module]:
    """Yield the modules of a layer: the first integer in their path is its number, of as many as there are layers."""
    numbered = [(found, module) for path, module in model.named_modules() if (found := _NUMBERED.fullmatch(path))]
    stacks = [found["stack"] for found, _ in numbered]
    for found, module in numbered:
        if int(found["layer"]) == layer and stacks.count(found["stack"]) == model.config.num_hidden_layers:
            yield module


def _is_projection(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2  # also of Conv1D and of quantized ones


def _separate(block: nn.Module) -> list[_Part] | None:
    """Find three projections in one module whose names differ in query, key and value, or q, k and v."""
    for parent in block.modules():
        children = {name: child for name, child in parent.named_children() if _is_projection(child)}
        for name in children:
            for of_query, *others in _NAMES:
                names = [name, *(name.replace(of_query, other, 1) for other in others)]
                if len(set(names)) == 3 and children.keys() >= set(names):
                    return [_Part(children[each], None) for each in names]
    return None


def _fused(model: PreTrainedModel, block: nn.Module) -> list[_Part] | None:
    """Find a projection whose outputs are queries, keys and values in any order, by what the layer does with them.

    With a single token, attention is 1 whatever queries and keys are: only values change the layer's output. Keys and
    values of a token change the output at another, its queries do not. Random outputs stand in for the projection's,
    so that no attention is saturated. A projection of something else has no such three parts.
    """
    for module in filter(_is_projection, block.modules()):
        alone, pair = (_sensitivity(model, block, module, length=length) for length in (1, 2))
        if alone is None or pair is None:
            continue
        values, seen, own = (each > 1e-5 * pair.max() for each in (alone[0], pair[0], pair[1]))
        kinds = own & ~seen & ~values, seen & ~values, seen & values
        sizes = [int(kind.sum()) for kind in kinds]
        if sizes[1] == sizes[2] > 0 and sizes[0] and sizes[0] % sizes[1] == 0 and sum(sizes) == len(values):
            return [_Part(module, kind.nonzero().squeeze(1)) for kind in kinds]
    return None


@torch.enable_grad()
def _sensitivity(model: PreTrainedModel, block: nn.Module, module: nn.Module, *, length: int) -> Tensor | None:
    """Return how much each output of a projection (length, columns) changes the layer's output at the last token."""
    generator, made, ends = torch.Generator().manual_seed(0), [], []

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        made.append((torch.randn(output.shape, generator=generator) / 2).to(output).requires_grad_())
        return made[-1].clone()

    def end(_: nn.Module, __: Any, output: Any) -> None:
        ends.append(output if isinstance(output, Tensor) else output[0])
        raise _StopForward

    handles = module.register_forward_hook(replace), block.register_forward_hook(end)
    training = model.training
    try:
        with torch.compiler.set_stance("force_eager"):
            token_states(model.eval(), _probe_batch(model, _DRAWS, length))
    except (_StopForward, AttributeError):  # a projection whose output is no tensor
        pass
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if len(made) != 1 or made[0].shape[:2] != (_DRAWS, length) or not ends or not ends[0].requires_grad:
        return None
    last = ends[0][:, -1]  # (draws, width)
    (gradient,) = torch.autograd.grad(last, made, torch.randn(last.shape, generator=generator).to(last))
    return cast(Tensor, gradient).abs().sum(dim=0)


def widths(model: PreTrainedModel, layer: int) -> tuple[int, int, int]:
    """Return the widths of queries, keys and values of a layer, or refuse a model in which they are not found."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = read(model, _probe_batch(model, 2, 3), layer=layer, whole=False)[1]
    if any(each is None or each.shape[:-1] != (2, 3) for each in found):  # Longformer puts the length first
        raise UserError(_unknown(model, layer))
    return found.query.shape[-1], found.key.shape[-1], found.value.shape[-1]


def unread(model: PreTrainedModel, layer: int) -> set[nn.Parameter]:
    """Return the parameters that queries, keys and values of a layer do not depend on: those after them."""
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        found = read(model, _probe_batch(model, 2, 3), layer=layer, whole=False)[1]
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        total = torch.stack([each.sum() for each in found]).sum()
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    unused = {parameter for parameter, gradient in zip(wanted, gradients, strict=True) if gradient is None}
    # A layer before it may have experts that no token of this batch chose.
    return unused - {each for below in range(layer) for block in _blocks(model, below) for each in block.parameters()}


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
                mask = dense_mask(of, length=length, causal=causal, reach=length, device=device)[:, 0]
                weight = weights[batch].to(exact)[..., None] / heads  # (pairs, length, 1)
                log_q, log_p = (_log_relation(each[part], mask) for each in (ours, theirs))
                p = log_p.exp()
                total += (weight * p * (log_p - log_q).masked_fill_(~mask, 0)).sum()
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


def _log_relation(states: Tensor, mask: Tensor) -> Tensor:
    """Return the logarithm of the relation (pairs, length, length) of (pairs, length, d); -inf outside the mask."""
    scores = states @ states.mT / states.shape[-1] ** 0.5
    return F.log_softmax(scores.masked_fill_(~mask, -torch.inf), dim=-1)
