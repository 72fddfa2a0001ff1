"""A Lightning callback: the time of a run's optimizer steps, on the wall and on the cores."""

import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from distilkit.records import write_json

SKIPPED = 5  # steps at the start of each part of a run, which may compile; they count as the mean of the others


class Clock(Callback):
    """Write the seconds of all optimizer steps, and of one, to clock.json: without validation, checkpoints, compilation.

    Core-seconds are the processor time of this process. Other work on the machine hardly changes them.
    """

    def __init__(self) -> None:
        """Start from zero."""
        self.here = 0  # steps of this part of the run
        self.steps, self.timed, self.core, self.wall = 0, 0, 0.0, 0.0
        self.since: tuple[float, float] | None = None  # None: the clock is stopped

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it runs since the step before."""
        self.since = self.since or (time.process_time(), time.perf_counter())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a finished optimizer step."""
        if not batch["is_last"] or self.since is None:
            return
        now = time.process_time(), time.perf_counter()
        self.steps, self.here = self.steps + 1, self.here + 1
        if self.here > SKIPPED:
            self.timed += 1
            self.core += now[0] - self.since[0]
            self.wall += now[1] - self.since[1]
        self.since = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next batch."""
        self.since = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file; a run too short to be timed has no seconds."""
        step = {"core": self.core / self.timed, "wall": self.wall / self.timed} if self.timed else {}
        means = {f"{name}_seconds_per_step": value for name, value in step.items()}
        means |= {f"{name}_seconds": value * self.steps for name, value in step.items()}
        write_json(Path(trainer.default_root_dir) / "clock.json", {"steps": self.steps, **means})

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run adds to."""
        return {name: getattr(self, name) for name in ("steps", "timed", "core", "wall")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the part before."""
        vars(self).update(state_dict)
