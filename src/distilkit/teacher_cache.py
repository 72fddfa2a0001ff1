"""Which runs can read their teacher from a cache, and the teacher's pass over all blocks that fills it."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilkit.data import DistillationDataModule
from distilkit.data.batches import split_step
from distilkit.data.masking import Ids, Masking
from distilkit.data.teacher_states import TeacherStates, fill, find, identity
from distilkit.errors import UserError
from distilkit.language_model import LM, cast_parameters, token_states
from distilkit.losses import IGNORE_INDEX
from distilkit.objective import Objective
from distilkit.teacher import Teacher

_SAMPLED = 512  # blocks by which the size of a cache is estimated


def at_labelled_tokens(objective: Objective, *, masking: Masking, lm: LM) -> Objective:
    """Return the objective with soft targets and cosine at masked tokens.

    One that reads more of the teacher, and masks that do not come again, raise a ``UserError``.
    """
    if lm == "clm":
        found = "teacher_cache.epochs is for masked models, since a causal one has a label at nearly each token"
        raise UserError(f"{found}; set it to 0")
    if not objective.reads_teacher_states or "rel" in objective.weights:
        needs = (
            "alpha_rel, which reads inner layers" if "rel" in objective.weights else "no term of the teacher's states"
        )
        raise UserError(f"teacher_cache.epochs keeps last hidden states, but the objective has {needs}; set it to 0")
    if isinstance(masking.mlm_probability, list):
        found = f"data.masking.mlm_probability={masking.mlm_probability} changes over the training"
        raise UserError(f"{found}, so that masks do not come again; set one rate, or teacher_cache.epochs=0")
    if not masking.epochs:
        raise UserError("data.masking.epochs=0, but it follows teacher_cache.epochs; leave it out")
    return replace(objective, soft_targets="masked", cos_targets="masked")


def find_states(data: DistillationDataModule, teacher: Teacher | None) -> TeacherStates:
    """Open the cached states of a teacher on this text with these masks, or say in a ``UserError`` what is missing."""
    if teacher is None:
        raise UserError("teacher_cache.epochs needs a teacher, but teacher=none; choose one, or set it to 0")
    return find(_identity(data, teacher), cache_dir=data.cache_dir)


def fill_states(data: DistillationDataModule, teacher: Teacher, *, device: torch.device, bf16: bool) -> TeacherStates:
    """Run the teacher over all training blocks, for each epoch of masks, and keep its states at the labelled tokens."""
    wanted = _identity(data, teacher)
    if data.train_blocks is None:
        data.open()
    blocks = data.train_blocks
    assert blocks is not None
    model: Any = teacher.model
    model.to(device)
    if bf16 and teacher.dtype != "float32":
        cast_parameters(model, torch.bfloat16)  # as training does
    sampled = blocks[(0, np.linspace(0, len(blocks) - 1, min(len(blocks), _SAMPLED)).astype(np.int64))]["labels"]

    @torch.inference_mode()
    def compute(epoch: int, chosen: Ids) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        # Documents of like length go together, so that they have little padding.
        order = (
            np.argsort(blocks.sizes[chosen], kind="stable") if data.packing == "documents" else np.arange(len(chosen))
        )
        for begin in range(0, len(chosen), data.micro_batch_size):
            numbers = chosen[order[begin : begin + data.micro_batch_size]]
            batch: Any = split_step(blocks[(epoch, numbers)], len(numbers), trim=data.packing == "documents")[0]
            batch = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in batch.items()}
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                states = token_states(model, batch)[batch["labelled"]].to("cpu", torch.bfloat16)  # (rows, width)
            counts = (batch["labels"] != IGNORE_INDEX).sum(dim=1).tolist()  # (batch,)
            found |= dict(zip(numbers.tolist(), states.split(counts), strict=True))
        return [found[number] for number in chosen.tolist()]

    return fill(
        wanted,
        compute,
        cache_dir=data.cache_dir,
        num_blocks=len(blocks),
        labels_per_block=float((sampled != IGNORE_INDEX).sum(dim=1).float().mean()),
        width=int(model.config.hidden_size),
    )


def _identity(data: DistillationDataModule, teacher: Teacher) -> dict[str, Any]:
    names = ("masking", "seed", "block_size", "packing", "attend_across_documents")
    return identity(
        teacher_sha256=teacher.sha256, tokens=data.token_key(), **{name: getattr(data, name) for name in names}
    )
