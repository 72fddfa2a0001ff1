"""Score a model on a task: ``python -m distilkit.evaluate model=<folder or hub id> task=sst2``."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.cli import check_keys, check_names, keep_large_buffers, quiet, report_errors, set_matmul_precision
from distilkit.errors import UserError
from distilkit.evaluate.finetune import (
    NUMBERS,
    Batches,
    FinetuningModule,
    FinetuningTask,
    Logits,
    check_numbers,
    hold_out,
)
from distilkit.evaluate.models import check_same_vocabulary, load_task_model, load_task_tokenizer, weights_id
from distilkit.language_model import check_positions, num_parameters, num_parameters_without_embeddings
from distilkit.model_card import add_scores
from distilkit.records import FILE, Result, cost, model_name, read_file, read_results, write_json, write_results
from distilkit.report.page import print_table
from distilkit.report.quality import results_markdown

log = logging.getLogger(__name__)


_WHERE = {  # settings of the trainer that decide no score
    "accelerator",
    "devices",
    "log_every_n_steps",
    "enable_model_summary",
    "enable_progress_bar",
    "default_root_dir",
}


def check_settings(cfg: DictConfig) -> None:
    """Make sure that keys are known and numbers within their limits, before anything is read.

    Raises:
        UserError: one is not.
    """
    check_keys(cfg)
    for group in ("finetune", "distil"):
        check_names(cfg[group], [key.partition(".")[2] for key in NUMBERS if key.startswith(group)], path=group)
    patience = cfg.finetune.patience
    values = {key: OmegaConf.select(cfg, key) for key in NUMBERS}
    check_numbers({key: value for key, value in values.items() if key != "finetune.patience" or patience is not None})
    if patience is not None and not cfg.finetune.held_out:
        raise UserError(
            f"finetune.patience={patience} and finetune.held_out={cfg.finetune.held_out}: early stopping needs rows to choose "
            "by, for example finetune.held_out=0.1"
        )
    if cfg.teacher is not None and not cfg.finetune.epochs:
        raise UserError(
            "finetune.epochs=0 trains nothing, so that a teacher is of no use; set teacher=null, or epochs above 0"
        )


def job_id(cfg: DictConfig, *, teacher_id: str | None, model_id: str) -> str:
    """Return a short hash of everything that decides a score but the seed and the machine."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    decisive = {name: settings[name] for name in ("task", "finetune", "tokenizer")} | product_precision(cfg)
    decisive |= {"model": model_id}
    decisive |= {"trainer": {key: value for key, value in settings["trainer"].items() if key not in _WHERE}}
    decisive |= {"teacher": teacher_id, "distil": settings["distil"]} if teacher_id else {}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:8]


def product_precision(cfg: DictConfig) -> dict[str, str]:
    """Return the precision of float32 products where it is not torch's own, to tell such scores from the others."""
    return {} if cfg.matmul_precision == "highest" else {"matmul_precision": cfg.matmul_precision}


def build_trainer(cfg: DictConfig, *, folder: Path) -> Trainer:
    """Build the trainer, with a checkpoint at each epoch to resume from, and early stopping where it is asked for.

    Raises:
        UserError: the trainer has more than one device.
    """
    patience = cfg.finetune.patience
    callbacks: list[Callback] = []
    if cfg.trainer.enable_progress_bar:
        callbacks.append(RichProgressBar())
    if patience is not None:
        callbacks.append(EarlyStopping(monitor="held_out", mode="max", patience=patience))
        callbacks.append(
            ModelCheckpoint(
                folder / "checkpoints",
                filename="best",
                monitor="held_out",
                mode="max",
                enable_version_counter=False,
                save_weights_only=True,
            )
        )
    # After the best one, whose state it holds.
    callbacks.append(
        ModelCheckpoint(
            folder / "checkpoints", filename="last", enable_version_counter=False, save_on_train_epoch_end=True
        )
    )
    loggers = [logger for logger in instantiate(cfg.logger).values() if logger is not None]
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if cfg.finetune.held_out else 0,
    )
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices} makes {trainer.world_size} processes, but a model is fine-tuned on one "
            "device; set trainer.devices=1, and run seeds and tasks side by side with a launcher"
        )
    return trainer


def load_models(
    cfg: DictConfig, task: FinetuningTask
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel | None]:
    """Load the model with a new head, or its own where nothing is trained, its tokenizer, and the teacher, if any.

    Raises:
        UserError: one cannot be loaded, or they do not fit each other or the task.
    """

    def load(name: str, revision: str, tokenizer_name: str | None, *, has_head: bool) -> tuple[Any, Any]:
        hub = {"revision": revision, "trust_remote_code": cfg.trust_remote_code}
        model = load_task_model(name, auto_class=task.auto_class, head=task.head, needs_head=has_head, **hub)
        if has_head:
            task.check_head(model, name=name)
        tokenizer = load_task_tokenizer(name, tokenizer=tokenizer_name, vocabulary=int(model.config.vocab_size), **hub)
        check_positions(model, task.max_length, key="task.max_length", name=name)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    model, tokenizer = load(cfg.model, cfg.revision, cfg.tokenizer, has_head=not cfg.finetune.epochs)
    if cfg.teacher is None:
        return model, tokenizer, None
    teacher, theirs = load(cfg.teacher, "main", None, has_head=True)
    check_same_vocabulary(tokenizer, theirs, name=cfg.teacher)
    return model, tokenizer, teacher


def fit(trainer: Trainer, module: FinetuningModule, data: Batches, *, checkpoints: Path, takes_best: bool) -> None:
    """Fine-tune, from where a broken run stopped; ``takes_best`` ends with the weights of the best epoch."""
    last = checkpoints / "last.ckpt"
    if last.is_file():
        log.info("going on from %s", last)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=False)
    if takes_best:
        best = torch.load(checkpoints / "best.ckpt", map_location="cpu", weights_only=True)
        module.load_state_dict(best["state_dict"], strict=False)  # the teacher is in no checkpoint


def finetune_and_score(cfg: DictConfig, task: FinetuningTask, *, folder: Path, name: str, model_id: str) -> Result:
    """Fine-tune a model on a task and score it; predictions and the model are written into the job's folder."""
    trains = cfg.finetune.epochs > 0
    seed_everything(cfg.seed, workers=True, verbose=False)
    model, tokenizer, teacher = load_models(cfg, task)
    scored = task.scored_examples()
    kept, held_out = hold_out(task.train_examples() if trains else [], cfg.finetune.held_out)
    data = Batches(
        train=task.encode(kept, tokenizer, train=True),
        held_out=task.encode(held_out, tokenizer, train=False),
        held_out_examples=held_out,
        tokenizer=tokenizer,
        batch_size=cfg.finetune.batch_size,
        seed=cfg.seed,
    )
    knobs = {key: cfg.finetune[key] for key in ("lr", "weight_decay", "warmup_share")}
    module = FinetuningModule(model=model, teacher=teacher, task=task, **knobs, **cfg.distil, seed=cfg.seed)
    trainer = build_trainer(cfg, folder=folder)
    if trains:
        takes_best = cfg.finetune.patience is not None
        fit(trainer, module, data, checkpoints=folder / "checkpoints", takes_best=takes_best)

    start, num_scored, scores, held_out_score = time.perf_counter(), 0, {}, None
    model.eval()
    if held_out:
        held_out_score = fmean(
            task.scores(predict(trainer, module, data, data.held_out), data.held_out, held_out).values()
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in scored.items():
        features = task.encode(examples, tokenizer, train=False)
        num_scored += sum(len(feature["input_ids"]) for feature in features)
        logits = predict(trainer, module, data, features)
        for metric, value in task.scores(logits, features, examples).items():
            scores[f"{split}/{metric}" if len(scored) > 1 else metric] = value
        write_json(folder / f"predictions-{split}.json", task.predictions(logits, features, examples))
    if cfg.save_model and trains:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    for logger in trainer.loggers:
        logger.log_metrics({f"{task.name}/{metric}": value for metric, value in scores.items()})
        logger.save()
        if isinstance(logger, WandbLogger):  # or its last records are written when this process is gone
            logger.experiment.finish()
    spent = cost(
        seconds=module.seconds + time.perf_counter() - start,
        tokens=module.tokens_seen + num_scored,
        device=str(trainer.strategy.root_device),
    )
    return Result(
        name=name,
        model=cfg.model,
        sha256=model_id,
        model_type=str(model.config.model_type),
        parameters=num_parameters(model),
        parameters_without_embeddings=num_parameters_without_embeddings(model),
        task=task.name,
        kind="finetuned",
        seed=cfg.seed,
        settings=recorded_settings(cfg, vocabulary=len(tokenizer)),
        scores=scores,
        score=fmean(scores.values()),
        held_out=held_out_score,
        teacher={"name": cfg.teacher, **cfg.distil} if teacher is not None else None,
        details={"rows": {split: len(examples) for split, examples in scored.items()}, "train_rows": len(kept)},
        cost=spent,
    )


def recorded_settings(cfg: DictConfig, *, vocabulary: int) -> dict[str, Any]:
    """Return the settings that a reader of a score wants to see beside it."""
    task = {key: value for key, value in cfg.task.items() if isinstance(value, int | float | bool)}
    other = {"precision": str(cfg.trainer.precision), "vocabulary": vocabulary}
    return {**cfg.finetune, **task, **other, **({"tokenizer": cfg.tokenizer} if cfg.tokenizer else {})}


def predict(trainer: Trainer, module: FinetuningModule, data: Batches, features: Sequence[Any]) -> list[Logits]:
    """Return each feature's logits, in their order.

    Raises:
        UserError: one is not finite.
    """
    found: dict[int, Logits] = {}
    for part in trainer.predict(module, data.ordered(features)) or []:
        found |= part
    if not all(each.isfinite().all() for logits in found.values() for each in logits):
        raise UserError("the model's predictions are not finite; lower finetune.lr, or set trainer.precision=32-true")
    return [found[row] for row in range(len(features))]


def evaluate(cfg: DictConfig) -> float | None:
    """Run one job, unless it is done, and return the score on rows held out for choosing, if any.

    The split that is scored is not to be chosen by, and so a sweeper does not see it.
    """
    check_settings(cfg)
    set_matmul_precision(cfg.matmul_precision)
    for key in ("model", "teacher", "tokenizer"):
        if cfg[key] is not None and Path(cfg[key]).expanduser().is_dir():
            cfg[key] = str(Path(cfg[key]).expanduser())
    if cfg.task.get("device") == "auto" and cfg.trainer.accelerator == "cpu":
        cfg.task.device = "cpu"
    task = instantiate(cfg.task)
    name = cfg.name or model_name(cfg.model)
    model_id = weights_id(cfg.model, revision=cfg.revision)
    teacher_id = None if cfg.teacher is None else weights_id(cfg.teacher, revision="main")
    key = job_id(cfg, teacher_id=teacher_id, model_id=model_id)
    folder = (Path(cfg.output_dir).expanduser() / name / task.name / f"seed{cfg.seed}-{key}").resolve()
    keeps = cfg.save_model and cfg.finetune.epochs and not hasattr(task, "measure")
    if (folder / FILE).is_file() and ((folder / "model").is_dir() or not keeps):
        log.info("already scored; delete %s to do it again", folder)
        results = read_file(folder / FILE)
    else:
        cfg.output_dir, cfg.name = str(folder), name  # where loggers write
        if hasattr(task, "measure"):
            if cfg.trust_remote_code:
                raise UserError(f"trust_remote_code=true is not for task={task.name}, which runs no code of a model")
            results = task.measure(
                model=cfg.model, revision=cfg.revision, tokenizer=cfg.tokenizer, name=name, seed=cfg.seed
            )
        else:
            results = [finetune_and_score(cfg, task, folder=folder, name=name, model_id=model_id)]
        results = [replace(result, settings={**result.settings, **product_precision(cfg)}) for result in results]
        write_results(folder, results)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # they were for resuming
        mine = [result for result in read_results([folder.parents[1]]) if result.sha256 == model_id]
        add_scores(Path(cfg.model), results_markdown(mine))
    show(results, folder)
    return results[0].held_out


def show(results: Sequence[Result], folder: Path) -> None:
    """Print the scores of a job."""
    rows = [
        [metric, *(f"{result.scores[metric]:,.4g}" if metric in result.scores else "-" for result in results)]
        for metric in results[0].scores
    ]
    print_table(results[0].task, ["metric", *(result.name for result in results)], rows)
    Console().print(f"results: {folder / FILE}", soft_wrap=True, highlight=False)


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.evaluate", config_name="evaluate")
@report_errors
def main(cfg: DictConfig) -> float | None:
    """Run one job, and return what sweepers may maximise: the score on held-out rows."""
    keep_large_buffers()
    with quiet():
        return evaluate(cfg)


if __name__ == "__main__":
    main()
