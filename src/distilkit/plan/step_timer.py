"""Time real optimizer steps through the trainer, the module and the data module."""

import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from distilkit.data import DistillationDataModule
from distilkit.module import DistillationModule
from distilkit.watch.memory import peak_bytes, reset_peak
from distilkit.watch.throughput import Throughput, step_flops


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What optimizer steps took, after one to warm up.

    ``seconds`` is of a full micro-batch, with the wait for its data, forward and backward, ``optimizer_seconds`` what a
    step adds. ``tokens``, without padding, and ``flops`` are of a micro-batch, ``peak`` and the optimizer's ``state`` in
    bytes, ``watts`` of one device, or None where it does not report them.
    """

    steps: int
    micro_batches: int  # of each timed step
    seconds: float
    optimizer_seconds: float
    tokens: float
    flops: float
    peak: int
    state: int
    watts: float | None

    def step_seconds(self, per_step: int) -> float:
        """Return the seconds of an optimizer step of so many micro-batches."""
        return per_step * self.seconds + self.optimizer_seconds


class StepTimer(Callback):
    """Note the times between the ends of micro-batches, and those of the optimizer, when the device has finished."""

    def __init__(self) -> None:
        """Start without a step."""
        self.micro: list[list[float]] = [[]]  # seconds of each micro-batch of each step
        self.sums: list[Counter[str]] = [Counter()]  # blocks, places, tokens and FLOPs of each step
        self.optimizer, self.watts = list[float](), list[float]()
        self.mark, self.peak, self.state = 0.0, 0, 0
        self.throughput = Throughput()

    def _lap(self, module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        before, self.mark = self.mark, perf_counter()
        return self.mark - before

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count the operations of the models."""
        self.throughput.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._lap(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """End the last micro-batch of a step."""
        self.micro[-1].append(self._lap(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End another micro-batch, or the step."""
        assert isinstance(pl_module, DistillationModule) and self.throughput.costs is not None
        lap = self._lap(pl_module)
        flops: Any = step_flops(pl_module.step_objective, *self.throughput.costs, batch, lm=pl_module.lm)
        self.sums[-1].update(blocks=len(batch["labels"]), places=batch["labels"].numel(), flops=flops)
        if not batch["is_last"]:
            self.micro[-1].append(lap)
            return
        self.optimizer.append(lap)
        self.sums[-1]["tokens"] = int(pl_module.step_tokens)
        self.micro.append([])
        self.sums.append(Counter())
        self.watts += _watts(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the peak of the memory, and the size of the optimizer's state."""
        self.peak = peak_bytes(pl_module.device)
        tensors = [each for state in trainer.optimizers[0].state.values() for each in state.values()]
        self.state = sum(each.numel() * each.element_size() for each in tensors if isinstance(each, torch.Tensor))

    def timing(self, *, micro_batch_size: int) -> Timing:
        """Sum up all steps but the first."""
        micro, sums, total = self.micro[1:-1], self.sums[1:-1], sum(self.sums, Counter())
        # By place, with padding: steps of documents differ in length, and an epoch ends in a smaller step.
        seconds = statistics.median(sum(laps) / step["places"] for laps, step in zip(micro, sums, strict=True))
        flops = statistics.mean(step["flops"] / step["blocks"] for step in sums)
        return Timing(
            steps=len(micro),
            micro_batches=max(map(len, micro)),
            seconds=seconds * total["places"] / total["blocks"] * micro_batch_size,
            optimizer_seconds=statistics.median(self.optimizer[1:]),
            tokens=total["tokens"] / total["blocks"] * micro_batch_size,
            flops=flops * micro_batch_size,
            peak=self.peak,
            state=self.state,
            watts=statistics.mean(self.watts) if self.watts else None,
        )


@contextmanager
def sizes(data: DistillationDataModule, *, micro_batch_size: int, micro_batches: int) -> Iterator[None]:
    """Let the data module make steps of so many micro-batches."""
    before = data.micro_batch_size, data.global_batch_size
    data.micro_batch_size, data.global_batch_size = micro_batch_size, micro_batch_size * micro_batches
    try:
        yield
    finally:
        data.micro_batch_size, data.global_batch_size = before


def how_many(seconds: float, steps: int, *, per_step: int, micro_batch_seconds: float) -> tuple[int, int]:
    """Return how many steps are timed, besides one to warm up, and of how many micro-batches, at most ``per_step``.

    About ``seconds`` are spent. Steps are shortened first, to two micro-batches; then there are fewer, two at least.
    """
    most = int(seconds / max(micro_batch_seconds, 1e-9))  # micro-batches that the time allows
    micro_batches = min(per_step, max(2, most // (steps + 1)))
    return min(steps, max(2, most // micro_batches - 1)), micro_batches


def time_steps(
    trainer: Trainer,
    module: DistillationModule,
    data: DistillationDataModule,
    *,
    micro_batch_size: int,
    micro_batches: int,
) -> Timing:
    """Train for the steps of ``trainer``, and return what they took; the student's weights change."""
    trainer.callbacks.append(timer := StepTimer())  # type: ignore[attr-defined]  # set by one of its connectors
    reset_peak(trainer.strategy.root_device)
    try:
        with sizes(data, micro_batch_size=micro_batch_size, micro_batches=micro_batches):
            trainer.fit(module, datamodule=data)
    finally:
        module.zero_grad(set_to_none=True)
    return timer.timing(micro_batch_size=micro_batch_size)


def _watts(device: torch.device) -> list[float]:
    """Return the power that a GPU draws; nothing of a CPU, or without the package pynvml."""
    if device.type != "cuda":
        return []
    try:
        return [torch.cuda.power_draw(device) / 1000]
    except Exception:  # no package, no driver, no permission
        return []
