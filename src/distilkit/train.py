"""Distil a student from a teacher: ``python -m distilkit.train teacher=roberta-base student=half_depth``."""

import logging
import math
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from lightning_fabric.plugins import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from transformers import PreTrainedModel

from distilkit.budget import parse_budget
from distilkit.callbacks import ValidateEvery
from distilkit.cli import (
    check_added,
    check_keys,
    check_names,
    check_type,
    explain_keys,
    in_sweep,
    keep_large_buffers,
    quiet,
    report_errors,
    set_matmul_precision,
)
from distilkit.data import DistillationDataModule
from distilkit.errors import UserError
from distilkit.language_model import (
    check_positions,
    checkpoint_activations,
    compile_backbone,
    lm_of_model,
    num_parameters,
)
from distilkit.layers import METHODS
from distilkit.module import DistillationModule
from distilkit.objective import Objective
from distilkit.precision import choose_precision, emulation
from distilkit.probe import probe
from distilkit.records import read_rows, write_json
from distilkit.runs import same_run
from distilkit.runs.checkpoints import LAST, checkpoints_of, find_checkpoint, is_finished, read_checkpoint
from distilkit.runs.continued import continue_loggers, continue_records
from distilkit.runs.interruption import StopOnSignal, folder_of_slurm_job, note_slurm_job
from distilkit.runs.peers import watching
from distilkit.runs.ranks import ranks_on_config
from distilkit.runs.run_folder import hold
from distilkit.runs.saving import Checkpoints, WholeFiles
from distilkit.runs.signals import ENDING, first_rank, listening, release
from distilkit.runs.storage import writing
from distilkit.runs.sweeps import take_up
from distilkit.runs.turns import BUILT, TakeTurns, Turn, once, own_turn
from distilkit.student import measure_layers
from distilkit.summary import describe, finish, print_result
from distilkit.teacher import Teacher
from distilkit.teacher_cache import at_labelled_tokens, find_states
from distilkit.trim.model import trim_teacher
from distilkit.watch.memory import free_bytes, megabytes
from distilkit.watch.tracking import closing, log_student
from distilkit.watch.trackio_logger import TrackioLogger

log = logging.getLogger(__name__)

_CURE = "set hydra.run.dir (from Python: out) to a folder on another disk"

_TYPES: dict[str, Any] = {  # of the keys of train.yaml that no target reads
    **dict.fromkeys(("compile", "activation_checkpointing", "validate_first"), bool),
    **dict.fromkeys(("ckpt_path", "baseline"), str | int | None),  # a folder may have a number as its name
    **dict.fromkeys(("card", "row"), dict | None),
    **{"seed": int, "cache_dir": str, "max_skipped": int, "may_change": list[str]},
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training that is ready to run: its config and folder, the checkpoint to resume from, and what is trained.

    ``logged`` is the step of the checkpoint, and what that step has logged.
    """

    cfg: DictConfig
    out: Path
    checkpoint: Path | None
    logged: tuple[int, dict[str, float]] | None
    module: DistillationModule
    data: DistillationDataModule
    trainer: Trainer


def build(cfg: DictConfig) -> Job:
    """Check the config and build models, data and trainer from it; write nothing into the run's folder."""
    _check_config(cfg)
    _apply_row(cfg)
    budget = budget_of(cfg)
    out = Path(cfg.output_dir).resolve()
    if in_sweep() and (cfg.ckpt_path in (None, "last") or checkpoints_of(out)):
        cfg.ckpt_path = "auto"  # the job's own goes before one that the command names for all jobs
    if (out / "student").exists() and (is_finished(out) or cfg.ckpt_path != "auto"):
        raise UserError(
            f"{out} holds a finished run; choose another hydra.run.dir (from Python: out), or delete {out / 'student'}"
        )
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    checkpoint = find_checkpoint(
        cfg.ckpt_path,
        out,
        config=config,
        differs=lambda record: bool(same_run.differences(record, cfg)),
        in_sweep=in_sweep(),
        requeued=folder_of_slurm_job(out.parent) if cfg.ckpt_path == "auto" else None,
    )
    record = logged = None
    saved: Any = read_checkpoint(checkpoint) if checkpoint else None
    choose_precision_of(cfg, saved)
    if checkpoint:
        same_run.check(saved, cfg, file=checkpoint)
        continue_loggers(cfg.logger, saved)
        record, logged = saved["distilkit"]["record"], (saved["global_step"], saved["distilkit"].get("row") or {})
    del saved  # its tensors are mapped, which would keep the space of a file that is replaced
    cfg.ckpt_path = str(checkpoint) if checkpoint else None
    cfg.baseline = find_baseline(cfg.baseline, out, in_sweep=in_sweep())
    set_matmul_precision(cfg.matmul_precision)
    seed_everything(cfg.seed, workers=True, verbose=False)

    objective = instantiate(cfg.objective)
    tokenizer = instantiate(cfg.tokenizer)
    needs_head = objective.reads_teacher_logits
    teacher = once(
        ("teacher", needs_head, OmegaConf.to_yaml(cfg.teacher), OmegaConf.to_yaml(cfg.tokenizer)),
        lambda: trim_teacher(instantiate(cfg.teacher, needs_head=needs_head), tokenizer),
    )
    trainer, models = build_trainer(cfg), {"teacher": teacher, "tokenizer": tokenizer}
    choice = _measured_layers(cfg, models, objective=objective, trainer=trainer, record=record)
    student = instantiate(cfg.student)(**models)
    _check_models(cfg, models, student=student)
    _apply_options(cfg, teacher=teacher, student=student)
    lm = teacher.lm if teacher else lm_of_model(student)
    data = instantiate(cfg.data, tokenizer=tokenizer, lm=lm)
    if cfg.teacher_cache.epochs:
        objective = at_labelled_tokens(objective, masking=data.masking, lm=lm)
        data.teacher_states = find_states(data, teacher)
        if first_rank():
            log.info("the teacher's states come from the cache: soft targets and cosine are taken at masked tokens")
    scheduler: Any = OmegaConf.to_container(cfg.scheduler, resolve=True)  # plain lists, for checkpoints
    module = DistillationModule(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        lm=lm,
        objective=objective,
        optimizer=instantiate(cfg.optimizer),
        scheduler=scheduler["name"],
        warmup_share=scheduler["warmup_share"],
        scheduler_kwargs=scheduler["kwargs"],
        seed=cfg.seed,
        budget=budget,
        max_skipped=cfg.max_skipped if cfg.non_finite == "skip" else 0,
        record=describe(cfg, objective=objective, teacher=teacher, student=student, corpus=data.corpus, choice=choice),
    )
    module.check_precision(trainer)
    return Job(cfg=cfg, out=out, checkpoint=checkpoint, logged=logged, module=module, data=data, trainer=trainer)


def run(job: Job) -> float:
    """Fit, validate and export a job; return the student's held-out cross-entropy in nats per labelled token, or nan.

    It is nan where the trainer's ``limit_val_batches`` is 0, so that nothing is scored.
    """
    with closing(job.trainer.loggers):
        return _run(job)


def _run(job: Job) -> float:
    trainer, module = job.trainer, job.module
    with writing(job.out, cure=_CURE):
        hold(job.out)
        _record_config(job)
    if job.checkpoint and job.logged and trainer.is_global_zero:
        step, row = job.logged
        continue_records(trainer.loggers, checkpoint=job.checkpoint, step=step, row=row)
    device = trainer.strategy.root_device
    if device.type == "cuda" and torch.cuda.is_initialized():  # by an earlier job in this process
        torch.cuda.reset_peak_memory_stats(device)
    more = [callback.requeue for callback in trainer.callbacks if isinstance(callback, StopOnSignal)]  # type: ignore[attr-defined]
    # Trainings that take turns have one process, and no ranks.
    ranks: AbstractContextManager[None] = nullcontext()
    if own_turn() is None:
        ranks = ranks_on_config(job.out / "config.yaml", launcher=trainer.strategy.launcher)
    with listening(*ENDING, *more), ranks, writing(job.out, cure=_CURE):
        trainer.fit(module, datamodule=job.data, ckpt_path=job.checkpoint)
        trainer.save_checkpoint(job.out / "checkpoints" / LAST, weights_only=False)
        if trainer.global_step == 0:  # trainer.max_steps=0
            module.after, module.after_blocks = module.before, module.before_blocks
        # Not scored yet: a finished run was resumed, or validation was taken out of the callbacks.
        if not module.after and trainer.limit_val_batches:
            _score(job)
        if trainer.is_global_zero:
            finish(trainer, module, out=job.out, baseline=job.cfg.baseline)
        release()
    for logger in trainer.loggers:
        if module.verdict and isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("verdict", module.verdict.line, trainer.global_step)
        if module.verdict and isinstance(logger, TrackioLogger):
            logger.log_text("verdict", module.verdict.line, step=trainer.global_step)
            logger.finalize("success")
        if module.verdict and isinstance(logger, WandbLogger):
            logger.experiment.summary["verdict"] = module.verdict.line
            if any((node or {}).get("log_model") for node in (job.cfg.logger or {}).values()):
                log_student(logger, job.out / "student", metadata={**asdict(module.verdict), **module.after})
    return module.after.get("val/nll", math.nan)


def find_baseline(baseline: str | None, out: Path, *, in_sweep: bool = False) -> str | None:
    """Resolve ``baseline``, the folder or summary.json of a finished run; None for ``out`` itself.

    A sweep goes on without one, after a warning: that job may have failed.
    """
    if baseline is None:
        return None
    folder = Path(str(baseline)).expanduser().resolve()
    folder = folder.parent if folder.name == "summary.json" else folder
    if folder == out:
        return None
    missing = [name for name in ("summary.json", "rows-val.npz") if not (folder / name).is_file()]
    if not missing:
        read_rows(folder, "val")  # damaged ones are reported before training
        return str(folder)
    found = f"baseline={baseline} has no {missing[0]}"
    if not in_sweep:
        raise UserError(f"{found}; give the folder of a finished run of this version, or baseline=null")
    log.warning("%s, and is not compared with: its job failed, or comes later", found)
    return None


def _check_config(cfg: DictConfig) -> None:
    """Refuse unknown keys, missing values, and the scheduler group of earlier versions."""
    check_added(cfg, config="train/train.yaml")
    check_keys(cfg)
    if cfg.data.get("shard") is not None:
        found = f"data.shard={cfg.data.shard} is for distilkit.prepare, and a training reads all text"
        raise UserError(f"{found}; leave it out")
    if not isinstance(cfg.scheduler, DictConfig):
        name = {"constant": "constant_with_warmup", None: "constant"}.get(cfg.scheduler, cfg.scheduler)
        raise UserError(f"scheduler={cfg.scheduler}, but it is no group of options; set scheduler.name={name}")
    check_names(cfg.scheduler, ("name", "warmup_share", "kwargs"), path="scheduler")
    for key, kind in _TYPES.items():
        if not OmegaConf.is_interpolation(cfg, key):
            check_type(cfg[key], kind, name=key)
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed}, but it must be between 0 and {2**32 - 1}")
    if cfg.sweep.share_teacher and not in_sweep():
        log.warning("sweep.share_teacher=true is for the jobs of a sweep (-m), and has no effect here")
    if cfg.non_finite not in ("stop", "skip"):
        raise UserError(f"non_finite={cfg.non_finite}, but it takes stop or skip")
    if cfg.max_skipped < 1:
        raise UserError(f"max_skipped={cfg.max_skipped}, but it must be at least 1; non_finite=stop skips none")
    check_names(cfg.card or (), ("license", "language", "data_license", "energy"), path="card")


def budget_of(cfg: DictConfig) -> float | None:
    """Return the seconds that the training may take, or None; nothing else may end it too."""
    try:
        given = cfg.budget
    except InterpolationResolutionError as error:  # another run, whose seconds it takes, has none
        raise UserError(f"budget cannot be read: {str(error).splitlines()[0]}") from error
    seconds = parse_budget(given)
    ends = {"max_steps": -1, "max_epochs": -1, "max_time": None}
    for name, none in ends.items() if seconds is not None else ():
        if (value := cfg.trainer.get(name)) != none:
            cure = f"drop one of the two: set trainer.{name}={'null' if none is None else none}, or budget=null"
            raise UserError(f"budget={given} and trainer.{name}={value} would both end the training; {cure}")
    return seconds


def _apply_row(cfg: DictConfig) -> None:
    """Set what a sweep's row asks for, which wins over the command line."""
    try:
        row: Any = OmegaConf.to_container(cfg.row, resolve=True) if cfg.row else {}
    except InterpolationResolutionError as error:  # the run that the row reads has failed
        raise UserError(str(error).splitlines()[0].rpartition("interpolation: ")[2]) from error
    try:
        cfg.merge_with({**row, "row": row or None})
    except ConfigKeyError as error:
        raise UserError(f"row={row} sets an unknown key: {str(error).splitlines()[0]}") from error


def _measured_layers(
    cfg: DictConfig, models: dict[str, Any], *, objective: Objective, trainer: Trainer, record: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Measure which layers the student keeps, or read it from a checkpoint's ``record``; None where nothing is measured.

    The config then names these layers, so that ranks that this process starts do not measure again.
    """
    if (method := cfg.student.get("layers")) not in METHODS:
        return None
    if record is not None:
        choice = record.get("layer_choice") or {"method": None}
        if choice["method"] != method or cfg.student.num_layers not in (None, len(record["layers"])):
            found = f"student.layers={method}, but the student of {cfg.ckpt_path} has layers {record['layers']}"
            raise UserError(f"{found}, chosen in another way; resume with the same settings")
    else:
        trial = instantiate(cfg.student)(**models, layers="first")  # what is refused is refused before it is measured
        _check_models(cfg, models, student=trial)
        objective.check_models(student=trial, teacher=models["teacher"].model, lm=models["teacher"].lm)
        data = instantiate(cfg.data, tokenizer=models["tokenizer"], lm=models["teacher"].lm)
        place, names = trainer.strategy, ("layers", "num_layers", "num_blocks", "init")
        device = place.root_device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=str(trainer.precision).startswith("bf16")):
            measured = measure_layers(
                **models,
                **{name: cfg.student[name] for name in names},
                draw=lambda count: [place.batch_to_device(each, device) for each in data.draw(count)],
            )
        choice = asdict(measured)
    cfg.student.layers = choice["layers"]
    return choice


def _check_models(cfg: DictConfig, models: dict[str, Any], *, student: PreTrainedModel) -> None:
    """Check that training may assume of both models what it does, and that the blocks fit them."""
    apart = cfg.data.packing == "blocks" and not cfg.data.attend_across_documents
    probe(**models, student=student, apart=apart, max_length=cfg.data.block_size)
    teacher: Teacher | None = models["teacher"]
    for model, name in [(student, "the student"), *([(teacher.model, teacher.name)] if teacher else [])]:
        check_positions(model, cfg.data.block_size, key="data.block_size", name=name)


def _apply_options(cfg: DictConfig, *, teacher: Teacher | None, student: PreTrainedModel) -> None:
    """Compile both models and checkpoint activations as the config says."""
    if cfg.compile:
        for model in (student, *([teacher.model] if teacher else [])):
            compile_backbone(model)
    if cfg.activation_checkpointing:
        checkpoint_activations(student)


def choose_precision_of(cfg: DictConfig, saved: Mapping[str, Any] | None) -> None:
    """Set ``trainer.precision=auto`` to what fits the device, and log why; ranks started from here read the choice."""
    if cfg.trainer.get("precision") != "auto":
        return
    was = saved["distilkit"]["record"].get("config", {}).get("trainer", {}).get("precision") if saved else None
    alone = cfg.trainer.get("devices", 1) in (1, "1", "auto") and cfg.trainer.get("num_nodes", 1) == 1
    accelerator = str(cfg.trainer.get("accelerator", "auto"))
    cfg.trainer.precision, reason = once(
        ("precision", was), lambda: choose_precision(accelerator=accelerator, before=was, alone=alone)
    )
    if first_rank():
        log.info("trainer.precision=auto takes %s: %s", cfg.trainer.precision, reason)


def build_trainer(cfg: DictConfig) -> Trainer:
    """Build the trainer with its callbacks and loggers."""
    plain: Any = {"_convert_": "all"}  # Lightning compares types: max_time may be a dict, but not a DictConfig
    found = {group: instantiate(cfg[group] or {}, **plain) for group in ("callbacks", "logger")}
    for group, kind in (("callbacks", Callback), ("logger", Logger)):
        for name, each in found[group].items():
            if not isinstance(each, kind | None):
                raise UserError(f"{group}.{name}={each} is no {kind.__name__} of Lightning; set {group}.{name}=null")
    callbacks = [callback for callback in found["callbacks"].values() if callback is not None]
    bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    with_bar = cfg.trainer.get("enable_progress_bar", bool(bars))  # without one, Lightning would take its own
    callbacks = [callback for callback in callbacks if with_bar or callback not in bars]
    callbacks += [TakeTurns(turn)] if (turn := own_turn()) else []
    trainer: Trainer = instantiate(
        cfg.trainer,
        **plain,
        callbacks=callbacks,
        enable_progress_bar=with_bar,
        logger=[logger for logger in found["logger"].values() if logger is not None],
        # Lightning skips it on a resume. Without training it is the only score.
        num_sanity_val_steps=-1 if cfg.validate_first or cfg.trainer.max_steps == 0 else 0,
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of the user's own
        keep = next((callback.keep for callback in callbacks if isinstance(callback, Checkpoints)), 1)
        trainer.strategy.checkpoint_io = WholeFiles(keep=keep)
    if cfg.budget is None and trainer.max_epochs == trainer.max_steps == -1:
        without = "trainer.max_epochs and trainer.max_steps are both -1, without end"
        raise UserError(f"{without}; set one of them above 0, or a budget as budget=40m")
    for name, value, least in (
        ("gradient_clip_val", trainer.gradient_clip_val, 0),
        ("log_every_n_steps", trainer.log_every_n_steps, 0),  # type: ignore[attr-defined]  # set by a connector
    ):
        if value is not None and value < least:
            raise UserError(f"trainer.{name}={value}, but it must be at least {least}; {least} turns it off")
    if trainer.check_val_every_n_epoch is not None and any(isinstance(each, ValidateEvery) for each in callbacks):
        every = f"trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch}"
        raise UserError(f"{every}, but callbacks.validation counts optimizer steps; set one of the two to null")
    given = f"trainer.strategy={cfg.trainer.get('strategy')}"
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError(f"{given} is not supported; set trainer=fsdp to shard the models")
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # ddp_spawn, ddp_fork, and auto in a notebook
        copies = f"{given} trains in copies of this process"
        raise UserError(f"{copies}, which cannot export from them; set trainer=ddp, or trainer.devices=1")
    if not trainer.limit_val_batches:
        log.warning("trainer.limit_val_batches=0: the student is never scored, so that the metric of the run is nan")
    if str(trainer.precision).startswith("bf16") and (slow := emulation(trainer.strategy.root_device)):
        log.warning("%s", slow)
    return trainer


def wait_for_others(job: Job, turn: Turn) -> None:
    """Wait until all trainings of this process are built; refuse students that do not fit into memory together."""
    device, kept = job.trainer.strategy.root_device, turn.turns.kept
    trained = sum(each.numel() for each in job.module.student.parameters() if each.requires_grad)
    # In float32: a gradient and AdamW's two means; on a GPU the weights, too, which are not there yet.
    kept["bytes"] = kept.get("bytes", 0) + trained * (12 if device.type == "cpu" else 16)
    kept.setdefault("precisions", set()).add(str(job.trainer.precision))
    turn.wait_for_others(BUILT)
    if len(kept["precisions"]) > 1:
        found = f"the jobs have trainer.precision {' and '.join(sorted(kept['precisions']))}, but one teacher"
        raise UserError(f"{found}; set it, or leave sweep.share_teacher=true out")
    free = turn.once("free", lambda: free_bytes(device))
    if kept["bytes"] > free:
        needs = f"sweep.share_teacher=true needs {megabytes(kept['bytes'] / 2**20)} for gradients and optimizers"
        cure = "leave it out, and read the teacher from the cache: teacher_cache.epochs"
        raise UserError(f"{needs} of all students, but {megabytes(free / 2**20)} are free; {cure}")


def _record_config(job: Job) -> None:
    """Write the resolved config into the run's folder, pass it to the loggers, and log the sizes of both models."""
    module, record = job.module, job.module.record
    if job.trainer.is_global_zero:
        job.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(job.out / "student", ignore_errors=True)  # of a run that was killed before its summary
        OmegaConf.save(job.cfg, job.out / "config.yaml", resolve=True)
        note_slurm_job(job.out)
        if record["layer_choice"]:
            write_json(job.out / "layer_choice.json", record["layer_choice"])
        sizes = [num_parameters(model) for model in (module.student, module.teacher) if model is not None]
        if module.objective.reads_teacher and sizes[0] > sizes[1]:
            log.warning("the student has more parameters than its teacher: %s against %s", *(f"{n:,}" for n in sizes))
        of = "" if module.teacher is None else f" of {sizes[1]:,}"
        kept = f", layers {record['layers']}" if record["layers"] else ""
        log.info("student: %s parameters%s%s; run in %s", f"{sizes[0]:,}", of, kept, job.out)
        if job.checkpoint:
            log.info("resuming from %s", job.checkpoint)
    for logger in job.trainer.loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(record["config"])


def _score(job: Job) -> None:
    """Score the student after a fit that did not."""
    if step := job.trainer.global_step:  # a fit logs a validation before it counts the step
        job.trainer.fit_loop.epoch_loop._batches_that_stepped = step - 1
    job.trainer.validate(job.module, datamodule=job.data, verbose=False)


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.train", config_name="train")
@report_errors
def main(cfg: DictConfig) -> float:
    """Run one job, and return the metric that sweepers minimise."""
    keep_large_buffers()
    if in_sweep() and (score := take_up(Path(cfg.output_dir))) is not None:
        return score
    with quiet(), watching(num_nodes=cfg.trainer.get("num_nodes", 1), seconds=cfg.rank_timeout):
        job = build(cfg)
        if turn := own_turn():
            wait_for_others(job, turn)
        nll = run(job)
    if job.trainer.is_global_zero:
        print(f"{turn.name}:\n" if turn else "", end="")
        print_result(job.out, job.module)
    return nll


if __name__ == "__main__":
    main()
