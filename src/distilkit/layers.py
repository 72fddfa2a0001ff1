"""Choose by measurement which layers of a teacher a student keeps.

The teacher is measured on blocks of its student's training text. Nothing is selected on the scored split, and no cut
teacher has been trained on these blocks, so that they favour none.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distilkit import losses
from distilkit.errors import UserError
from distilkit.language_model import Batch, lm_head, token_states
from distilkit.objective import labelled_rows, real_rows

log = logging.getLogger(__name__)

Method = Literal["greedy", "influence"]
METHODS: tuple[Method, ...] = get_args(Method)
Check = Callable[..., object]  # of layers; raises a UserError where no student has them
Seen = dict[int, tuple[Tensor, Any]]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layers that a student keeps, and the measurement that chose them.

    ``evaluations`` are those of the search. ``table`` of ``greedy`` has a row for each step: the layer dropped, the
    ``loss`` without it and all before it, in nats per labelled token and without training, and those of all
    ``candidates``. Step 0 is the teacher, and the last row the layers ``even``. ``influence`` has a row for each layer.
    """

    method: str
    layers: list[int]
    num_blocks: int
    evaluations: int
    table: list[dict[str, Any]]


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list that holds a backbone's layers; a model with none or several raises a ``UserError``."""
    depth = model.config.num_hidden_layers
    modules = model.base_model.named_modules()
    lists = [(name, each) for name, each in modules if isinstance(each, nn.ModuleList) and len(each) == depth]
    top = min((name.count(".") for name, _ in lists), default=0)
    stacks = [each for name, each in lists if name.count(".") == top]
    if len(stacks) != 1:
        found = f"model type {model.config.model_type!r} has {len(stacks)} stacks of {depth} layers"
        raise UserError(f"{found}, so that none can be left out; choose another teacher, or set student=new")
    return stacks[0]


def _in_form(output: Any, state: Any) -> Any:
    """Put a state in the place of the one in a layer's output."""
    if isinstance(output, dict):
        return {**output, next(iter(output)): state}
    return type(output)([state, *output[1:]]) if isinstance(output, tuple | list) else state


@contextmanager
def without_layers(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[Seen]:
    """Let all layers but ``kept`` return what they are given, so that the others keep their numbers and masks.

    Yields by number what each layer was given and returned in the last forward.
    """
    seen: Seen = {}

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, index: int) -> Any:
        seen[index] = args[0] if args else kwargs["hidden_states"], output
        return output if index in kept else _in_form(output, seen[index][0])

    hooks = [
        layer.register_forward_hook(functools.partial(watch, index=index), with_kwargs=True)
        for index, layer in enumerate(layer_stack(model))
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _going_on_after(layer: int, model: PreTrainedModel, *, kept: Sequence[int], seen: Seen) -> Iterator[None]:
    """Let a forward go on with what ``layer`` was given, and compute only those of ``kept`` that come after it."""

    def stand_in(*args: Any, index: int, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return _in_form(seen[index][1], seen[layer][0] if index <= layer else given)

    skipped = [(index, each) for index, each in enumerate(layer_stack(model)) if index <= layer or index not in kept]
    for index, each in skipped:
        each.forward = functools.partial(stand_in, index=index)
    try:
        yield
    finally:
        for _, each in skipped:
            del each.forward


def _nll(model: PreTrainedModel, batch: Batch) -> float:
    """Return the summed cross-entropy of a batch's labelled tokens, in nats."""
    rows = labelled_rows(batch)
    if not len(rows):
        return 0.0
    nll, _ = losses.score(lm_head(model, token_states(model, batch)[rows]), batch["labels"].flatten()[rows])
    return float(nll.cpu().double().sum())


def _measured(of: Callable[..., Any]) -> Callable[..., Any]:
    """Run the model on the device of the batches, and bring it home, where it can be cut."""

    @functools.wraps(of)
    def moved(model: PreTrainedModel, batches: Sequence[Batch], *kept: Sequence[int]) -> Any:
        home = model.device
        try:
            return of(model.eval().to(batches[0]["input_ids"].device), batches, *kept)
        finally:
            model.to(home)  # type: ignore[arg-type]  # transformers hides this form

    return torch.no_grad()(moved)


@_measured
def loss_of(model: PreTrainedModel, batches: Sequence[Batch], kept: Sequence[int]) -> float:
    """Return the cross-entropy of a model with these layers alone, in nats per labelled token."""
    with without_layers(model, kept):
        return sum(_nll(model, batch) for batch in batches) / max(1, sum(len(labelled_rows(each)) for each in batches))


@_measured
def losses_without(model: PreTrainedModel, batches: Sequence[Batch], kept: Sequence[int]) -> dict[int, float]:
    """Return the cross-entropy of ``kept`` but one layer, for each; layers before it are computed once for all."""
    sums, count = dict.fromkeys(kept, 0.0), max(1, sum(len(labelled_rows(batch)) for batch in batches))
    for batch in batches:
        with without_layers(model, kept) as seen:
            token_states(model, batch)
        for layer in kept:
            with _going_on_after(layer, model, kept=kept, seen=seen):
                sums[layer] += _nll(model, batch) / count
    return sums


@_measured
def influences(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[int, float]:
    """Return each layer's mean of 1 - cosine(input, output) over real tokens (ShortGPT, arXiv 2403.03853, section 3)."""
    sums, tokens = dict.fromkeys(range(model.config.num_hidden_layers), 0.0), 0
    for batch in batches:
        with without_layers(model, list(sums)) as seen:
            token_states(model, batch)
        real = real_rows(batch)
        for layer, (given, output) in seen.items():
            returned = next(iter(output.values())) if isinstance(output, dict) else output
            pair = given, returned[0] if isinstance(returned, tuple | list) else returned  # (batch, length, width)
            states = (each.flatten(0, 1)[slice(None) if real is None else real] for each in pair)
            sums[layer] += float(losses.hidden_cosine(*states).cpu().double().sum())
        tokens += batch["input_ids"].numel() if real is None else len(real)
    return {layer: total / tokens for layer, total in sums.items()}


def _refusal(check: Check, layers: list[int]) -> str:
    try:
        check(layers=layers)
    except UserError as error:
        return str(error)
    return ""


def _drop(kept: list[int], scores: Mapping[int, float], check: Check) -> int:
    """Remove the layer of the lowest score without which a student can be built, of equal ones the last."""
    for layer in sorted(kept, key=lambda each: (not math.isfinite(scores[each]), scores[each], -each)):
        if not (reason := _refusal(check, [each for each in kept if each != layer])):
            kept.remove(layer)
            return layer
    raise UserError(f"none of layers {kept} can be dropped: {reason}; set student.layers=first, or give a list")


def drop_greedily(
    *, depth: int, even: list[int], loss_of: Callable[..., float], losses_without: Callable[..., Any], check: Check
) -> tuple[list[int], list[dict[str, Any]]]:
    """Drop the layer whose absence raises the loss least, until as many are left as in ``even``; return the table, too.

    Such a search may end worse than at ``even``, the layers at equal distances. Then it returns those.
    """
    kept = list(range(depth))
    table: list[dict[str, Any]] = [{"step": 0, "dropped": None, "loss": loss_of(kept)}]
    while len(kept) > len(even):
        candidates = losses_without(kept)
        dropped = _drop(kept, candidates, check)
        table.append({"step": len(table), "dropped": dropped, "loss": candidates[dropped], "candidates": candidates})
        log.info("layer %d dropped, %d left: %.4f nats per labelled token", dropped, len(kept), candidates[dropped])
    if kept != even and not _refusal(check, even):
        loss, found = loss_of(even), table[-1]["loss"]
        table.append({"step": "even", "layers": even, "loss": loss, "taken": loss < found})
        kept = even if loss < found else kept
    return kept, table


def measure(
    model: PreTrainedModel, batches: Sequence[Batch], *, method: Method, even: list[int], check: Check
) -> Choice:
    """Choose as many layers of a model as ``even`` has, on the device of the batches; ``check(layers=)`` refuses a cut.

    The cost is logged before. A loss that is not finite raises a ``UserError``.
    """
    depth, sizes = model.config.num_hidden_layers, [batch["input_ids"].numel() for batch in batches]
    num_blocks = sum(len(batch["input_ids"]) for batch in batches)
    evaluations = sum(range(len(even) + 1, depth + 1)) if method == "greedy" else 1
    passes = evaluations + (depth - len(even) + 2 if method == "greedy" else 0)
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        loss_of(model, [batches[sizes.index(max(sizes))]], range(depth))
    minutes = (time.perf_counter() - started) * sum(sizes) / max(sizes) * passes / 60
    cost = f"{evaluations} evaluation{'s' * (evaluations != 1)} of {num_blocks} blocks, at most about {minutes:.1f} minutes"
    log.info("student.layers=%s: %s", method, cost)
    if method == "greedy":
        one, each = (functools.partial(measured, model, batches) for measured in (loss_of, losses_without))
        layers, table = drop_greedily(depth=depth, even=even, loss_of=one, losses_without=each, check=check)
        if not all(math.isfinite(row["loss"]) for row in table):
            raise UserError("the loss of the cut teacher is not finite; set trainer.precision=32-true")
    else:
        scores, layers = influences(model, batches), list(range(depth))
        while len(layers) > len(even):
            _drop(layers, scores, check)
        table = [{"layer": layer, "influence": scores[layer], "kept": layer in layers} for layer in scores]
    return Choice(method=method, layers=layers, num_blocks=num_blocks, evaluations=evaluations, table=table)
