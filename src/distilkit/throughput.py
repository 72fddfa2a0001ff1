"""What a training step must compute, in floating-point operations, and what the device can: their ratio is the MFU."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distilkit.language_model import Task
from distilkit.objective import Batch, Objective, labelled_rows

_SIDE, _REPEATS = {"cpu": 768, "cuda": 8192}, 3  # of the products that measure a device


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """FLOPs of one token's forward pass; a multiplication and an addition are two (Kaplan et al. 2020, section 2.1)."""

    backbone: int  # its matrices
    attention: int  # scores and values, for each key; windows and causality are not deducted
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
    objective: Objective, student: ForwardCost, teacher: ForwardCost | None, batch: Batch, *, task: Task
) -> float:
    """Return the FLOPs that a batch needs: one pass of the teacher, three of the student, whose backward is two.

    Padding counts, and so do the heads of those rows alone that the objective reads; what is computed again, as with
    activation checkpointing, does not (PaLM, arXiv 2204.02311, appendix B).
    """
    tokens, length = batch["input_ids"].numel(), batch["input_ids"].shape[1]
    all_rows = objective.takes_all_rows(task)
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
    """Measure the FLOP/s of a large matrix product; makers' figures are those of sparse products, or of another clock."""
    side = _SIDE.get(device.type, 1024)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # wait for the device
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)
