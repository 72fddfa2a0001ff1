"""Save checkpoints that are whole or not there, by the clock and by steps, and keep the one before."""

import contextlib
import itertools
import os
import shutil
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distilkit.budget import parse_budget
from distilkit.errors import UserError
from distilkit.runs.checkpoints import LAST, check


class WholeFiles(TorchCheckpointIO):
    """Write each checkpoint beside its target, force it to the disk, and then rename it, so that it is never half there.

    Of ``last.ckpt`` the newest ``keep`` are kept, in files that are numbered from the newest to the oldest. A write that
    fails raises a ``UserError``, and leaves what was there. File modes follow the umask.
    """

    def __init__(self, *, keep: int = 1) -> None:
        """Check the number of files."""
        if keep < 1:
            raise UserError(f"callbacks.checkpoint.keep={keep}, but it must be at least 1")
        self.keep = keep

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a ``path`` with a scheme, as ``s3://``, is left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        mine = f".{file.name}.{socket.gethostname()}-{os.getpid()}"  # hidden, and of no other process
        new, old = file.with_name(f"{mine}.tmp"), file.with_name(f"{mine}-old.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            kept = self.keep > 1 and file.name == LAST and file.is_file()
            if kept:
                try:
                    os.link(file, old)  # so that the newest is under its name at each moment
                except OSError:  # no links on this file system
                    file.replace(old)
            new.replace(file)
            if kept:
                chain = [old, *(numbered(file, index) for index in range(1, self.keep))]
                for newer, older in reversed(list(itertools.pairwise(chain))):
                    if newer.exists():
                        newer.replace(older)
            _to_disk(file.parent)
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError while it closes the file
            cause = _os_error(error)
            if cause is None:
                raise
            new.unlink(missing_ok=True)  # what it takes is free again
            raise _not_written(file, cause, checkpoint) from error
        finally:
            new.unlink(missing_ok=True)
        for each in file.parent.iterdir():
            if each.name.startswith(f".{file.name}.") and each.suffix == ".tmp":  # of a process that was killed
                each.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Check a checkpoint, and load it into memory: the file may be replaced while its tensors are in use."""
        check(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def numbered(file: Path, index: int) -> Path:
    """Return the name of the checkpoint that is ``index`` older than ``file``."""
    return file.with_name(f"{file.stem}-{index}{file.suffix}")


def _to_disk(folder: Path) -> None:
    """Force the names of a folder to the disk, where that can be done."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the system's error behind an error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _not_written(file: Path, cause: OSError, checkpoint: Mapping[str, Any]) -> UserError:
    size = sum(leaf.nbytes for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)) / 1e6
    there = file.parent.is_dir()
    free = f"{shutil.disk_usage(file.parent).free / 1e6:,.0f} MB are free there" if there else "no folder"
    return UserError(
        f"{file} cannot be written: {cause.strerror}. It takes {size:,.0f} MB, {free}; the checkpoints before it are "
        "whole. Free space, or your quota, or set hydra.run.dir to another disk; then ckpt_path=auto goes on"
    )


class Checkpoints(ModelCheckpoint):
    """Save ``best.ckpt``, by the held-out loss, and ``last.ckpt``: after each validation, by the clock, and by steps.

    ``train_time_interval`` is a ``timedelta``, or a text as ``15m``. It counts from the last save, on the clock of the
    first rank. A save falls at the end of an optimizer step, and before the next one would exceed the interval. The
    ranks agree each time that half of what is left has passed. ``keep`` is for ``WholeFiles``, and ``best`` are the
    arguments of Lightning's callback.
    """

    def __init__(
        self, *, keep: int, every_n_train_steps: int | None, train_time_interval: timedelta | Any, **best: Any
    ) -> None:
        """Check the settings."""
        super().__init__(**best)
        if every_n_train_steps is not None and every_n_train_steps < 1:
            found = f"callbacks.checkpoint.every_n_train_steps={every_n_train_steps}"
            raise UserError(f"{found}, but it must be at least 1; null saves after validations and by the clock only")
        if isinstance(train_time_interval, timedelta):
            train_time_interval = train_time_interval.total_seconds()
        self.seconds = parse_budget(train_time_interval, key="callbacks.checkpoint.train_time_interval")
        self.keep, self.steps = keep, every_n_train_steps
        self.step, self.saved, self.since, self.look_in = 0, 0.0, 0, 1  # of the last save; steps since then, to go

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; what a run resumes is saved already."""
        super().on_train_start(trainer, pl_module)
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimizer step, if the clock or the steps say so."""
        if batch["is_last"]:
            by_steps = self.steps is not None and trainer.global_step % self.steps == 0
            if self._is_time(trainer) or by_steps:
                self._save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation: the best first, of which the newest knows."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._save(trainer, pl_module)

    def _is_time(self, trainer: Trainer) -> bool:
        self.since, self.look_in = self.since + 1, self.look_in - 1
        if self.seconds is None or self.look_in > 0:
            return False
        passed = monotonic() - self.saved
        left = (self.seconds - passed) * self.since / max(passed, 1e-3)  # steps
        # Looking ahead no farther than back keeps a pace that changes from making the next look late.
        self.look_in = trainer.strategy.broadcast(max(1, min(int(left / 2), self.since)) if left >= 1 else 0)
        return self.look_in == 0

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the newest, unless this step is saved or is none; the time it takes is not one of training."""
        if trainer.global_step == self.step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        module.stop_clock()
        trainer.save_checkpoint(Path(str(self.dirpath)) / LAST, weights_only=False)  # best.ckpt may be weights alone
        self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self.step, self.saved, self.since, self.look_in = trainer.global_step, monotonic(), 0, 1
