"""What Lightning has not: validation counted in optimizer steps, and throughput in tokens per second."""

import math
import sys
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.trainer.states import TrainerFn

from distilkit.errors import UserError
from distilkit.module import DistillationModule
from distilkit.throughput import peak_flops


class ValidateEvery(Callback):
    """Validate at least every ``optimizer_steps`` and at the end; Lightning's own interval counts micro-batches.

    The last step of an epoch may have fewer of them, so that a fixed interval would drift into the middle of a step,
    where a checkpoint holds half of a gradient. The trainer needs ``check_val_every_n_epoch=None``.
    """

    def __init__(self, *, optimizer_steps: int) -> None:
        """Take the interval in optimizer steps.

        Raises:
            UserError: it is not positive.
        """
        if optimizer_steps < 1:
            raise UserError(f"callbacks.validation.optimizer_steps={optimizer_steps}, but it must be at least 1")
        self.optimizer_steps = self.interval = self.total = optimizer_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spread the validations evenly; the data module has set the accumulation by now."""
        self.total = int(trainer.estimated_stepping_batches)
        self.interval = math.ceil(self.total / max(1, math.ceil(self.total / self.optimizer_steps)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell a resumed run whether its checkpoint came from a validation."""
        self._ask(trainer, due=trainer.global_step > 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a validation when a whole step is done and it is time."""
        self._ask(trainer, due=batch["is_last"])

    def _ask(self, trainer: Trainer, *, due: bool) -> None:
        """Let Lightning, which validates at multiples of an interval of micro-batches, do it now or not yet."""
        now = due and (trainer.global_step % self.interval == 0 or trainer.global_step == self.total)
        trainer.val_check_batch = trainer.fit_loop.total_batch_idx + 1 if now else sys.maxsize


class Throughput(Callback):
    """Log ``throughput/tokens_per_second`` over all ranks and ``throughput/mfu``, validation not counted.

    The second is the share of the devices' peak that goes into the model's own operations (see ``flops.py``).
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.tokens = self.window_tokens = 0
        self.window_flops = self.peak = 0.0
        self.seconds = self.window_seconds = 0.0
        self.started: float | None = None  # None: the clock stands still

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the device, and start the clock."""
        precision = str(trainer.precision)
        dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
        self.peak = peak_flops(pl_module.device, dtype) * trainer.world_size
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again, when training goes on."""
        if trainer.state.fn == TrainerFn.FITTING:
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
        assert isinstance(pl_module, DistillationModule)
        self.window_flops += pl_module.flops(batch) * trainer.world_size
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
        """The average over the whole training."""
        return self.tokens / max(self.seconds, 1e-9)


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, counting to where ``max_steps`` will stop it."""

    @property
    def total_train_batches(self) -> int | float:
        """Count the micro-batches of this epoch that will be trained."""
        total = super().total_train_batches
        max_steps = self.trainer.max_steps
        if max_steps < 0:
            return total
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        left = (max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(total, progress.completed + left)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Show losses and tokens/s; the run's folder is its version."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        assert isinstance(pl_module, DistillationModule)
        return items | pl_module.shown
