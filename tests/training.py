"""Train a tiny student on any number of processes, and compare two such trainings."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from distilkit.callbacks import ValidateEvery
from distilkit.data import DistillationDataModule
from distilkit.data.masking import Masking
from distilkit.language_model import checkpoint_activations, compile_backbone
from distilkit.losses import IGNORE_INDEX
from distilkit.module import DistillationModule
from distilkit.sharding import FullyShardedStrategy
from distilkit.student import cut_student
from processes import on_ranks
from tiny import Texts, build_objective, build_teacher

MASKING = Masking(mlm_probability=0.3, whole_word=False, smoothing=0.0, mask_share=0.8, random_share=0.1)
NO_DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "modernbert": {},
}
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, eps=1e-6)
BERTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Seen(Callback):
    """Keep the loss of each optimizer step, and the sequences of it that this rank reads and counts, without masks."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps: list[Counter[tuple[int, ...]]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch["is_first"]:
            self.steps.append(Counter())
        ids, labels = batch["input_ids"], batch["labels"]
        if pl_module.lm == "mlm":
            ids = labels.where(labels != IGNORE_INDEX, ids)
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        counted = ~batch.get("left_out", torch.zeros(len(ids), dtype=torch.bool))
        self.steps[-1].update(tuple(row[mask].tolist()) for row, mask in zip(ids[counted], real[counted], strict=True))
        if batch["is_last"]:
            self.losses.append(pl_module.shown["train/loss"])  # type: ignore[index, operator]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training left: by optimizer step its losses and what it read, and what its checkpoint holds."""

    losses: list[float]
    steps: list[Counter[tuple[int, ...]]]
    before: Mapping[str, float]
    after: Mapping[str, float]
    tokens: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    held: tuple[int, int]  # the numbers of weights of student and teacher on this rank
    frequencies: set[torch.dtype]  # of all buffers of floats


def train(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_type: str = "bert",
    ranks: int = 1,
    sharded: bool = False,
    shard_teacher: bool = True,
    steps: int = 12,
    file: str = "last.ckpt",
    resume: str | None = None,
    objective: Mapping[str, Any] | None = None,
    optimizer: Any = ADAMW,
    activation_checkpointing: bool = False,
    compiled: bool = False,
    teacher_dtype: Any = "auto",
    data: Mapping[str, Any] | None = None,
    **trainer_fields: Any,
) -> Trained:
    """Train without dropout for so many steps of 16 sequences, save ``file``, and return what rank 0 has in the end."""

    def job() -> Trained:
        teacher = build_teacher(model_type, num_layers=4, **NO_DROPOUT.get(model_type, BERTS))
        teacher = dataclasses.replace(teacher, dtype=teacher_dtype)
        torch.manual_seed(1)
        student = cut_student(teacher=teacher, tokenizer=tokenizer, layers="half")
        for model in (student, teacher.model) if compiled else ():
            compile_backbone(model)
        if activation_checkpointing:
            checkpoint_activations(student)
        module = DistillationModule(
            student=student,
            teacher=teacher,
            tokenizer=tokenizer,
            lm=teacher.lm,
            objective=dataclasses.replace(build_objective(teacher.lm, "fused"), **(objective or {})),
            optimizer=optimizer,
            scheduler="constant",
            warmup_share=0.0,
            seed=0,
            record={"config": {}},
        )
        sizes = {"block_size": 32, "global_batch_size": 16, "micro_batch_size": 4, "val_share": 0.2}
        options = {"max_val_blocks": 8, "attend_across_documents": False, "packing": "blocks", "num_workers": 0}
        settings: Any = {**sizes, **options, **(data or {})}
        seen = Seen()
        defaults: dict[str, Any] = {
            "max_steps": steps,
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "gradient_clip_val": 5.0,
        }
        if sharded:
            defaults["strategy"] = FullyShardedStrategy(shard_teacher=shard_teacher)
        elif ranks > 1:
            defaults["strategy"] = "ddp"
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=-1,
            check_val_every_n_epoch=None,
            val_check_interval=1000,
            use_distributed_sampler=False,
            callbacks=[seen, ValidateEvery(optimizer_steps=5)],
            **defaults | trainer_fields,
        )
        datamodule = DistillationDataModule(
            corpus=Texts(135),
            tokenizer=tokenizer,
            masking=MASKING,
            seed=0,
            lm=teacher.lm,
            cache_dir=str(folder),
            **settings,
        )
        trainer.fit(module, datamodule=datamodule, ckpt_path=folder / resume if resume else None)
        trainer.save_checkpoint(folder / file)
        if not module.after:
            trainer.validate(module, datamodule=datamodule, verbose=False)
        if isinstance(module, FSDPModule):
            module.reshard()  # the root's, after a validation
        saved = torch.load(folder / file, weights_only=False)
        return Trained(
            losses=seen.losses,
            steps=seen.steps,
            before=module.before,
            after=module.after,
            tokens=module.tokens_seen,
            weights=saved["state_dict"],
            optimizer=saved["optimizer_states"][0]["state"],
            held=(held(student), held(teacher.model)),
            frequencies={buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()},
        )

    of_ranks = on_ranks(ranks, job)
    read = [sum(parts, Counter()) for parts in zip(*(each.steps for each in of_ranks), strict=True)]
    return dataclasses.replace(of_ranks[0], steps=read)


def held(model: nn.Module) -> int:
    """Count the weights that this rank holds, of a sharded model between two steps."""
    own = (each.to_local() if isinstance(each, DTensor) else each for each in model.parameters())
    return sum(each.numel() for each in own)


def largest_differences(one: Trained, two: Trained) -> tuple[float, float]:
    """Return the largest differences of a loss, and of a weight or a moment, after checking that all have these.

    The second training may be the rest of the first.
    """
    assert two.weights.keys() == one.weights.keys()
    assert two.optimizer.keys() == one.optimizer.keys()
    rest = one.losses[len(one.losses) - len(two.losses) :]
    pairs = [(one.weights[name], two.weights[name]) for name in one.weights]
    for index, moments in one.optimizer.items():
        assert moments.keys() == two.optimizer[index].keys()
        pairs += [(each, two.optimizer[index][name]) for name, each in moments.items()]
    assert all(first.shape == second.shape and first.dtype == second.dtype for first, second in pairs)
    losses = [abs(first - second) for first, second in zip(rest, two.losses, strict=True)]
    losses += [abs(one.after[name] - two.after[name]) for name in one.after if re.search("loss|nll", name)]
    return max(losses), max(float((first.float() - second.float()).abs().max()) for first, second in pairs)
