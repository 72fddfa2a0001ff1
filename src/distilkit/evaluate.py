"""Score a model on a task: ``python -m distilkit.evaluate model=<folder or hub id> task=sst2``."""

import hashlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from rich.console import Console
from rich.table import Table

from distilkit.card import add_scores
from distilkit.entry import check_keys, check_names, report_errors
from distilkit.errors import UserError
from distilkit.finetune import Batches, FinetuningModule, Logits
from distilkit.finetune import Task as FinetuningTask
from distilkit.language_model import num_parameters, num_parameters_without_embeddings
from distilkit.malloc import keep_large_buffers
from distilkit.results import FILE, Result, cost, model_name, read_file, read_results, write_results
from distilkit.summary import write_json
from distilkit.task_model import check_length, check_same_vocabulary, load_task_model, load_task_tokenizer, weights_id

log = logging.getLogger(__name__)


_WHERE = {
    "accelerator",
    "devices",
    "log_every_n_steps",
    "enable_model_summary",
    "enable_progress_bar",
    "default_root_dir",
}
_KNOBS: dict[str, tuple[type[int] | type[float], float]] = {  # kind and least value
    "finetune.lr": (float, 0),
    "finetune.batch_size": (int, 1),
    "finetune.epochs": (int, 0),
    "finetune.weight_decay": (float, 0),
    "finetune.warmup_share": (float, 0),
    "finetune.held_out": (float, 0),
    "finetune.patience": (int, 1),
    "distil.alpha_task": (float, 0),
    "distil.alpha_ce": (float, 0),
    "distil.temperature": (float, 0),
    "seed": (int, 0),
}


def check_settings(cfg: DictConfig) -> None:
    """Make sure that all keys are known and all numbers are numbers, before anything is read.

    Raises:
        UserError: one is not.
    """
    check_keys(cfg)
    for group in ("finetune", "distil"):
        check_names(cfg[group], [key.partition(".")[2] for key in _KNOBS if key.startswith(group)], path=group)
    for key, (kind, least) in _KNOBS.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key == "finetune.patience":
            continue
        above = key in ("finetune.lr", "distil.temperature")
        if isinstance(value, bool) or not isinstance(value, int | kind) or value < least or (above and not value):
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{key}={value}, but it must be {what} {'above 0' if above else f'of at least {least}'}")
    if cfg.finetune.patience is not None and not cfg.finetune.held_out:
        raise UserError(
            f"finetune.patience={cfg.finetune.patience} and finetune.held_out={cfg.finetune.held_out}: early stopping needs "
            "rows to choose by, for example finetune.held_out=0.1"
        )
    if cfg.teacher is not None and not cfg.finetune.epochs:
        raise UserError(
            "finetune.epochs=0 trains nothing, so that a teacher is of no use; set teacher=null, or epochs above 0"
        )


def job_id(cfg: DictConfig, *, teacher_id: str | None, model_id: str) -> str:
    """Return a short hash of everything that decides a score but the seed and the machine."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    decisive = {name: settings[name] for name in ("task", "finetune", "tokenizer")}
    decisive |= {"model": model_id}
    decisive |= {"trainer": {key: value for key, value in settings["trainer"].items() if key not in _WHERE}}
    decisive |= {"teacher": teacher_id, "distil": settings["distil"]} if teacher_id else {}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:8]


def hold_out(examples: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Split training rows into those to train on and those to choose by: the same ones for every seed and setting.

    Questions on one paragraph stay on one side.

    Raises:
        UserError: the share is out of range, or leaves one side empty.
    """
    if not 0 <= share < 1:
        raise UserError(f"finetune.held_out={share}, but it must be at least 0 and below 1")
    groups: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(getattr(example, "context", index), []).append(index)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    members = [list(groups.values())[group] for group in order]
    held: list[int] = []
    while members and len(held) < round(share * len(examples)):
        held += members.pop()
    if share and not (held and members):
        raise UserError(f"finetune.held_out={share} of {len(examples)} training rows leaves one side empty")
    kept = set(range(len(examples))) - set(held)
    return [examples[index] for index in sorted(kept)], [examples[index] for index in sorted(held)]


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


def finetune_and_score(cfg: DictConfig, task: FinetuningTask, *, folder: Path, name: str, model_id: str) -> Result:
    """Fine-tune a model on a task, from where a broken run stopped, and score it."""
    shared = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    trains = cfg.finetune.epochs > 0
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = load_task_model(cfg.model, auto_class=task.auto_class, head=task.head, needs_head=not trains, **shared)
    if not trains:
        task.check_teacher(model, name=cfg.model)  # it must know this task's classes, as a teacher must
    tokenizer = load_task_tokenizer(
        cfg.model, tokenizer=cfg.tokenizer, vocabulary=int(model.config.vocab_size), **shared
    )
    check_length(model, task.max_length, name=cfg.model)
    model.config.pad_token_id = tokenizer.pad_token_id
    teacher = None
    if cfg.teacher is not None:
        at_main = {"revision": "main", "trust_remote_code": cfg.trust_remote_code}
        teacher = load_task_model(cfg.teacher, auto_class=task.auto_class, head={}, needs_head=True, **at_main)
        task.check_teacher(teacher, name=cfg.teacher)
        theirs = load_task_tokenizer(cfg.teacher, tokenizer=None, vocabulary=int(teacher.config.vocab_size), **at_main)
        check_same_vocabulary(tokenizer, theirs, name=cfg.teacher)
        check_length(teacher, task.max_length, name=cfg.teacher)
        teacher.config.pad_token_id = tokenizer.pad_token_id

    scored = task.scored_examples()
    kept, held_out = hold_out(task.train_examples() if trains else [], cfg.finetune.held_out)
    data = Batches(
        train=task.encode(kept, tokenizer, train=True) if kept else [],
        held_out=task.encode(held_out, tokenizer, train=False) if held_out else [],
        held_out_examples=held_out,
        tokenizer=tokenizer,
        batch_size=cfg.finetune.batch_size,
        seed=cfg.seed,
    )
    knobs = {key: cfg.finetune[key] for key in ("lr", "weight_decay", "warmup_share")}
    module = FinetuningModule(model=model, teacher=teacher, task=task, **knobs, **cfg.distil, seed=cfg.seed)
    trainer = build_trainer(cfg, folder=folder)
    checkpoints = folder / "checkpoints"
    if trains:
        last = checkpoints / "last.ckpt"
        if last.is_file():
            log.info("going on from %s", last)
        trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=False)
        if cfg.finetune.patience is not None:
            best = torch.load(checkpoints / "best.ckpt", map_location="cpu", weights_only=True)
            module.load_state_dict(best["state_dict"], strict=False)

    start, num_scored = time.perf_counter(), 0
    model.eval()
    scores, predictions = {}, {}
    held_out_score = None
    if held_out:
        logits = predict(trainer, module, data, data.held_out)
        values = task.scores(logits, data.held_out, held_out).values()
        held_out_score = sum(values) / len(values)
    for split, examples in scored.items():
        features = task.encode(examples, tokenizer, train=False)
        num_scored += sum(len(feature["input_ids"]) for feature in features)
        logits = predict(trainer, module, data, features)
        for metric, value in task.scores(logits, features, examples).items():
            scores[f"{split}/{metric}" if len(scored) > 1 else metric] = value
        predictions[split] = task.predictions(logits, features, examples)

    folder.mkdir(parents=True, exist_ok=True)
    for split, said in predictions.items():
        write_json(folder / f"predictions-{split}.json", said)
    if cfg.save_model and trains:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    for logger in trainer.loggers:
        logger.log_metrics({f"{task.name}/{metric}": value for metric, value in scores.items()})
        logger.save()
    settings: Any = OmegaConf.to_container(cfg)
    distil = {"name": cfg.teacher, **settings["distil"]} if teacher is not None else None
    plain = {key: value for key, value in settings["task"].items() if isinstance(value, int | float | bool)}
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
        settings={
            **settings["finetune"],
            **plain,
            "precision": str(trainer.precision),
            "vocabulary": len(tokenizer),
            **({"tokenizer": cfg.tokenizer} if cfg.tokenizer else {}),
        },
        scores=scores,
        score=sum(scores.values()) / len(scores),
        held_out=held_out_score,
        teacher=distil,
        details={"rows": {split: len(examples) for split, examples in scored.items()}, "train_rows": len(kept)},
        cost=cost(
            seconds=module.seconds + time.perf_counter() - start,
            tokens=module.tokens_seen + num_scored,
            device=str(trainer.strategy.root_device),
        ),
    )


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
            places = {key: cfg[key] for key in ("model", "revision", "tokenizer", "seed")}
            results = task.measure(**places, name=name)
        else:
            results = [finetune_and_score(cfg, task, folder=folder, name=name, model_id=model_id)]
        write_results(folder, results)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # they were for resuming
        mine = [result for result in read_results([folder.parents[1]]) if result.sha256 == model_id]
        add_scores(Path(cfg.model), mine)
    show(results, folder)
    return results[0].held_out


def show(results: Sequence[Result], folder: Path) -> None:
    """Print the scores of a job."""
    table = Table(title=f"{results[0].task}", title_justify="left")
    table.add_column("metric")
    for result in results:
        table.add_column(result.name, justify="right")
    for metric in results[0].scores:
        table.add_row(
            metric, *(f"{result.scores[metric]:,.4g}" if metric in result.scores else "-" for result in results)
        )
    console = Console()
    console.print(table)
    console.print(f"results: {folder / FILE}", soft_wrap=True, highlight=False)


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.evaluate", config_name="evaluate")
@report_errors
def main(cfg: DictConfig) -> float | None:
    """Run one job, and return what sweepers may maximise: the score on held-out rows."""
    keep_large_buffers()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a new head is what fine-tuning is for
    for message in (".*does not have many workers", ".*LeafSpec", "Checkpoint directory .* exists", ".*eval mode"):
        warnings.filterwarnings("ignore", message=message)
    return evaluate(cfg)


if __name__ == "__main__":
    main()
