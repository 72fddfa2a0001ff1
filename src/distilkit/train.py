"""Distil a student from a teacher: ``python -m distilkit.train teacher=roberta-base student=half_depth``."""

import logging
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.strategies import FSDPStrategy

from distilkit.callbacks import ValidateEvery
from distilkit.cli import check_keys, check_names, prepare_process, ranks_on_config, report_errors, set_matmul_precision
from distilkit.errors import UserError
from distilkit.export import read_checkpoint
from distilkit.language_model import check_positions, checkpoint_activations, compile_backbone, lm_of, num_parameters
from distilkit.module import DistillationModule
from distilkit.summary import describe, finish

log = logging.getLogger(__name__)


def find_checkpoint(ckpt_path: str | None, out: Path, *, in_sweep: bool = False) -> Path | None:
    """Resolve ``ckpt_path``: a file, or ``last`` for the newest last.ckpt among the runs of this name.

    Raises:
        UserError: there is no such file, or it cannot be resumed from.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        if in_sweep:  # its neighbours there are jobs of other settings
            raise UserError("ckpt_path=last names no run of a sweep; give the file, below outputs/.../checkpoints")
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
    checkpoint = find_checkpoint(cfg.ckpt_path, out, in_sweep=HydraConfig.get().mode == RunMode.MULTIRUN)
    cfg.ckpt_path = str(checkpoint) if checkpoint else None
    set_matmul_precision(cfg.matmul_precision)
    seed_everything(cfg.seed, workers=True, verbose=False)

    objective = instantiate(cfg.objective)
    tokenizer = instantiate(cfg.tokenizer)
    teacher = instantiate(cfg.teacher, needs_head=objective.reads_teacher_logits)
    student = instantiate(cfg.student)(teacher=teacher, tokenizer=tokenizer)
    lm = lm_of(student.config.model_type, student.config.architectures)
    for model, whose in ((student, "the student"), *(((teacher.model, teacher.name),) if teacher else ())):
        check_positions(model, cfg.data.block_size, key="data.block_size", name=whose)
        if cfg.compile:
            compile_backbone(model)
    if cfg.activation_checkpointing:
        checkpoint_activations(student)
    data = instantiate(cfg.data, tokenizer=tokenizer, lm=lm)
    record = describe(cfg, objective=objective, teacher=teacher, student=student, corpus=data.corpus)
    module = DistillationModule(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        lm=lm,
        objective=objective,
        optimizer=instantiate(cfg.optimizer),
        **cfg.scheduler,
        seed=cfg.seed,
        record=record,
    )
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=[callback for callback in instantiate(cfg.callbacks).values() if callback is not None],
        logger=[logger for logger in instantiate(cfg.logger).values() if logger is not None],
        num_sanity_val_steps=-1 if cfg.validate_first else 0,  # Lightning skips it on a resume
    )
    if trainer.max_epochs == trainer.max_steps == -1:
        raise UserError("trainer.max_epochs and trainer.max_steps are both -1, without end; set one of them above 0")
    sharded = isinstance(trainer.strategy, FSDPStrategy)
    if sharded and not any(isinstance(callback, ValidateEvery) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError(
            "callbacks.validation=null, but with trainer=fsdp the student is scored in training or never; "
            "leave callbacks.validation as it is"
        )
    if trainer.is_global_zero:
        OmegaConf.save(cfg, out / "config.yaml", resolve=True)
        sizes = f"{num_parameters(student):,} parameters" + (
            f" of {num_parameters(teacher.model):,}" if teacher else ""
        )
        kept = f", layers {record['layers']}" if record["layers"] else ""
        log.info("student: %s%s; run in %s", sizes, kept, out)
        if checkpoint:
            log.info("going on from %s", checkpoint)
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(record["config"])

    if torch.cuda.is_initialized():  # by an earlier job of a sweep, which shares its process
        torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
    with ranks_on_config(out / "config.yaml"):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(out / "checkpoints" / "last.ckpt", weights_only=False)
        if not module.after:  # a finished run was resumed, or validation was taken out of the callbacks
            if sharded:  # it cannot shard twice
                raise UserError(
                    f"{checkpoint or out} was trained to its end before, and trainer=fsdp cannot score it again; "
                    f"export it with python -m distilkit.export ckpt={out / 'checkpoints' / 'last.ckpt'} out=my-student"
                )
            trainer.validate(module, datamodule=data, verbose=False)
        if trainer.is_global_zero:
            finish(trainer, module, out=out)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):  # or its last records are written when this process is gone
            logger.experiment.finish()
    return module.after["val/nll"]


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="train")
@report_errors
def main(cfg: DictConfig) -> float:
    """Run one job, and return the metric that sweepers minimise."""
    prepare_process()
    return train(cfg)


if __name__ == "__main__":
    main()
