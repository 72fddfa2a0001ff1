"""What Lightning has not: validation counted in optimizer steps, and throughput in tokens per second."""

import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar


class ValidateEvery(Callback):
    """Validate every ``optimizer_steps``; Lightning's own interval counts micro-batches.

    The trainer needs ``check_val_every_n_epoch=None``, so that the count runs across epochs.
    """

    def __init__(self, *, optimizer_steps: int) -> None:
        """Take the interval in optimizer steps."""
        self.optimizer_steps = optimizer_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the interval, once the data module has set the accumulation."""
        trainer.val_check_interval = self.optimizer_steps * trainer.accumulate_grad_batches


class Throughput(Callback):
    """Log ``throughput/tokens_per_second`` over all ranks, validation not counted, and keep the average."""

    def __init__(self) -> None:
        """Start at zero."""
        self.tokens = self.window_tokens = 0
        self.seconds = self.window_seconds = 0.0
        self.started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self.started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, when the device has finished."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens; at each logged step, log the rate since the last one."""
        tokens = batch["input_ids"].numel() * trainer.world_size
        self.tokens += tokens
        self.window_tokens += tokens
        if batch["is_last"] and trainer.global_step % trainer.log_every_n_steps == 0:
            self._stop()
            self.started = time.perf_counter()
            rate = self.window_tokens / max(self.window_seconds, 1e-9)
            pl_module.log("throughput/tokens_per_second", rate)
            pl_module.log("tokens/s", rate, prog_bar=True, logger=False)
            self.window_tokens, self.window_seconds = 0, 0.0

    def _stop(self) -> None:
        elapsed = time.perf_counter() - self.started
        self.seconds += elapsed
        self.window_seconds += elapsed

    @property
    def tokens_per_second(self) -> float:
        """The average over the whole training."""
        return self.tokens / max(self.seconds, 1e-9)


class ProgressBar(RichProgressBar):
    """Lightning's rich bar without the version number."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Show losses and tokens/s; the run's folder is its version."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
