"""Tokens per second, floating-point operations of a step, and their share of the device's peak (MFU)."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distilkit.language_model import LM, Batch
from distilkit.module import DistillationModule
from distilkit.objective import Objective, labelled_rows

_SIDE, _REPEATS = {"cpu": 768, "cuda": 8192}, 3  # of the products that measure a device


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """FLOPs of one token's forward pass; a multiply-add counts as two (Kaplan et al. 2020, section 2.1)."""

    backbone: int  # its matrices
    attention: int  # scores and values, for each key; windows and causal masks are not deducted
    head: int  # the transform and the vocabulary


def forward_cost(model: PreTrainedModel) -> ForwardCost:
    """Count the matrices of a language model, before anything shards them."""

    def matrices(module: nn.Module) -> int:
        found = {part for part in module.modules() if isinstance(part, nn.Linear | Conv1D)}
        return sum(2 * part.weight.numel() for part in found)

    backbone, config = matrices(model.base_model), model.config
    return ForwardCost(
        backbone=backbone,
        attention=4 * config.num_hidden_layers * config.hidden_size,
        head=matrices(model) - backbone,
    )


def step_flops(
    objective: Objective, student: ForwardCost, teacher: ForwardCost | None, batch: Batch, *, lm: LM
) -> float:
    """Return the FLOPs of a batch: one pass of the teacher, three of the student, whose backward counts as two.

    Padding counts. Heads count for the rows that the objective reads. Recomputation, as in activation checkpointing,
    does not count (PaLM, arXiv 2204.02311, appendix B).
    """
    tokens, length = batch["input_ids"].numel(), batch["input_ids"].shape[1]
    all_rows = objective.takes_all_rows(lm)
    rows = tokens if all_rows else len(labelled_rows(batch))
    models = [(student, 3, objective.reads_student_logits)]
    if teacher is not None and objective.reads_teacher:
        models.append((teacher, 1, objective.reads_teacher_logits))
    return float(
        sum(
            passes * (tokens * (cost.backbone + length * cost.attention) + rows * cost.head * with_head)
            for cost, passes, with_head in models
        )
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product; vendors state sparse products, or another clock rate."""
    side = _SIDE.get(device.type, 1024)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # wait for the device
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)


class Throughput(Callback):
    """Log ``throughput/tokens_per_second`` over all ranks and ``throughput/mfu``, without validation.

    The MFU is the share of the devices' measured peak that the models' own operations use.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.tokens = self.window_tokens = 0
        self.window_flops = self.peak = 0.0
        self.seconds = self.window_seconds = 0.0
        self.started: float | None = None  # None: the clock is stopped
        self.costs: tuple[ForwardCost, ForwardCost | None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count the matrices, before a strategy shards them."""
        assert isinstance(pl_module, DistillationModule)
        teacher = pl_module.teacher
        self.costs = forward_cost(pl_module.student), None if teacher is None else forward_cost(teacher)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the device's peak, and start the clock."""
        precision = str(trainer.precision)
        dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
        self.peak = peak_flops(pl_module.device, dtype) * trainer.world_size
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again if training continues."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock once the device has finished."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens, and log the rate since the last logged step."""
        tokens = batch["input_ids"].numel() * trainer.world_size
        self.tokens += tokens
        self.window_tokens += tokens
        assert isinstance(pl_module, DistillationModule)
        assert self.costs is not None
        flops = step_flops(pl_module.objective, *self.costs, batch, lm=pl_module.lm)
        self.window_flops += flops * trainer.world_size
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by one of its connectors
        if batch["is_last"] and log_every and trainer.global_step % log_every == 0:
            self._stop()
            self.started = time.perf_counter()
            rate = self.window_tokens / max(self.window_seconds, 1e-9)
            pl_module.log("throughput/tokens_per_second", rate)
            pl_module.log("throughput/mfu", self.window_flops / max(self.window_seconds, 1e-9) / self.peak)
            pl_module.shown["tokens/s"] = rate
            self.window_tokens, self.window_flops, self.window_seconds = 0, 0.0, 0.0

    def _stop(self) -> None:
        if self.started is not None:
            elapsed = time.perf_counter() - self.started
            self.seconds += elapsed
            self.window_seconds += elapsed
            self.started = None

    @property
    def tokens_per_second(self) -> float:
        """Return the average over the whole training."""
        return self.tokens / max(self.seconds, 1e-9)
