"""Callbacks that Lightning lacks: validation by optimizer steps, an end at a signal, and a bar for ``max_steps``."""

import logging
import math
import signal
import sys
import threading
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar

from distilkit.errors import UserError
from distilkit.module import DistillationModule

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
        self.optimizer_steps = self.interval = self.total = optimizer_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spread the validations evenly, after the data module has set the accumulation."""
        self.total = int(trainer.estimated_stepping_batches)
        self.interval = math.ceil(self.total / max(1, math.ceil(self.total / self.optimizer_steps)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate at once if a resumed run stopped where a validation is due."""
        self._request(trainer, due=trainer.global_step > 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Request a validation after an optimizer step if one is due."""
        self._request(trainer, due=batch["is_last"])

    def _request(self, trainer: Trainer, *, due: bool) -> None:
        """Set Lightning's interval of micro-batches so that it validates now or not yet."""
        now = due and (trainer.global_step % self.interval == 0 or trainer.global_step == self.total)
        trainer.val_check_batch = trainer.fit_loop.total_batch_idx + 1 if now else sys.maxsize


class StopOnSignal(Callback):
    """End at SIGTERM or Ctrl-C: finish the optimizer step, save ``file``, and exit with 128 + the signal's number.

    A second signal ends the process at once. Several ranks agree at every tenth step. This replaces Lightning's own
    question, for which the host waits for the device at each micro-batch.
    """

    def __init__(self, *, file: str) -> None:
        """Begin without a signal."""
        self.file, self.received = file, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from now on; Lightning puts the former handlers back when it ends."""
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        log.warning("%s: the run ends after this optimizer step", signal.Signals(number).name)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and exit after an optimizer step if any rank has received a signal."""
        if not batch["is_last"] or (trainer.world_size > 1 and trainer.global_step % 10):
            return
        if trainer.world_size > 1:
            highest = torch.tensor(self.received, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            self.received = int(highest)
        if self.received:
            trainer.save_checkpoint(self.file, weights_only=False)
            log.warning(
                "stopped after step %d; the same command with ckpt_path=%s goes on", trainer.global_step, self.file
            )
            raise SystemExit(128 + self.received)


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, with a total that respects ``max_steps``."""

    @property
    def total_train_batches(self) -> int | float:
        """Return the number of micro-batches of this epoch that will be trained."""
        total = super().total_train_batches
        max_steps = self.trainer.max_steps
        if max_steps < 0:
            return total
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        left = (max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(total, progress.completed + left)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Show losses and tokens/s, without a version number, because the run's folder identifies it."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        assert isinstance(pl_module, DistillationModule)
        return items | pl_module.shown
