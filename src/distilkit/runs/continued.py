"""Records that go on where a run resumes: metrics.csv, TensorBoard, and the run of Weights & Biases."""

import csv
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

log = logging.getLogger(__name__)


def continue_loggers(loggers: DictConfig, checkpoint: Mapping[str, Any]) -> None:
    """Let the config of W&B name the checkpoint's run, and TensorBoard hide what was logged after its step."""
    for node in loggers.values():
        if node is None:
            continue
        own = {"id": checkpoint["distilkit"].get("wandb_id")} if "wandb" in node.get("_target_", "").lower() else {}
        if node.get("_target_", "").endswith(".TensorBoardLogger"):
            own = {"purge_step": checkpoint["global_step"]}  # Lightning numbers steps from 0
        for name, value in own.items():
            if node.get(name) is None:
                with open_dict(node):
                    node[name] = value


def wandb_id(loggers: Iterable[Logger]) -> str | None:
    """Return the id of the run of Weights & Biases that a logger writes, if there is one."""
    return next((logger.version for logger in loggers if isinstance(logger, WandbLogger)), None)


def continue_records(loggers: Iterable[Logger], *, checkpoint: Path, step: int, row: Mapping[str, float]) -> None:
    """Write what the run of ``checkpoint`` has logged up to its ``step`` before what a resumed run logs.

    ``row`` is what that step has logged, which may have been saved before it was written. TensorBoard's files are
    copied. Later rows are left out, because their steps are trained again.
    """
    before = checkpoint.parents[1]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            there, here = before / Path(logger.log_dir).name, Path(logger.log_dir)
            if there.is_dir() and there.resolve() != here.resolve():
                shutil.copytree(there, here, dirs_exist_ok=True)
        elif isinstance(logger, CSVLogger):
            here = Path(logger.log_dir)
            folder = before if (before / "metrics.csv").is_file() else here  # the checkpoints may be on another disk
            file, kept = folder / "metrics.csv", folder / ".metrics.csv"
            rows = _rows(kept if kept.is_file() else file, step=step)
            if file.is_file() and not kept.is_file() and folder.resolve() == here.resolve():
                file.replace(kept)  # Lightning would delete it before the new one is on the disk
            if not rows:
                log.warning("%s has no metrics.csv, so that this run's begins after step %d", before, step)
            if row and not any(int(each["step"]) == step - 1 and each.get("train/loss") for each in rows):
                rows.append({"step": step - 1, **row})
            for each in rows:
                logger.experiment.log_metrics({name: each[name] for name in each if name != "step"}, int(each["step"]))
            logger.save()
            (here / kept.name).unlink(missing_ok=True)


def _rows(file: Path, *, step: int) -> list[dict[str, Any]]:
    """Read the rows of the first ``step`` steps, without empty cells; the score before them has no epoch.

    A row that a full disk or a power cut has torn is left out.
    """
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(stream)]
    return [row for row in rows if row.get("step", "").isdecimal() and int(row["step"]) + ("epoch" in row) <= step]
