"""Distil a student from a teacher: ``python -m distilkit.train teacher=roberta-base student=half_depth``."""

import logging
import warnings
from pathlib import Path
from typing import Any

import hydra
import transformers
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger

from distilkit.entry import check_keys, check_names, report_errors
from distilkit.errors import UserError
from distilkit.export import read_checkpoint
from distilkit.language_model import check_block_size, num_parameters, task_of
from distilkit.launch import ranks_on_config
from distilkit.malloc import keep_large_buffers
from distilkit.module import DistillationModule
from distilkit.summary import describe, finish

log = logging.getLogger(__name__)


def find_checkpoint(ckpt_path: str | None, out: Path) -> Path | None:
    """Resolve ``ckpt_path``: a file, or ``last`` for the newest last.ckpt among the runs of this name.

    Raises:
        UserError: there is no such file, or it cannot be resumed from.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        found = sorted(out.parent.glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise UserError(f"ckpt_path=last, but no run below {out.parent} has a checkpoint; start without ckpt_path")
        file = found[-1]
    else:
        file = Path(ckpt_path).expanduser()
        if not file.is_file():
            raise UserError(f"ckpt_path={ckpt_path} is no file; give a .ckpt below outputs/.../checkpoints, or last")
    read_checkpoint(file)  # a damaged one is reported before anything is loaded
    return file.resolve()


def train(cfg: DictConfig) -> float:
    """Build, fit, validate and export; return the student's held-out cross-entropy in nats per labelled token."""
    check_keys(cfg)
    check_names(cfg.scheduler, ("scheduler", "warmup_share"), path="scheduler")
    out = Path(cfg.output_dir).resolve()
    if (out / "student").exists():
        raise UserError(f"{out} holds a finished run; choose another hydra.run.dir, or delete {out / 'student'}")
    checkpoint = find_checkpoint(cfg.ckpt_path, out)
    cfg.ckpt_path = str(checkpoint) if checkpoint else None
    seed_everything(cfg.seed, workers=True, verbose=False)

    objective = instantiate(cfg.objective)
    tokenizer = instantiate(cfg.tokenizer)
    teacher = instantiate(cfg.teacher, needs_head=objective.reads_teacher_logits)
    student = instantiate(cfg.student)(teacher=teacher, tokenizer=tokenizer)
    task = task_of(student.config.model_type, student.config.architectures)
    for model, whose in ((student, "the student"), *(((teacher.model, teacher.name),) if teacher else ())):
        check_block_size(model, cfg.data.block_size, name=whose)
    data = instantiate(cfg.data, tokenizer=tokenizer, task=task)
    record = describe(cfg, objective=objective, teacher=teacher, student=student)
    module = DistillationModule(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        task=task,
        objective=objective,
        optimizer=instantiate(cfg.optimizer),
        **cfg.scheduler,
        seed=cfg.seed,
        record=record,
    )
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=list(instantiate(cfg.callbacks).values()),
        logger=list(instantiate(cfg.logger).values()),
    )
    if trainer.is_global_zero:
        OmegaConf.save(cfg, out / "config.yaml", resolve=True)
        sizes = f"{num_parameters(student):,} parameters" + (
            f" of {num_parameters(teacher.model):,}" if teacher else ""
        )
        log.info("student: %s, layers %s; run in %s", sizes, record["layers"], out)
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(record["config"])

    with ranks_on_config(out / "config.yaml"):
        before = _validate(trainer, module, data) if cfg.validate_first and checkpoint is None else {}
        if trainer.is_global_zero:
            log.info("a masked training block: %.300s", data.decoded_sample()) if data.train_blocks else None
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(out / "checkpoints" / "last.ckpt", weights_only=False)
        after = _validate(trainer, module, data)
        if trainer.is_global_zero:
            finish(trainer, module, out=out, before=before, after=after)
    return after["val/nll"]


def _validate(trainer: Trainer, module: DistillationModule, data: Any) -> dict[str, float]:
    """Return the held-out metrics by name."""
    return dict(trainer.validate(module, datamodule=data, verbose=False)[0])


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf", config_name="train")
@report_errors
def main(cfg: DictConfig) -> float:
    """Run one job, and return the metric that sweepers minimise."""
    keep_large_buffers()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Found .* module\\(s\\) in eval mode")  # the teacher, on purpose
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # the run's folder, on purpose
    warnings.filterwarnings(
        "ignore", message="The dirpath has changed"
    )  # a resumed run has a folder and a best of its own
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # batches are cut from a memory map
    warnings.filterwarnings("ignore", message=".*sync_dist=True")  # what is logged is summed over ranks already
    return train(cfg)


if __name__ == "__main__":
    main()
