"""Find and record the queries, keys and values of one layer, in any architecture.

They are recognised by names, or by what the layer does with them. Recorded are the outputs of the projections: rotary
positions, norms and biases that a layer applies to them afterwards are left out.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from distilkit.errors import UserError
from distilkit.language_model import Batch, num_embeddings, token_states

_NAMES = (("query", "key", "value"), ("q", "k", "v"))  # of three projections, as parts of longer names
_NUMBERED = re.compile(r"(?P<stack>(?:[^.\d][^.]*\.)+)(?P<layer>\d+)")  # a path up to its first integer
_DRAWS = 16  # in a single draw, an output may happen to change little
_ATTRIBUTE = "_distilkit_projections"


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


class Projections:
    """The projections of one layer to queries, keys and values, which ``projections_of`` keeps on the model.

    Its hooks stay, because a graph of torch.compile contains those that it found at its first call.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        """Find them, and let a short sequence show their ``widths``; a ``UserError`` says that there are none."""
        self.model, self.layer, self.active, self.stops = model, layer, False, False
        blocks = list(_blocks(model, layer))
        found = (parts for find in (_separate, _fused) for block in blocks if (parts := find(model, block)))
        self.parts: list[_Part] = next(found, [])
        self.found: list[Tensor | None] = []
        for module in dict.fromkeys(part.module for part in self.parts):
            module.register_forward_hook(self._keep)
        with _probing(model), torch.no_grad():
            states = self.read(_sequences(model, 2, 3), whole=False)[1] if self.parts else ()
        # Longformer's are (length, batch, width).
        if not states or any(each is None or each.shape[:2] != (2, 3) for each in states):
            found_none = f"layer {layer} of a {model.config.model_type} has no queries, keys and values that are known"
            cure = "set objective.alpha_rel=0, or choose another layer or model"
            raise UserError(f"objective.alpha_rel is above 0, but {found_none}; {cure}")
        self.widths = [each.shape[-1] for each in states]

    def _keep(self, module: nn.Module, __: Any, output: Any) -> None:
        if not self.active:
            return
        outputs: Tensor = output[0] if isinstance(output, tuple) else output
        for i, (of, _) in enumerate(self.parts):
            if of is module and self.found[i] is None:  # DeBERTa projects its distances after its tokens
                self.found[i] = outputs
        if self.stops and all(each is not None for each in self.found):
            raise _StopForward

    def read(self, batch: Batch, *, whole: bool) -> tuple[Tensor | None, QKV]:
        """Run the backbone on a batch, and return its ``token_states`` and the layer's queries, keys and values.

        Without ``whole`` the states are None, and the forward ends at the layer where it can: not in a compiled graph,
        nor where activations are computed again or parameters gathered.
        """
        model, states = self.model, None
        on = whole or model.base_model._compiled_call_impl is not None or model.is_activation_checkpointing
        self.stops = not on and not any(isinstance(module, FSDPModule) for module in model.modules())
        self.active, self.found = True, [None] * 3
        try:
            states = token_states(model, batch)
        except _StopForward:
            pass
        finally:
            found, self.found, self.active = self.found, [], False
        # Here, because what is computed again in backward must not have other operations than forward.
        for i, ((_, columns), outputs) in enumerate(zip(self.parts, found, strict=True)):
            if columns is not None and outputs is not None:
                found[i] = outputs.index_select(-1, columns.to(outputs.device))
        return (states if whole else None), QKV(*cast(list[Tensor], found))

    @property
    def modules(self) -> set[nn.Module]:
        """The modules of the layers below, and the projections."""
        below = {each for i in range(self.layer) for block in _blocks(self.model, i) for each in block.modules()}
        return below | {part.module for part in self.parts}

    @functools.cached_property
    def unread(self) -> set[nn.Parameter]:
        """The trainable parameters that queries, keys and values do not depend on: those after them."""
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with _probing(self.model), torch.enable_grad():
            found = self.read(_sequences(self.model, 2, 3), whole=False)[1]
            total = torch.stack([each.sum() for each in found]).sum()
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        unused = {parameter for parameter, gradient in zip(wanted, gradients, strict=True) if gradient is None}
        # Layers below may have experts that no token of this batch chose.
        return unused - {each for module in self.modules for each in module.parameters()}


def projections_of(model: PreTrainedModel, layer: int) -> Projections:
    """Return the projections of a layer, counted from 0; the first call finds them."""
    known: dict[int, Projections] = model.__dict__.setdefault(_ATTRIBUTE, {})
    if layer not in known:
        known[layer] = Projections(model, layer)
    return known[layer]


@contextlib.contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """Run a model without dropout, and without compiling it for sequences of a few tokens."""
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


def _sequences(model: PreTrainedModel, *shape: int) -> Batch:
    ids = (torch.arange(torch.Size(shape).numel(), device=model.device) + 4) % num_embeddings(model)
    return {"input_ids": ids.reshape(shape), "labels": ids.reshape(shape)}


def _blocks(model: PreTrainedModel, layer: int) -> Iterator[nn.Module]:
    """Yield the modules of a layer: the first integer in their path is its number, of as many as there are layers."""
    numbered = [(found, module) for path, module in model.named_modules() if (found := _NUMBERED.fullmatch(path))]
    stacks = [found["stack"] for found, _ in numbered]
    for found, module in numbered:
        if int(found["layer"]) == layer and stacks.count(found["stack"]) == model.config.num_hidden_layers:
            yield module


def _is_projection(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2  # also of Conv1D and of quantized ones


def _separate(model: PreTrainedModel, block: nn.Module) -> list[_Part] | None:
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
    values of a token change the output at another, its queries do not. Other projections have no such three parts.
    """
    for module in filter(_is_projection, block.modules()):
        alone, pair = (_sensitivity(model, block, module, length=length) for length in (1, 2))
        if alone is None or pair is None:
            continue
        # Rounding makes some 1e-7 of the largest, and what a part changes is a hundredth of it and more.
        values, seen, own = (each > 1e-5 * pair.max() for each in (alone[0], pair[0], pair[1]))
        kinds = own & ~seen & ~values, seen & ~values, seen & values
        queries, *others = (int(kind.sum()) for kind in kinds)
        if queries and others[0] == others[1] > 0 and queries % others[0] == 0 and queries + sum(others) == len(own):
            return [_Part(module, kind.nonzero().squeeze(1)) for kind in kinds]
    return None


@torch.enable_grad()
def _sensitivity(model: PreTrainedModel, block: nn.Module, module: nn.Module, *, length: int) -> Tensor | None:
    """Return how much each output of a projection (length, columns) changes the layer's output at the last token.

    Random outputs stand in for the projection's own, with which attention may be saturated.
    """
    generator, made, ends = torch.Generator().manual_seed(0), list[Tensor](), list[Tensor]()

    def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        made.append((torch.randn(output.shape, generator=generator) / 2).to(output).requires_grad_())
        return made[-1].clone()

    def end(_: nn.Module, __: Any, output: Any) -> None:
        ends.append(output if isinstance(output, Tensor) else output[0])
        raise _StopForward

    handles = module.register_forward_hook(replace), block.register_forward_hook(end)
    try:
        with _probing(model):
            token_states(model, _sequences(model, _DRAWS, length))
    except (_StopForward, AttributeError):  # the output of a projection is no tensor
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(made) != 1 or made[0].shape[:2] != (_DRAWS, length) or not ends or not ends[0].requires_grad:
        return None
    last = ends[0][:, -1]  # (draws, width)
    gradients = torch.autograd.grad(last, made, torch.randn(last.shape, generator=generator).to(last))
    return gradients[0].abs().sum(dim=0)
