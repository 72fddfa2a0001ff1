"""One job: a model, a task and a seed, known by everything that decides the score, and recorded once."""

import hashlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from distilkit.cli import check_keys, check_names, in_sweep, set_matmul_precision
from distilkit.errors import UserError
from distilkit.evaluate.backends import check_backends
from distilkit.evaluate.models import resolved, tokenizer_id, weights_id
from distilkit.export.card import add_scores
from distilkit.precision import choose_precision
from distilkit.records import FILE, Result, model_name, read_results, write_results
from distilkit.report.frame import gather, task_label
from distilkit.report.page import print_table
from distilkit.report.quality import medians, results_markdown

log = logging.getLogger(__name__)

_WHERE = {  # settings of the trainer that decide no score
    *("accelerator", "devices", "default_root_dir"),
    *("log_every_n_steps", "enable_model_summary", "enable_progress_bar"),
}

PLACES = (  # what decides no score of a task: the hash of the rows says which they are
    *("data_dir", "hub", "files", "paths", "column", "dataset", "device", "submission"),
)

_NUMBERS: dict[str, tuple[type, float, float, bool]] = {  # kind, least, most, and whether the least is allowed
    "finetune.lr": (float, 0, math.inf, False),
    "finetune.batch_size": (int, 1, math.inf, True),
    "finetune.epochs": (int, 0, math.inf, True),
    "finetune.weight_decay": (float, 0, math.inf, True),
    "finetune.warmup_share": (float, 0, 1, True),
    "finetune.held_out": (float, 0, 0.9, True),
    "finetune.patience": (int, 1, math.inf, True),
    "distil.alpha_task": (float, 0, math.inf, True),
    "distil.alpha_ce": (float, 0, math.inf, True),
    "distil.temperature": (float, 0, math.inf, False),
    "seed": (int, 0, 2**32 - 1, True),  # what numpy takes
    "progress_every": (float, 0, math.inf, False),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to measure: a folder or hub id, the hash of its files, its name in tables, and the results' folder.

    ``revision`` is the commit of a hub id where it is known. ``tokenizer`` is None for the model's own. ``cfg`` is the
    composed config, which tasks that fine-tune read. ``data`` are the hashes of the rows.
    """

    model: str
    revision: str
    tokenizer: str | None
    sha256: str
    name: str
    seed: int
    folder: Path
    cfg: DictConfig
    data: Mapping[str, str] = field(default_factory=dict)


class Refit(NamedTuple):
    """How settings were chosen to train once more on all rows: of how many, and by which median of held-out scores."""

    settings_tried: int
    held_out: float


class Task(Protocol):
    """What the configs of conf/evaluate/task build; ``trains`` is true where models are fine-tuned."""

    name: str
    trains: ClassVar[bool]

    def check_data(self, *, train: bool = True) -> dict[str, str]:
        """Read the data, so that an error in it shows before models are trained, and return the hash of its rows.

        ``scored_data`` is that of the rows to score, and ``train_data``, with ``train``, that of the rows to train on.
        """

    def measure(self, job: Job) -> list[Result]:
        """Score the model of a job, and then the models that it is compared with."""


def check_settings(cfg: DictConfig) -> None:
    """Make sure that keys are known and numbers are within their limits, before anything is read."""
    check_keys(cfg)
    for group in ("finetune", "distil"):
        check_names(cfg[group], [key.partition(".")[2] for key in _NUMBERS if key.startswith(group)], path=group)
    patience = cfg.finetune.patience
    _check_numbers(cfg)
    check_backends(cfg.backends)
    if not cfg.distil.alpha_task + cfg.distil.alpha_ce:
        raise UserError("distil.alpha_task=0 and distil.alpha_ce=0 leave no loss; set one of them above 0")
    if patience is not None and not cfg.finetune.held_out:
        raise UserError(
            f"finetune.patience={patience} needs held-out rows, but finetune.held_out={cfg.finetune.held_out}; set "
            "finetune.held_out=0.1"
        )
    check_refit(cfg)
    if cfg.teacher is not None and not cfg.finetune.epochs:
        raise UserError("finetune.epochs=0 trains nothing, so a teacher has no effect; set teacher=null or more epochs")


def check_refit(cfg: DictConfig) -> None:
    """Make sure that there are held-out rows to choose by, and that what is chosen can be trained without them."""
    if isinstance(cfg.refit, ListConfig):
        fits = len(cfg.refit) and all(type(seed) is int and seed >= 0 for seed in cfg.refit)
    else:
        fits = isinstance(cfg.refit, bool)
    if not fits:
        raise UserError(f"refit={cfg.refit}, but it takes true, false or a list of seeds")
    if cfg.refit and not (cfg.finetune.held_out and cfg.finetune.patience is None):
        raise UserError(
            f"refit={cfg.refit} takes the best setting of a sweep by held-out rows and trains it on all rows, which needs "
            "finetune.held_out=0.1 and finetune.patience=null; grid=bert sets the first"
        )


def _check_numbers(cfg: DictConfig) -> None:
    for key, (kind, least, most, closed) in _NUMBERS.items():
        value: Any = OmegaConf.select(cfg, key)
        if key == "finetune.patience" and value is None:
            continue
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and (least <= value if closed else least < value) and value <= most
        if not fits or (kind is int and not float(value).is_integer()):
            what = "a whole number" if kind is int else "a number"
            low = f"of at least {least:g}" if closed else f"above {least:g}"
            high = f" and at most {most}" if most < math.inf else ""
            raise UserError(f"{key}={value}, but it must be {what} {low}{high}")


def job_id(cfg: DictConfig, *, ids: Mapping[str, Any]) -> str:
    """Return a short hash of everything that decides a score, except the seed and the machine.

    ``ids`` are those of the rows, the model, its tokenizer and other models, instead of the names they were given by.
    """
    settings = json.loads(
        json.dumps(OmegaConf.to_container(cfg, resolve=True), default=str), object_hook=_without_module
    )
    decisive = {"task": _without_places(settings["task"]), "finetune": settings["finetune"], **ids} | product_precision(
        cfg
    )
    decisive |= {"trainer": {key: value for key, value in settings["trainer"].items() if key not in _WHERE}}
    decisive |= {"distil": settings["distil"]} if ids.get("teacher") else {}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


def _without_module(node: dict[str, Any]) -> dict[str, Any]:
    """Reduce a ``_target_`` to the name of its class, so that a file can move without a change of ids."""
    return node | {"_target_": node["_target_"].rpartition(".")[2]} if "_target_" in node else node


def _without_places(node: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the rows of a task lie, and those of the tasks that it is made of."""
    kept = {key: value for key, value in node.items() if key not in PLACES}
    return {key: _without_places(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _check_name(key: str, name: str, *, nested: bool = True) -> None:
    """Refuse a name that would lead out of the output folder, of which it is a part."""
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or (len(path.parts) > 1 and not nested):
        raise UserError(
            f"{key}={name}, but it names a folder in output_dir; give a name without {'..' if nested else '/'}"
        )


def product_precision(cfg: DictConfig) -> dict[str, str]:
    """Return the precision of float32 products as a setting, unless it is torch's default."""
    return {} if cfg.matmul_precision == "highest" else {"matmul_precision": cfg.matmul_precision}


def training_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of fine-tuning and of the trainer that decide a score; those that are not set are left out."""
    trainer: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    trainer |= {"max_epochs": None} if trainer.get("max_epochs") == cfg.finetune.epochs else {}
    left_out = _WHERE | {"_target_", "reload_dataloaders_every_n_epochs"}
    own = {key: value for key, value in trainer.items() if key not in left_out and value is not None}
    return {**own, "precision": str(cfg.trainer.precision), **cfg.finetune}


def prepare(cfg: DictConfig, *, refit: bool = False) -> tuple[Task, Job]:
    """Check a job's settings, read its data, and return its task and what it is known by."""
    check_settings(cfg)
    set_matmul_precision(cfg.matmul_precision)
    if cfg.trainer.get("precision") == "auto":
        cfg.trainer.precision, reason = choose_precision(accelerator=str(cfg.trainer.accelerator))
        log.info("trainer.precision=auto takes %s: %s", cfg.trainer.precision, reason)
    if cfg.card:
        check_card(cfg.model)
    for key in ("model", "teacher", "tokenizer"):
        if cfg[key] is not None and Path(cfg[key]).expanduser().is_dir():
            cfg[key] = str(Path(cfg[key]).expanduser())
    if cfg.task.get("device") == "auto" and cfg.trainer.accelerator == "cpu":
        cfg.task.device = "cpu"
    task: Task = instantiate(cfg.task)
    if cfg.trust_remote_code and not task.trains:
        raise UserError(f"trust_remote_code=true, but task={task.name} runs no code of a model; set it to false")
    if cfg.backends and not task.trains:
        raise UserError(f"backends={list(cfg.backends)}, but task={task.name} trains no model; set backends=[]")
    name = cfg.name or model_name(cfg.model)
    _check_name("name", name)
    _check_name("task.name", task.name, nested=False)
    revision = resolved(cfg.model, revision=cfg.revision)
    model_id, data = weights_id(cfg.model, revision=revision), task.check_data(train=cfg.finetune.epochs > 0)
    ids: dict[str, Any] = {"model": model_id, **data}
    ids["tokenizer"] = None if cfg.tokenizer is None else tokenizer_id(cfg.tokenizer)
    ids["teacher"] = None if cfg.teacher is None else weights_id(cfg.teacher, revision="main")
    if against := cfg.task.get("against"):
        named = [against] if isinstance(against, str) else against
        ids["against"] = [weights_id(each, revision="main") for each in named]
    ids |= {"refit": True} if refit else {}
    folder = Path(cfg.output_dir).expanduser() / name / task.name / f"seed{cfg.seed}-{job_id(cfg, ids=ids)}"
    given = {key: cfg[key] for key in ("model", "tokenizer", "seed")}
    about: Any = {"revision": revision, "sha256": model_id, "name": name, "folder": folder.resolve(), "data": data}
    return task, Job(**given, **about, cfg=cfg)


def evaluate(cfg: DictConfig, *, refit: Refit | None = None) -> float | None:
    """Run one job, unless it is recorded already, and return the score on held-out rows, if there are any.

    Sweepers see this score only, so that nothing is selected on the scored split. ``refit`` tells how the settings of
    this job were chosen.
    """
    if cfg.refit and not in_sweep():
        raise UserError(f"refit={cfg.refit} follows a sweep of settings; add grid=bert, or set refit=false")
    task, job = prepare(cfg, refit=refit is not None)
    folder = job.folder
    lacks_model = task.trains and cfg.save_model and cfg.finetune.epochs and not (folder / "model").is_dir()
    lacks_more = any(not (folder / backend / FILE).is_file() for backend in cfg.backends)
    lacks_more |= bool(cfg.task.get("submission")) and not (folder / "submission").is_dir()
    if (folder / FILE).is_file() and not lacks_model and not lacks_more:
        log.info("already scored; delete %s to score it again", folder)
        results = read_results([folder])
    else:
        cfg.output_dir, cfg.name = str(folder), job.name  # where loggers write
        more: dict[str, Any] = {**job.data, **product_precision(cfg)}
        node = OmegaConf.to_container(cfg.task, resolve=True)
        more |= {"refit": True, "settings_tried": refit.settings_tried} if refit else {}
        results = [
            replace(each, settings=more | each.settings, details=each.details | {"task": node})
            for each in task.measure(job)
        ]
        if refit:
            results = [replace(each, held_out=refit.held_out) for each in results]
        for each in results:
            if each.folder is not None:  # of a backend
                write_results(Path(each.folder), [each])
        write_results(folder, [each for each in results if each.folder is None])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # they were for resuming
    if cfg.card:
        write_card(Path(cfg.model), read_results([folder.parents[1]]), model_id=job.sha256)
    _show(results, folder)
    return results[0].held_out


def check_card(model: str) -> None:
    """Make sure that scores can be written into the card of a model: that of a folder, outside the hub's cache."""
    file = Path(model).expanduser() / "README.md"
    if not file.is_file() or any(part.startswith("models--") for part in file.resolve().parts):
        raise UserError(
            f"card=true writes scores into README.md of model={model}, but that is no folder of yours with a README.md; "
            "set card=false, or copy the model into a folder"
        )


def write_card(folder: Path, results: Sequence[Result], *, model_id: str) -> None:
    """Write a model's scores into its card, with the rows they are of; only those on all rows get into its metadata."""
    mine = [result for result in results if result.sha256 == model_id]
    limits = ("max_train_rows", "max_scored_rows", "max_tokens")
    partial = [each for each in mine if any(each.settings.get(limit) for limit in limits)]
    whole, text = [each for each in mine if each not in partial], ""
    for title, some in (("", whole), ("\nPartial results, on some of the rows:\n\n", partial)):
        if table := results_markdown(some):
            text += f"{title}{table}\n" + "".join(f"- {note}\n" for note in _protocols(some))
    if text and not add_scores(folder, text, medians(whole)):
        log.warning("%s/README.md was not written by distilkit, and stays as it is", folder)


def _protocols(results: Sequence[Result]) -> list[str]:
    """Say for each score that counts how the model was fine-tuned, and on which rows it was scored."""
    notes = []
    for line in (line for line in gather(results).frame.itertuples(index=False) if not line.metric):
        own, seeds = line.settings, f"{line.seeds} seed{'s' if line.seeds > 1 else ''}"
        rows = ", ".join(f"{count:,} {split}" for split, count in line.details.get("rows", {}).items())
        keys = ("epochs", "lr", "batch_size", "max_length", "precision")
        how = ", ".join(f"{key} {own[key]}" for key in keys if own.get(key))
        trained = f"fine-tuned on {own.get('train_rows', 0):,} rows ({how}), " if own.get("epochs") else ""
        notes.append(f"{task_label(line.task)}: {trained}scored on {rows or 'all'} rows, {seeds}")
    return notes


def _show(results: Sequence[Result], folder: Path) -> None:
    for task, group in itertools.groupby(results, key=lambda result: result.task):
        some = list(group)
        rows = [
            [metric, *(f"{result.scores[metric]:,.4g}" if metric in result.scores else "-" for result in some)]
            for metric in some[0].scores
        ]
        print_table(task, ["metric", *(result.name for result in some)], rows)
    print(f"results: {folder / FILE}")
