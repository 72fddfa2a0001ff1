"""The progress of a training: two lines that change in a terminal or a notebook, or a line of the log now and then."""

import logging
import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar as LightningBar

from distilkit.errors import UserError
from distilkit.runs.turns import own_turn
from distilkit.watch.screen import Screen

log = logging.getLogger(__name__)


def clock_time(seconds: float) -> str:
    """Return a time as 0:05 or 12:34 (minutes), or 1:02:03 (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _loss(shown: Mapping[str, float]) -> str:
    """Return the loss, and its terms if there are several, as ``loss 8.21 (ce 2.1, mlm 3.9)``."""
    if "train/loss" not in shown:
        return ""
    begin = "train/loss_"
    terms = [f"{name.removeprefix(begin)} {_number(shown[name])}" for name in shown if name.startswith(begin)]
    return f"loss {_number(shown['train/loss'])}" + (f" ({', '.join(terms)})" if len(terms) > 1 else "")


def _held_out(shown: Mapping[str, float], *, short: bool = False) -> str:
    """Return the newest score on held-out text or rows; ``short`` without its unit."""
    if "val/nll" in shown:
        nll = _number(shown["val/nll"])
        return (
            f"held-out {nll}" if short else f"held-out cross-entropy {nll} nats, accuracy {shown['val/accuracy']:.1%}"
        )
    name = next((name for name in ("val/loss", "held_out") if name in shown), None)
    return f"held-out {'loss' if name == 'val/loss' else 'score'} {_number(shown[name])}" if name else ""


class ProgressBar(LightningBar):
    """Show step, loss, tokens per second and the time left of the whole training, on the first rank.

    1. In a terminal, two lines at its foot change, and what is logged scrolls above them. In a notebook, two lines
       change below the cell.
    2. Elsewhere (nohup, SLURM, CI) a line is logged ``every`` seconds, and at each validation after that time.
    3. The end is logged in one line; a training shorter than ``every`` logs nothing else.

    Modules have ``shown``, the newest numbers on the host, and ``tokens_seen``.
    """

    def __init__(self, *, every: float) -> None:
        """Take the seconds between two lines."""
        if not 0 < every < math.inf:
            raise UserError(f"callbacks.progress.every={every}, but it must be a number of seconds above 0")
        super().__init__()
        self.every, self.enabled = every, True
        self.total: float = math.inf  # optimizer steps
        self.clock: Any = None  # of a distillation, which ends with its budget if it is ``over_time``
        self.over_time = False
        self.told = 0.0  # when a line was logged
        # Time and step at the start of the training, at the first end of a step, and at the last one.
        self.begin = self.first = self.last = (0.0, 0)
        self.told_step = 0
        self.mark = self.start = (0.0, 0)  # seconds of training and tokens when the rate was measured, and at the start
        self.rate: float | None = None
        self.screen = Screen()

    def disable(self) -> None:
        """Show nothing, as on all ranks but the first."""
        self.enabled = False

    def _log(self, line: str) -> None:
        """Log a line, or print it where a script has set up no logging."""
        if log.isEnabledFor(logging.INFO):
            log.info("%s", line)
        else:
            print(line, flush=True)

    def _steps(self) -> str:
        of = f" of {int(self.total):,}" if self.total < math.inf else ""
        return f"step {self.last[1]:,}{of}"

    def _left(self) -> float | None:
        """Return the seconds that are left, with validation and checkpoints, or of a budget; None if nothing tells."""
        if self.over_time:
            return float(self.clock.left)
        since = self.first if self.last[1] > self.first[1] else self.begin  # the first step may compile
        steps = self.last[1] - since[1]
        if not steps or self.total == math.inf:
            return None
        each = (self.last[0] - since[0]) / steps
        return max(0.0, (self.total - self.last[1]) * each - (perf_counter() - self.last[0]))

    def _counts(self, pl_module: LightningModule) -> tuple[float, int]:
        """Return the seconds of training and the tokens up to the last step; this waits for the device."""
        seconds = self.last[0] - self.begin[0] if self.clock is None else self.clock.wall
        return seconds, int(getattr(pl_module, "tokens_seen", 0))

    def _measure(self, pl_module: LightningModule) -> None:
        """Take tokens per second since the last time."""
        now = self._counts(pl_module)
        if now[0] > self.mark[0] and now[1] > self.mark[1]:
            self.rate = (now[1] - self.mark[1]) / (now[0] - self.mark[0])
            self.mark = now

    def _numbers(self, pl_module: LightningModule) -> dict[str, float]:
        """Return the newest numbers, with the loss of the last step where none was logged yet."""
        shown: dict[str, float] = dict(getattr(pl_module, "shown", {}))
        loss = getattr(pl_module, "step_loss", None)
        if "train/loss" not in shown and loss is not None and self.last[1] > self.begin[1]:
            shown["train/loss"] = float(loss)
        return shown

    def _tell(self, trainer: Trainer, pl_module: LightningModule, *, batch_idx: int) -> None:
        """Log where the training is."""
        self.told = perf_counter()
        self._measure(pl_module)
        if self.screen.is_open:
            return
        begun, every = (batch_idx + 1) % trainer.accumulate_grad_batches, trainer.accumulate_grad_batches
        within = f" and {begun} of {every} micro-batches" if begun and self.last[1] == self.told_step else ""
        self.told_step, left = self.last[1], self._left()
        parts = [_loss(self._numbers(pl_module)), f"{self.rate:,.0f} tokens/s" if self.rate else ""]
        parts.append("" if left is None else f"{clock_time(left)} left")
        line = f"{self._steps()}{within}: {', '.join(filter(None, parts))}"
        self._log(line.removesuffix(": "))

    def _show(self, pl_module: LightningModule) -> None:
        """Show where the training is."""
        shown: dict[str, float] = getattr(pl_module, "shown", {})
        left, rate = self._left(), shown.get("tokens/s", self.rate)
        share = float(self.clock.progress) if self.over_time else self.last[1] / max(1.0, self.total)
        right = [f"{share:.0%}", "" if left is None else f"{clock_time(left)} left"]
        right.append(f"{rate:,.0f} tokens/s" if rate else "")
        below = "  ".join(filter(None, (_held_out(shown, short=True), _loss(shown))))
        self.screen.show(label=self._steps(), share=share, right="  ".join(filter(None, right)), below=below)

    def _part(self, label: str, *, done: int, of: float, below: str = "") -> None:
        """Show how much is scored, and log it if it is time."""
        share, now = f"{done:,} of {of:,.0f} batches", perf_counter()
        self.screen.show(label=label, share=done / max(1.0, of), right=share if done else "", below=below)
        if self.enabled and not self.screen.is_open and now - self.told >= self.every:
            self.told = now
            self._log(f"{label}: {share}")

    def _begin(self) -> None:
        self.told = perf_counter()
        if self.enabled and own_turn() is None:  # trainings that take turns would write over each other's lines
            self.screen.open()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the two lines."""
        self._begin()
        self._part("held-out text", done=0, of=0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how much of the held-out text is scored."""
        sizes = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        below = self.screen.frame[3]
        self._part("held-out text", done=batch_idx + 1, of=float(sizes[dataloader_idx]), below=below)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the two lines, for the rows that are scored after a training."""
        self._begin()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how much is scored."""
        self._part("scoring", done=batch_idx + 1, of=float(trainer.num_predict_batches[dataloader_idx]))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the two lines."""
        self.screen.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        if not self.enabled:
            return
        self._begin()
        self.total = trainer.estimated_stepping_batches
        self.clock = getattr(pl_module, "clock", None)
        self.over_time = self.clock is not None and self.clock.budget is not None
        self.begin = self.first = self.last = (self.told, trainer.global_step)
        self.told_step, self.rate = trainer.global_step, None
        self.mark = self.start = self._counts(pl_module)
        self._show(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show where the training is, and log it if it is time."""
        if not self.enabled:
            return
        now = perf_counter()
        if trainer.global_step > self.last[1]:
            self.last = (now, trainer.global_step)
            self.first = self.last if self.first == self.begin else self.first
        if now - self.told >= self.every:
            self._tell(trainer, pl_module, batch_idx=batch_idx)
        self._show(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the score of a validation in one line, except at the start of a training."""
        now, found = perf_counter(), _held_out(getattr(pl_module, "shown", {}))
        if not self.enabled or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._show(pl_module)
        if found and now - self.begin[0] >= self.every and self.screen.notebook is None:
            self.told = now
            self._log(f"{self._steps()}: {found}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the end in one line."""
        if not self.enabled:
            return
        steps = trainer.global_step - self.begin[1]
        self.mark, shown = self.start, self._numbers(pl_module)  # the mean rate of this training
        self._measure(pl_module)
        parts = [_loss(shown), f"{self.rate:,.0f} tokens/s" if self.rate else "", _held_out(shown)]
        before = f", up to step {trainer.global_step:,}" if self.begin[1] else ""
        line = f"trained {steps:,} step{'s' * (steps != 1)} in {clock_time(perf_counter() - self.begin[0])}{before}"
        line = ": ".join(filter(None, (line, ", ".join(filter(None, parts)))))
        in_notebook = self.screen.end(line)
        self.screen.close()
        if steps and not in_notebook:
            self._log(line)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the two lines before a message or a traceback is printed."""
        self.screen.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the two lines."""
        self.screen.close()
