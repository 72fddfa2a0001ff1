"""Run the entry points: in this process, where a start costs nothing, or in one of their own."""

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from pytorch_lightning import Callback, LightningModule, Trainer

from distilkit.evaluate.job import Job
from distilkit.objective import Objective
from operations import Watch
from tiny import WORDS

SMALL = (  # steps of 16 blocks in two micro-batches, on one CPU
    "data=text",
    "data.block_size=32",
    "data.global_batch_size=16",
    "data.micro_batch_size=8",
    "data.val_share=0.1",
    "data.max_val_blocks=6",
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
)
QUIET = ("logger=none", "callbacks.progress=null")  # where nobody looks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command line ended: its exit status and what it printed."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def _undone(cwd: Path, arguments: tuple[str, ...]) -> Iterator[None]:
    """Undo what an entry point leaves in the process: folder, arguments, environment, log handlers, threads."""
    folder, argv, environment, threads = Path.cwd(), sys.argv, dict(os.environ), torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    os.chdir(cwd)
    sys.argv = ["job", *arguments]
    torch.set_num_threads(1)  # tiny models, and other processes on the same cores
    try:
        with warnings.catch_warnings():
            yield
    finally:
        patch.stopall()  # of callbacks that a run that broke off did not tear down
        os.chdir(folder)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        for handler in root.handlers[:]:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None


def call(entry: Callable[[], Any], *arguments: str, cwd: Path) -> Outcome:
    """Run an entry point in this process as its command line would, for one job.

    Hydra would compose the config twice, the first time to learn whether it asks for a sweep; here it is told.
    """
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    told = patch.object(Hydra, "get_mode", return_value=RunMode.RUN)
    with _undone(cwd, arguments), told, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            entry()
        except SystemExit as stop:
            code = stop.code or 0
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


def spawn(
    *arguments: str, cwd: Path, environment: Mapping[str, str | None] | None = None, python: str = sys.executable
) -> Outcome:
    """Run ``python *arguments`` in a process of its own; None takes a variable out of the environment."""
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={name: value for name, value in merged.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    return Outcome(code=done.returncode, out=done.stdout, err=done.stderr)


def only(folder: Path, pattern: str) -> Path:
    """Return the one path below a folder that matches."""
    found = sorted(folder.glob(pattern))
    assert len(found) == 1, f"{len(found)} paths match {pattern} below {folder}: {found}"
    return found[0]


class StopAfter(Callback):
    """Break a run after so many optimizer steps, as a crash would; for ``+callbacks.stop``."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.step:
            raise RuntimeError("the power went out")


class Send(Callback):
    """Send this process a signal after so many optimizer steps; for ``+callbacks.send``.

    ``at`` is step, within the next one, validation, save, setup, before the first one, or end, after the last one;
    ``rank`` is the only rank that gets it, else all do. Of a sweep's jobs, the second alone gets it.
    """

    def __init__(self, *, name: str, step: int = 0, at: str = "step", rank: int | None = None, job: int = 1) -> None:
        self.number, self.step, self.at, self.rank = signal.Signals[name], step if job == 1 else -1, at, rank

    def _send(self, trainer: Trainer, *, at: str) -> None:
        here = at == self.at and not trainer.sanity_checking and self.rank in (None, trainer.global_rank)
        if here and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._send(trainer, at="setup")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch["is_first"]:
            self._send(trainer, at="step")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._send(trainer, at="validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._send(trainer, at="save")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._send(trainer, at="end")


class NoteWaits(Callback):
    """Write for each optimizer step which operations made the host wait, one file a rank; for ``+callbacks.waits``."""

    def __init__(self, *, folder: str) -> None:
        self.folder, self.watch = Path(folder), Watch()
        self.by_step: dict[int, list[str]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch["is_last"]:
            self.by_step[trainer.global_step] = self.watch.waits[:]
            self.watch.waits.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.__exit__(None, None, None)
        (self.folder / f"waits-{trainer.global_rank}.json").write_text(json.dumps(self.by_step), "utf-8")


class SendOnce(Callback):
    """Send this process a signal after an optimizer step if ``file`` is there, and delete it; for ``+callbacks.send``."""

    def __init__(self, *, name: str, step: int, file: str) -> None:
        self.number, self.step, self.file = signal.Signals[name], step, Path(file)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.step and self.file.exists():
            self.file.unlink()
            os.kill(os.getpid(), self.number)


class SetClock(Callback):
    """Let each optimizer step take so many seconds, times ``of_rank`` on later ranks; for ``+callbacks.clock``."""

    def __init__(self, *, seconds: float, of_rank: float = 1.0) -> None:
        self.seconds, self.of_rank, self.now = seconds, of_rank, 0.0
        self.patched = patch("distilkit.budget.perf_counter", lambda: self.now)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.seconds *= self.of_rank if trainer.global_rank else 1.0
        self.patched.start()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.now += self.seconds

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.patched.stop()


class NotFinite(Callback):
    """Make the loss of some optimizer steps NaN on one rank, and keep their micro-batches; for ``+callbacks.bad``."""

    batches: ClassVar[list[Any]] = []

    def __init__(self, *, steps: list[int], rank: int = 0) -> None:
        self.steps, self.rank, self.now = steps, rank, False
        self.batches.clear()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plain = Objective.loss

        def loss(*args: Any, **kwargs: Any) -> Any:
            total, terms = plain(*args, **kwargs)
            return total * (math.nan if self.now else 1.0), terms

        self.patched = patch.object(Objective, "loss", loss)
        self.patched.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.now = trainer.global_step in self.steps and trainer.global_rank == self.rank
        if self.now:
            self.batches.append(batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.patched.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.patched.stop()


class Poison(Callback):
    """Make a weight of the student infinite after so many optimizer steps; for ``+callbacks.poison``."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.step:
            with torch.no_grad():
                next(pl_module.student.parameters())[7, 0] = float("inf")


def make_job(
    model: str | Path, *, name: str = "mine", seed: int = 0, tokenizer: str | None = None, **settings: Any
) -> Job:
    """Return a job of distilkit.evaluate for tasks that are measured without its command line."""
    return Job(
        model=str(model),
        revision="main",
        tokenizer=tokenizer,
        sha256="0" * 64,
        name=name,
        seed=seed,
        folder=Path("nowhere"),
        cfg=OmegaConf.create(settings),
    )


def write_rows(folder: Path, *, num_train: int = 160, num_dev: int = 60) -> Path:
    """Write SST-2's layout: the words of a positive sentence are of the first half of the vocabulary."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", num_train), ("dev", num_dev)):
        lines = []
        for _ in range(count):
            positive = rng.random() < 0.5
            half = WORDS[: len(WORDS) // 2] if positive else WORDS[len(WORDS) // 2 :]
            lines.append(f"{' '.join(rng.choices(half, k=rng.randint(1, 9)))}\t{int(positive)}")
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n", "utf-8")
    return folder
