"""End a training where it can be resumed, at a signal of a person or of a scheduler, and have SLURM start it again."""

import hashlib
import logging
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from distilkit.cli import changes_of_sweep
from distilkit.errors import UserError
from distilkit.runs.ranks import starter
from distilkit.runs.signals import command_again, inbox
from distilkit.runs.turns import own_turn

log = logging.getLogger(__name__)

_JOB_FILE = "slurm_job"  # in the folder of a run: the SLURM job that trains it, and its command


class StopOnSignal(Callback):
    """End a training at a signal: finish the optimizer step, save ``file``, and exit with 128 + the signal's number.

    During a validation the weights are those of a step's end, so that it ends at once. Several ranks agree after each
    step, on the host, so that none waits for a device. ``requeue`` names the signal after which a SLURM job is queued
    again. This replaces Lightning's handlers, which save within a step, and its question at each micro-batch.
    """

    def __init__(self, *, file: str, requeue: str) -> None:
        """Check the name of the signal."""
        if requeue not in signal.Signals.__members__:
            raise UserError(f"callbacks.signals.requeue={requeue} is no signal; give a name as SIGUSR1")
        self.file, self.requeue = file, signal.Signals[requeue]
        self.flag, self.asked = torch.tensor(0), False
        self.group: Any = None  # of several ranks, on their hosts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of Lightning's handlers, before it sets them."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold signals from now on."""
        inbox.held = True
        if trainer.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the other ranks in the last micro-batch of a step, so that the answer is there after it."""
        if batch["is_last"]:
            self._ask()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """End after an optimizer step if any rank has received a signal."""
        self._end(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Ask the other ranks also here."""
        if inbox.held and trainer.state.fn == TrainerFn.FITTING:
            self._ask()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End within a validation, which a resumed run begins anew."""
        self._end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End also after the last step."""
        self._ask()
        self._end(trainer)

    def _ask(self) -> None:
        self.flag, self.asked = torch.tensor(inbox.received), True
        if self.group is not None:
            highest = torch.distributed.ReduceOp.MAX
            self.work = torch.distributed.all_reduce(self.flag, highest, group=self.group, async_op=True)

    def _end(self, trainer: Trainer) -> None:
        """Save and exit if the ranks were asked, and any has received a signal."""
        if self.asked and self.group is not None:
            self.work.wait()
        received = int(self.flag.numpy()) if self.group is not None else inbox.received
        asked, self.asked = self.asked, False
        if not asked or not received:
            return
        done: Any = trainer.fit_loop.epoch_loop.batch_progress
        if trainer.validating and done.total.completed == done.total.processed:  # as before the validation
            done.total.completed -= 1
            done.current.completed -= 1
        trainer.save_checkpoint(self.file, weights_only=False)
        if trainer.is_global_zero:
            self._report(signal.Signals(received), trainer.global_step)
        # Lightning kills rank 0 when a rank that it has started ends with another status.
        raise SystemExit(0 if starter() else 128 + received)

    def _report(self, received: signal.Signals, step: int) -> None:
        """Say how the run goes on, or have SLURM start it again, which ends this process soon."""
        turn = own_turn()
        if turn and turn.once("reported", lambda: self) is not self:  # the command is that of the whole sweep
            log.warning("%s: stopped after step %d, saved as %s", received.name, step, self.file)
            return
        file = "auto" if "ckpt_path=auto" in inbox.command else self.file
        again = command_again(changes_of_sweep() or {"ckpt_path": file}) if inbox.command else f"ckpt_path={file}"
        log.warning("%s: stopped after step %d, saved as %s; go on with: %s", received.name, step, self.file, again)
        if received != self.requeue or not (job := slurm_job()):
            return
        try:
            subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
            log.warning("SLURM job %s is queued again; with ckpt_path=auto it goes on from there", job)
        except (OSError, subprocess.CalledProcessError) as error:
            found = str(getattr(error, "stderr", error)).strip()
            log.error("scontrol requeue %s failed: %s; submit the job again, with ckpt_path=auto", job, found)


def slurm_job() -> str | None:
    """Return the id of the SLURM job that runs this process, an array's with that of its task; None outside one."""
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):  # a person's shell
        return None
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _of_this_job() -> str | None:
    """Return what identifies the runs of this SLURM job and command line, over all its restarts."""
    job, command = slurm_job(), hashlib.sha256(repr(inbox.command).encode()).hexdigest()  # which may hold a key
    return job and f"{job}\n{command}\n"


def note_slurm_job(out: Path) -> None:
    """Write into the folder of a run which SLURM job trains it, if one does."""
    if job := _of_this_job():
        (out / _JOB_FILE).write_text(job, "utf-8")


def folder_of_slurm_job(parent: Path) -> Path | None:
    """Return the newest run below ``parent`` with a checkpoint that this SLURM job began with this command, or None.

    A job that was queued again keeps its id, but its runs have new folders.
    """
    job = _of_this_job()
    files = sorted(parent.glob(f"*/{_JOB_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    same = (file.parent for file in files if job and file.read_text("utf-8") == job)
    return next((folder for folder in same if any(folder.glob("checkpoints/*.ckpt"))), None)
