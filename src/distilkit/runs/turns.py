"""Several trainings in one process, which take turns: one micro-batch each, so that all read the same one."""

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from hydra.core.hydra_config import HydraConfig
from pytorch_lightning import Callback, LightningModule, Trainer

from distilkit.errors import UserError
from distilkit.runs.signals import Stopped, inbox

T = TypeVar("T")
Position = tuple[int, ...]  # micro-batches that a training has read, and held-out batches since; the lowest runs

START: Position = (-2,)  # a training that is not built
BUILT: Position = (-1,)  # one that has its models, but has not begun
_own = threading.local()


class Turns:
    """The order of trainings in threads of their own, of which one runs at a time: the one that has read least.

    What is global to a process, Hydra's config and the handlers of logging, is kept for each training while it waits.
    ``kept`` holds what all of them use.
    """

    def __init__(self, names: list[str]) -> None:
        """Let the first of the trainings begin."""
        self.names = names
        self.positions: dict[int, Position] = dict.fromkeys(range(len(names)), START)  # of those that have not ended
        self.current: int | None = 0
        self.changed = threading.Condition()
        self.kept: dict[Any, Any] = {}
        self.batch: dict[str, Any] = {}  # what a teacher reads of the newest micro-batch
        self.reads: dict[Any, Any] = {}  # and what was read of the teacher on it

    def join(self, number: int) -> "Turn":
        """Wait for the first turn of a training, in its thread."""
        _own.turn = turn = Turn(self, number)
        turn._wait()
        return turn

    def reads_on(self, batch: dict[str, Any]) -> dict[Any, Any]:
        """Return what was read of the teacher on this micro-batch, by what it is; that of other ones is dropped.

        The comparison waits for the device, which each turn's end has waited for anyway, unless only one training is left.
        """
        if len(self.positions) == 1:
            self.batch, self.reads = {}, {}
            return {}
        read: dict[str, Any] = {
            name: batch[name] for name in ("input_ids", "attention_mask", "document_ids") if name in batch
        }
        kept = self.batch
        if read.keys() != kept.keys() or not all(torch.equal(each, kept[name]) for name, each in read.items()):
            self.batch, self.reads = read, {}
        return self.reads

    def _next(self, default: int) -> int | None:
        """Return whose turn it is; ``default`` where several have read equally much."""
        lowest = min(self.positions.values(), default=None)
        first = [number for number, position in self.positions.items() if position == lowest]
        return default if default in first else min(first, default=None)


class Turn:
    """A training's place among the others."""

    def __init__(self, turns: Turns, number: int) -> None:
        """Take a number."""
        self.turns, self.number = turns, number

    @property
    def name(self) -> str:
        """What tells this training from the others."""
        return self.turns.names[self.number]

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what the first of the trainings has made."""
        if key not in self.turns.kept:
            self.turns.kept[key] = make()
        value: T = self.turns.kept[key]
        return value

    def ends(self, position: Position) -> bool:
        """Note what this training has read; return whether it is another one's turn now."""
        self.turns.positions[self.number] = position
        return self.turns._next(self.number) != self.number

    def pass_on(self) -> None:
        """Let the training that has read least run, and wait for the next turn of this one."""
        hydra, handlers = HydraConfig.instance().cfg, logging.root.handlers[:]
        with self.turns.changed:
            self.turns.current = self.turns._next(self.number)
            self.turns.changed.notify_all()
        self._wait()
        HydraConfig.instance().cfg, logging.root.handlers[:] = hydra, handlers

    def wait_for_others(self, position: Position) -> None:
        """Wait until the others have come as far."""
        if self.ends(position):
            self.pass_on()

    def leave(self) -> None:
        """Let the others go on without this training, which has ended."""
        del _own.turn
        with self.turns.changed:
            del self.turns.positions[self.number]
            self.turns.current = self.turns._next(self.number)
            self.turns.changed.notify_all()

    def _wait(self) -> None:
        with self.turns.changed:
            self.turns.changed.wait_for(lambda: self.turns.current == self.number)


def own_turn() -> Turn | None:
    """Return the turn of the training that runs in this thread; None where it is the only one of its process."""
    return getattr(_own, "turn", None)


def once(key: Any, make: Callable[[], T]) -> T:
    """Return what the first training of those that take turns has made, or what is made for the only one."""
    turn = own_turn()
    return make() if turn is None else turn.once(key, make)


class TakeTurns(Callback):
    """Let the other trainings of this process run after each micro-batch, and give it what they have read on it.

    A batch gets ``teacher_reads``: a dict of what was read of the teacher on a batch of the same tokens.
    """

    def __init__(self, turn: Turn) -> None:
        """Begin before the first micro-batch."""
        self.turn, self.read = turn, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several devices, which several processes would share."""
        if trainer.world_size > 1:
            found = f"sweep.share_teacher=true trains on one device, but there are {trainer.world_size} processes"
            raise UserError(f"{found}; set trainer.devices=1, or prepare teacher_cache.epochs for several")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where a resumed training goes on."""
        self.read = trainer.global_step * trainer.accumulate_grad_batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the micro-batch what was read on it."""
        self.read = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
        batch["teacher_reads"] = self.turn.turns.reads_on(batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Give the held-out batch what was read on it."""
        batch["teacher_reads"] = self.turn.turns.reads_on(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the others read this micro-batch."""
        self._end(pl_module, (self.read, 0))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *more: Any
    ) -> None:
        """Let the others read this held-out batch."""
        if inbox.received and trainer.sanity_checking:  # nothing is trained that could be saved
            raise Stopped(128 + inbox.received)
        self._end(pl_module, (self.read, batch_idx + 1))

    def _end(self, pl_module: Any, position: Position) -> None:
        """Pass on; the time of the others is none of this training."""
        if not self.turn.ends(position):
            return
        runs = pl_module.clock.started is not None
        pl_module.stop_clock()
        self.turn.pass_on()
        if pl_module.teacher is not None:
            with torch.inference_mode(False):  # the end of another training moves it to the CPU
                pl_module.teacher.to(pl_module.device)
        if runs:
            pl_module.clock.start()
