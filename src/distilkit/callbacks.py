"""Callbacks: validation by optimizer steps, and a comparison of input forms."""

import logging
import math
import sys
from dataclasses import asdict
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from distilkit.data.batches import DistillationDataModule
from distilkit.data.forms import Comparison, compare_forms
from distilkit.errors import UserError
from distilkit.module import DistillationModule
from distilkit.runs.turns import once

log = logging.getLogger(__name__)


class ValidateEvery(Callback):
    """Validate at least every ``optimizer_steps`` and at the end, whereas Lightning's interval counts micro-batches.

    Steps at the end of an epoch are shorter, so a fixed interval would save in the middle of a step, without a part of
    its gradient. The trainer needs ``check_val_every_n_epoch=None``.
    """

    def __init__(self, *, optimizer_steps: int) -> None:
        """Check the interval."""
        if optimizer_steps < 1:
            raise UserError(f"callbacks.validation.optimizer_steps={optimizer_steps}, but it must be at least 1")
        self.optimizer_steps = self.interval = optimizer_steps
        self.total: float = math.inf  # with a budget, until it ends

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spread the validations evenly, if the steps are known; the data module has set the accumulation."""
        self.total = trainer.estimated_stepping_batches
        if self.total < math.inf:
            self.interval = math.ceil(self.total / max(1, math.ceil(self.total / self.optimizer_steps)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate at once if a resumed run stopped after a step, before the validation that is due there."""
        loop = trainer.fit_loop.epoch_loop
        before = loop.restarted_on_train_batch_end
        self._request(trainer, due=trainer.global_step > 0 and not before)  # Lightning skips one that was made
        if before and self._due(trainer):  # Lightning would count it as done
            trainer.validating, loop.val_loop.restarting = True, False
            loop._batches_that_stepped = trainer.global_step - 1  # under which an unbroken run logs it
            loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Request a validation after an optimizer step if one is due."""
        self._request(trainer, due=batch["is_last"])

    def _due(self, trainer: Trainer) -> bool:
        """Return whether the student is scored after as many steps as there were."""
        return trainer.global_step % self.interval == 0 or trainer.global_step in (self.total, trainer.max_steps)

    def _request(self, trainer: Trainer, *, due: bool) -> None:
        """Set Lightning's interval of micro-batches so that it validates now or not yet."""
        now = due and self._due(trainer)
        trainer.val_check_batch = trainer.fit_loop.total_batch_idx + 1 if now else sys.maxsize


class CompareForms(Callback):
    """Score the teacher on held-out documents, packed into blocks and each alone, before a run starts.

    A teacher that was trained on single documents may read blocks badly, and then teaches at a loss. Rank 0 alone runs
    this, before the models are distributed, and no resumed run. A teacher whose head no term reads is not scored.
    """

    def __init__(self, *, enabled: bool, ckpt_path: str | None) -> None:
        """Compare only if ``enabled``, and if the run does not resume from ``ckpt_path``."""
        self.enabled = enabled and ckpt_path is None
        self.found: Comparison | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, for the record of a resumed run."""
        return asdict(self.found) if self.found else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the part before has found."""
        self.found = Comparison(**state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, log the result in one line, and warn if the form of this run is clearly worse."""
        assert isinstance(pl_module, DistillationModule)
        teacher: Any = pl_module.teacher
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by one of its connectors
        if (
            not self.enabled
            or stage != "fit"
            or not trainer.is_global_zero
            or not isinstance(data, DistillationDataModule)
        ):
            return
        if teacher is None or not pl_module.objective.reads_teacher_logits or data.cache is None or not data.val_blocks:
            return
        self.found = found = once("forms", lambda: self._compare(teacher, data, device=trainer.strategy.root_device))
        if found is None:
            return
        scores = {form: f"{found.nll[form]:.3f} nats and {found.accuracy[form]:.1%}" for form in found.nll}
        line = "the teacher on %d held-out sequences: packed into blocks %s, each document alone %s (%+.3f ± %.3f nats)"
        log.info(line, found.sequences, scores["blocks"], scores["documents"], found.difference, found.error)
        if found.worse(data.packing):
            other = "documents" if data.packing == "blocks" else "blocks"
            log.warning("the teacher reads data.packing=%s clearly worse; set data.packing=%s", data.packing, other)

    def _compare(self, teacher: Any, data: DistillationDataModule, *, device: torch.device) -> Comparison | None:
        assert data.cache is not None
        assert data.val_blocks is not None
        teacher.to(device)
        with torch.compiler.set_stance("force_eager"):
            found = compare_forms(
                teacher,
                data.cache.tokens["val"],
                tokenizer=data.tokenizer,
                block_size=data.block_size,
                masker=data.val_blocks.masker,
                attend_across_documents=data.attend_across_documents,
                batch_size=data.micro_batch_size,
            )
        teacher.to("cpu")  # the strategy moves or shards it
        return found
