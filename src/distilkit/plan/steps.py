"""Time real optimizer steps and validations through the trainer, the module and the data module."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from distilkit.data import DistillationDataModule
from distilkit.module import DistillationModule
from distilkit.plan.memory import peak_bytes, reset_peak
from distilkit.throughput import Throughput, step_flops


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What optimizer steps took, after one to warm up: means over micro-batches, and medians over steps.

    ``seconds`` is of a micro-batch, with the wait for its data, forward and backward, and ``optimizer_seconds`` what a
    step adds. ``tokens`` (without padding) and ``flops`` are of a micro-batch, ``peak`` and ``state`` (of the optimizer)
    in bytes, ``watts`` of one device, or None where it does not report them.
    """

    seconds: float
    optimizer_seconds: float
    tokens: float
    flops: float
    steps: int
    micro_batches: int  # of each timed step
    peak: int
    state: int
    watts: float | None

    def step_seconds(self, per_step: int) -> float:
        """Return the seconds of an optimizer step of so many micro-batches."""
        return per_step * self.seconds + self.optimizer_seconds


@dataclass
class _Step:
    seconds: list[float] = field(default_factory=list)  # of each micro-batch
    tokens: int = 0
    flops: float = 0.0
    optimizer: float = 0.0


class StepTimer(Callback):
    """Note the time between the ends of micro-batches, and that of the optimizer, when the device has finished."""

    def __init__(self) -> None:
        """Start without a step."""
        self.steps, self.watts = [_Step()], list[float]()
        self.validation: list[float] = []  # seconds of each batch
        self.mark = 0.0
        self.state, self.peak = 0, 0
        self.throughput = Throughput()

    def _lap(self, module: LightningModule) -> float:
        """Return the seconds since the last lap."""
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        before, self.mark = self.mark, perf_counter()
        return self.mark - before

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count the operations of the models."""
        self.throughput.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure time and memory from here on."""
        self._lap(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """End the micro-batches of a step: its gradients are there."""
        self.steps[-1].seconds.append(self._lap(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a micro-batch, or a step."""
        assert isinstance(pl_module, DistillationModule)
        assert self.throughput.costs is not None
        step, lap = self.steps[-1], self._lap(pl_module)
        step.flops += step_flops(pl_module.step_objective, *self.throughput.costs, batch, lm=pl_module.lm)
        if not batch["is_last"]:
            step.seconds.append(lap)
            return
        step.optimizer, step.tokens = lap, int(pl_module.step_tokens)
        self.steps.append(_Step())
        if (watts := _watts(pl_module.device)) is not None:
            self.watts.append(watts)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the peak of the memory, and the size of the optimizer's state."""
        self.peak = peak_bytes(pl_module.device)
        state = trainer.optimizers[0].state.values()
        tensors = [each for of in state for each in of.values() if isinstance(each, torch.Tensor)]
        self.state = sum(each.numel() * each.element_size() for each in tensors)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin a batch of the validation."""
        self._lap(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End a batch of the validation."""
        self.validation.append(self._lap(pl_module))

    def timing(self) -> Timing:
        """Sum up all steps but the first, or that one if there is no other."""
        done = [step for step in self.steps if step.seconds and step.tokens]
        steps = done[1:] or done
        count = statistics.mean(len(step.seconds) for step in steps)
        return Timing(
            seconds=statistics.median(statistics.mean(step.seconds) for step in steps),
            optimizer_seconds=statistics.median(step.optimizer for step in steps),
            tokens=statistics.mean(step.tokens for step in steps) / count,
            flops=statistics.mean(step.flops for step in steps) / count,
            steps=len(steps),
            micro_batches=max(len(step.seconds) for step in steps),
            peak=self.peak,
            state=self.state,
            watts=statistics.mean(self.watts) if self.watts else None,
        )


@contextmanager
def _sizes(data: DistillationDataModule, *, micro_batch_size: int, micro_batches: int) -> Iterator[None]:
    """Let the data module make steps of so many micro-batches."""
    before = data.micro_batch_size, data.global_batch_size
    data.micro_batch_size, data.global_batch_size = micro_batch_size, micro_batch_size * micro_batches
    try:
        yield
    finally:
        data.micro_batch_size, data.global_batch_size = before


def how_many(seconds: float, steps: int, *, per_step: int, micro_batch_seconds: float) -> tuple[int, int]:
    """Return how many steps are timed, besides one to warm up, and how many micro-batches each has, at most ``per_step``.

    About ``seconds`` are spent. Steps are shortened first, then there are fewer, of two micro-batches and two at least.
    """
    least = min(2, per_step)
    most = int(seconds / max(micro_batch_seconds, 1e-9))  # micro-batches that the time allows
    micro_batches = min(per_step, max(least, most // (steps + 1)))
    return min(steps, max(2, most // micro_batches - 1)), micro_batches


def time_steps(
    trainer: Trainer,
    module: DistillationModule,
    data: DistillationDataModule,
    *,
    micro_batch_size: int,
    micro_batches: int,
) -> Timing:
    """Train for the steps of ``trainer``, each of so many micro-batches, and return what they took.

    The weights of the student change. The peak of the memory counts from here.
    """
    trainer.callbacks.append(timer := StepTimer())  # type: ignore[attr-defined]  # set by one of its connectors
    reset_peak(trainer.strategy.root_device)
    try:
        with _sizes(data, micro_batch_size=micro_batch_size, micro_batches=micro_batches):
            trainer.fit(module, datamodule=data)
    finally:
        module.zero_grad(set_to_none=True)
    return timer.timing()


def time_validation(
    trainer: Trainer, module: DistillationModule, data: DistillationDataModule, *, micro_batch_size: int
) -> float:
    """Score a few held-out batches of so many blocks, and return the seconds of the fastest."""
    trainer.callbacks.append(timer := StepTimer())  # type: ignore[attr-defined]
    with _sizes(data, micro_batch_size=micro_batch_size, micro_batches=1):
        trainer.validate(module, datamodule=data, verbose=False)
    return min(timer.validation)


def _watts(device: torch.device) -> float | None:
    """Return the power that a GPU draws, or None: a CPU does not report it, and a GPU needs the package pynvml."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.power_draw(device) / 1000
    except Exception:  # no package, no driver, no permission
        return None
