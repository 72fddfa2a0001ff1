"""Tokens per second, floating-point operations (FLOPs) of a step, and model FLOPs utilization (MFU)."""

import timeit
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from distilkit.language_model import LM, Batch, matrix_flops
from distilkit.module import DistillationModule
from distilkit.objective import Objective, labelled_rows
from distilkit.projections import projections_of
from distilkit.records import peak_memory_mb

_SIDE, _REPEATS = {"cpu": 768, "cuda": 8192}, 3  # of the matrix products in ``peak_flops``


@dataclass(frozen=True, kw_only=True)
class _ForwardCost:
    """FLOPs of one token's forward pass; a multiply-add counts as two (Kaplan et al. 2020, section 2.1)."""

    backbone: int  # matrix products
    attention: int  # scores and values, for each key, without a discount for windows and causal masks
    head: int  # transform and output embeddings
    short: tuple[int, int] = (0, 0)  # backbone and attention up to the layer whose relations are read
    relations: int = 0  # products of queries, of keys and of values, for each other token


def forward_cost(model: PreTrainedModel, layer: int | None = None) -> _ForwardCost:
    """Count the FLOPs of a language model from its matrices, before a strategy shards them.

    ``layer`` is the one whose relations are read, if any.
    """
    backbone, width = matrix_flops(model.base_model.modules()), model.config.hidden_size
    cost = _ForwardCost(
        backbone=backbone,
        attention=4 * model.config.num_hidden_layers * width,
        head=matrix_flops(model.modules()) - backbone,
    )
    if layer is None:
        return cost
    read = projections_of(model, layer)
    return replace(cost, short=(matrix_flops(read.modules), 4 * layer * width), relations=2 * sum(read.widths))


def step_flops(
    objective: Objective, student: _ForwardCost, teacher: _ForwardCost | None, batch: Batch, *, lm: LM
) -> float:
    """Return the FLOPs of a batch: one pass of the teacher, and three of the student, whose backward counts as two.

    Padding counts, heads for the rows that the objective reads, recomputation never (PaLM, arXiv 2204.02311, B).
    """
    tokens, length = batch["input_ids"].numel(), batch["input_ids"].shape[1]
    rows = tokens if objective.takes_all_rows(lm) else len(labelled_rows(batch))
    models = [(student, 3, objective.reads_student_states, objective.reads_student_logits)]
    if teacher is not None and objective.reads_teacher:
        models.append((teacher, 1, objective.reads_teacher_states, objective.reads_teacher_logits))
    total = 0
    for cost, passes, whole, with_head in models:
        backbone, attention = (cost.backbone, cost.attention) if whole else cost.short
        # The cache, or another student of this process, has what its layers would compute.
        if cost is teacher and ("teacher_states" in batch or batch.get("teacher_is_read")):
            backbone, attention = 0, 0
        total += passes * (tokens * (backbone + length * attention) + rows * cost.head * with_head)
        if "rel" in objective.weights:  # backward has one product, for both rows of a pair
            total += (1 if passes == 1 else 2) * tokens * length * cost.relations
    return float(total)


def dtype_of(precision: str) -> torch.dtype:
    """Return the type in which the products of a trainer's precision are computed."""
    return torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product, because data sheets assume sparse products or other clock rates."""
    side = _SIDE.get(device.type, 1024)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    # ``item`` waits for the device.
    seconds = timeit.repeat(lambda: (left @ right)[0, 0].item(), number=1, repeat=_REPEATS)
    return 2.0 * side**3 / min(seconds)


class Throughput(Callback):
    """Log rates and memory: tokens/s over all ranks, the MFU, and this process's peak of memory in megabytes.

    The MFU is a share of the devices' measured peak. Both rates leave out validation.
    """

    def __init__(self) -> None:
        """Start from zero."""
        self.window_start = 0  # the module's tokens when the window began
        self.window_flops = self.peak = 0.0
        self.window_began = 0.0  # on the module's clock
        self.costs: tuple[_ForwardCost, _ForwardCost | None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count the FLOPs of the models, before a strategy shards them."""
        assert isinstance(pl_module, DistillationModule)
        student, teacher, objective = pl_module.student, pl_module.teacher, pl_module.objective
        ours, theirs = cast(tuple[Any, Any], (None, None))
        if teacher is not None and "rel" in objective.weights:
            ours, theirs = objective.relation_layers(student, teacher)
        self.costs = forward_cost(student, ours), None if teacher is None else forward_cost(teacher, theirs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the peak of the device, and begin a window."""
        self.peak = peak_flops(pl_module.device, dtype_of(str(trainer.precision))) * trainer.world_size
        if pl_module.device.type == "cuda":  # the matrices of this measurement are none of the training's memory
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        assert isinstance(pl_module, DistillationModule)
        self.window_start, self.window_began = pl_module.tokens_seen, pl_module.clock.wall

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count operations, and log the rates since the last logged step."""
        assert isinstance(pl_module, DistillationModule)
        assert self.costs is not None
        flops = step_flops(pl_module.step_objective, *self.costs, batch, lm=pl_module.lm)
        self.window_flops += flops * trainer.world_size
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by one of its connectors
        if batch["is_last"] and log_every and trainer.global_step % log_every == 0:
            tokens, now = pl_module.tokens_seen, pl_module.clock.wall
            seconds = max(now - self.window_began, 1e-9)
            rate = (tokens - self.window_start) / seconds
            pl_module.log("throughput/tokens_per_second", rate)
            pl_module.log("throughput/mfu", self.window_flops / seconds / self.peak)
            peaks = peak_memory_mb(pl_module.device)
            pl_module.log_dict({f"memory/{name}_peak_mb": peak for name, peak in peaks.items()} | pl_module.axes())
            pl_module.shown["tokens/s"] = rate
            self.window_start, self.window_flops, self.window_began = tokens, 0.0, now

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log tokens and hours beside the held-out scores; the module does so before the first step."""
        assert isinstance(pl_module, DistillationModule)
        if not trainer.sanity_checking:
            pl_module.log_dict(pl_module.axes())
