"""Fine-tune a model on a task with Lightning, and score it."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, Timer
from pytorch_lightning.loggers import WandbLogger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distilkit.errors import UserError
from distilkit.evaluate.backends import in_backend
from distilkit.evaluate.finetune import Batches, FinetuningModule, FinetuningTask, Logits, Trainable, hold_out
from distilkit.evaluate.job import PLACES, Job, training_settings
from distilkit.evaluate.leaderboard import write_submission
from distilkit.evaluate.models import described, inputs_of, load_task_model, load_task_tokenizer
from distilkit.language_model import check_positions
from distilkit.metrics import measure
from distilkit.records import Result, cost, write_json, write_rows
from distilkit.runs.storage import permit_reading
from distilkit.watch.progress import ProgressBar

log = logging.getLogger(__name__)


def finetune_and_score(task: FinetuningTask, job: Job) -> list[Result]:
    """Fine-tune the job's model and score it, and score it again in each of ``backends``.

    Predictions and the model are written into the job's folder, predictions of a backend into a folder of its name.
    """
    cfg, trains = job.cfg, job.cfg.finetune.epochs > 0
    seed_everything(job.seed, workers=True, verbose=False)
    model, tokenizer, teacher = load_models(task, job)
    scored = task.scored_examples()
    kept, held_out = hold_out(task.train_examples() if trains else [], cfg.finetune.held_out)
    data = Batches(
        train=task.encode(kept, tokenizer),
        held_out=task.encode(held_out, tokenizer),
        held_out_examples=held_out,
        tokenizer=tokenizer,
        batch_size=cfg.finetune.batch_size,
        seed=job.seed,
    )
    module, trainer, timer = train(task, job, model=model, teacher=teacher, data=data)
    start, held_out_score = time.perf_counter(), None
    model.eval()
    if held_out:
        logits = predict(trainer, module, data, data.held_out)
        rows = task.rows(logits, data.held_out, held_out)
        held_out_score = fmean(measure(task.metrics, rows).values())
        write_rows(job.folder, "held_out", rows)
    features = {split: task.encode(examples, tokenizer) for split, examples in scored.items()}
    num_scored = sum(len(feature["input_ids"]) for each in features.values() for feature in each)

    def score(folder: Path) -> dict[str, float]:
        found = {split: predict(trainer, module, data, each) for split, each in features.items()}
        return _score(task, found, features, scored, folder=folder)

    scores = score(job.folder)
    for name, examples in task.unlabelled_examples().items():
        unlabelled = task.encode(examples, tokenizer)
        predictions = task.predictions(predict(trainer, module, data, unlabelled), unlabelled, examples)
        write_submission(job.folder / "submission", name, predictions, ids=task.head.get("label2id"))
    if cfg.save_model and trains:
        model.save_pretrained(job.folder / "model")
        permit_reading(job.folder / "model")
        tokenizer.save_pretrained(job.folder / "model")
    _log_scores(trainer, {f"{task.name}/{metric}": value for metric, value in scores.items()})
    result = Result(
        name=job.name,
        model=job.model,
        sha256=job.sha256,
        **described(model),
        task=task.name,
        kind="finetuned",
        seed=job.seed,
        settings=recorded_settings(cfg, vocabulary=len(tokenizer), train_rows=len(kept)),
        scores=scores,
        score=fmean(scores.values()),
        held_out=held_out_score,
        teacher={"name": cfg.teacher, **cfg.distil} if teacher is not None else None,
        details={"rows": {split: len(examples) for split, examples in scored.items()}, "train_rows": len(kept)},
        cost=cost(
            seconds=timer.time_elapsed() + time.perf_counter() - start,
            tokens=int(module.tokens_seen) + num_scored,
            device=str(trainer.strategy.root_device),
        ),
    )
    results = [result]
    batch = next(iter(data.ordered(next(iter(features.values())))))
    for name in cfg.backends:
        start, folder, label = time.perf_counter(), job.folder / name, f"{job.name} ({name})"
        with in_backend(name, model, example=inputs_of(model, batch), label=label) as module.model:
            scores = score(folder)
        spent = cost(seconds=time.perf_counter() - start, tokens=num_scored, device=result.cost["device"])
        changes: Any = {"name": label, "sha256": f"{job.sha256}-{name}", "scores": scores, "folder": str(folder)}
        changes |= {"score": fmean(scores.values()), "details": result.details | {"backend": name}, "cost": spent}
        results.append(replace(result, **changes))
    return results


def train(
    task: Trainable, job: Job, *, model: PreTrainedModel, teacher: PreTrainedModel | None, data: Batches
) -> tuple[FinetuningModule, Trainer, Timer]:
    """Fine-tune a model for the job's epochs, if there are any."""
    cfg = job.cfg
    knobs = {key: cfg.finetune[key] for key in ("lr", "weight_decay", "warmup_share")}
    module = FinetuningModule(model=model, teacher=teacher, task=task, **knobs, **cfg.distil, seed=job.seed)
    timer = Timer()  # it counts across resumed runs
    trainer = build_trainer(cfg, folder=job.folder, timer=timer)
    if cfg.finetune.epochs:
        fit(trainer, module, data, checkpoints=job.folder / "checkpoints")
    return module, trainer, timer


def _score(
    task: FinetuningTask,
    logits: Mapping[str, Sequence[Logits]],
    features: Mapping[str, Sequence[Any]],
    scored: Mapping[str, Sequence[Any]],
    *,
    folder: Path,
) -> dict[str, float]:
    """Score each split, and write its rows and predictions into a folder."""
    scores = {}
    for split, examples in scored.items():
        rows = task.rows(logits[split], features[split], examples)
        write_rows(folder, split, rows)
        for metric, value in measure(task.metrics, rows).items():
            scores[f"{split}/{metric}" if len(scored) > 1 else metric] = value
        predictions = task.predictions(logits[split], features[split], examples)
        write_json(folder / f"predictions-{split}.json", predictions)
    return scores


def load_models(task: Trainable, job: Job) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel | None]:
    """Load the model with a new head, or with its own if nothing is trained, its tokenizer, and the teacher, if any."""
    cfg = job.cfg

    def load(name: str, revision: str, tokenizer_name: str | None, *, has_head: bool) -> tuple[Any, Any]:
        hub = {"revision": revision, "trust_remote_code": cfg.trust_remote_code}
        model = load_task_model(name, auto_class=task.auto_class, head=task.head, needs_head=has_head, **hub)
        if has_head:
            task.check_head(model, name=name)
        tokenizer = load_task_tokenizer(name, tokenizer=tokenizer_name, vocabulary=int(model.config.vocab_size), **hub)
        check_positions(model, task.max_length, key="task.max_length", name=name)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    model, tokenizer = load(job.model, job.revision, job.tokenizer, has_head=not cfg.finetune.epochs)
    if cfg.teacher is None:
        return model, tokenizer, None
    teacher, theirs = load(cfg.teacher, "main", None, has_head=True)
    if tokenizer.get_vocab() != theirs.get_vocab():
        raise UserError(
            f"teacher {cfg.teacher!r} has another vocabulary ({len(theirs)} words) than the student "
            f"({len(tokenizer)}); a second distillation needs one tokenizer for both"
        )
    return model, tokenizer, teacher


def build_trainer(cfg: DictConfig, *, folder: Path, timer: Timer) -> Trainer:
    """Build the trainer, with a checkpoint at each epoch to resume from, and early stopping where it is set."""
    checkpoints: Any = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    best: Any = {"monitor": "held_out", "mode": "max"}
    callbacks: list[Callback] = [timer]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar(every=cfg.progress_every))
    if cfg.finetune.patience is not None:
        callbacks.append(EarlyStopping(patience=cfg.finetune.patience, **best))
        callbacks.append(ModelCheckpoint(filename="best", save_weights_only=True, **checkpoints, **best))
    # It holds the state of the best one, and so comes after it.
    callbacks.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **checkpoints))
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=[logger for logger in instantiate(cfg.logger).values() if logger is not None],
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if cfg.finetune.held_out else 0,
    )
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices} makes {trainer.world_size} processes, but a model is fine-tuned on "
            "one device; set trainer.devices=1, and run seeds and tasks in parallel with a launcher"
        )
    return trainer


def fit(trainer: Trainer, module: FinetuningModule, data: Batches, *, checkpoints: Path) -> None:
    """Fine-tune, from where a broken run stopped; early stopping ends with the weights of the best epoch."""
    last = checkpoints / "last.ckpt"
    if last.is_file():
        log.info("resuming from %s", last)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=False)
    if trainer.early_stopping_callback is not None:
        best = torch.load(checkpoints / "best.ckpt", map_location="cpu", weights_only=True)
        module.load_state_dict(best["state_dict"], strict=False)  # the teacher is in no checkpoint


def predict(trainer: Trainer, module: FinetuningModule, data: Batches, features: Sequence[Any]) -> list[Logits]:
    """Return the logits of each feature, in order."""
    found: dict[int, Logits] = {}
    for part in trainer.predict(module, data.ordered(features)) or []:
        found |= part
    if not all(each.isfinite().all() for logits in found.values() for each in logits):
        raise UserError("the model's predictions are not finite; lower finetune.lr, or set trainer.precision=32-true")
    return [found[row] for row in range(len(features))]


def recorded_settings(cfg: DictConfig, *, vocabulary: int, train_rows: int) -> dict[str, Any]:
    """Return what decides a score besides model, rows and seed; keys of the task that are not set are left out."""
    node: Any = OmegaConf.to_container(cfg.task, resolve=True)
    task = {key: value for key, value in node.items() if key not in ("_target_", "name", *PLACES)}
    task = {key: value for key, value in task.items() if value not in (None, [], {})}
    other = {"vocabulary": vocabulary, "train_rows": train_rows}
    return {**training_settings(cfg), **task, **other, **({"tokenizer": cfg.tokenizer} if cfg.tokenizer else {})}


def _log_scores(trainer: Trainer, scores: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scores)
        logger.save()
        if isinstance(logger, WandbLogger):  # or it writes its last records only when this process ends
            logger.experiment.finish()
