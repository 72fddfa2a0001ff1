"""Ablate the terms of the loss (arXiv 1910.01108, table 4): fine-tune a sweep's students, and report the changes."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distilkit.cli import check_names, note_failure, report_errors
from distilkit.errors import UserError
from distilkit.evaluate.job import Task, check_settings, evaluate
from distilkit.records import find_runs, read_results, read_runs
from distilkit.report.__main__ import write_report

log = logging.getLogger(__name__)


@contextmanager
def _evaluation_configs() -> Iterator[None]:
    """Compose the configs of distilkit.evaluate while those of distilkit.train are in use."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = before


def evaluation(config: DictConfig, task: str, *, model: str, seed: int) -> DictConfig:
    """Compose the evaluation of a model on a task; it runs on the same accelerator as the training."""
    given = [f"task={task}", f"trainer.accelerator={config.trainer.accelerator}"]
    try:
        with _evaluation_configs():
            cfg = compose("evaluate", [*given, *config.ablation.overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"ablation: task {task!r} with overrides {list(config.ablation.overrides)}: {error}") from error
    if config.ablation.data_dir is not None and "data_dir" in cfg.task:
        cfg.task.data_dir = config.ablation.data_dir
    cfg.model, cfg.seed = model, seed
    return cfg


def _exits(method: Callable[..., None]) -> Callable[..., None]:
    """End the command if a callback fails: Hydra would turn its error into a warning and continue."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            report_errors(method)(*args, **kwargs)
        except Exception as error:
            log.exception("the ablation stopped")
            raise SystemExit(1) from error

    return wrapped


class Ablation(Callback):
    """Hydra callback: score the students of a sweep once they are trained, and write the report."""

    @_exits
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Read the data of each task once, so that an error in it shows before hours of training."""
        check_names(config.ablation, ("tasks", "data_dir", "seeds", "overrides"), path="ablation")
        for name in config.ablation.tasks or []:
            cfg = evaluation(config, name, model="a student", seed=0)
            check_settings(cfg)
            task: Task = instantiate(cfg.task)
            task.check_data()

    @_exits
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Fine-tune each student and the teacher on each task, unless it is recorded already, and report."""
        sweep = Path(config.hydra.sweep.dir).resolve()
        runs = read_runs(sweep)
        if not config.ablation.tasks or not runs:
            return
        models = {str(run["label"]): f"{run['folder']}/student" for run in runs}
        teacher = OmegaConf.select(config, "teacher.name")
        if teacher is not None:
            models = {"teacher": str(teacher), **models}
        for task in config.ablation.tasks:
            for seed in config.ablation.seeds:
                for name, model in models.items():
                    cfg = evaluation(config, task, model=model, seed=seed)
                    cfg.name, cfg.output_dir = name, str(sweep / "scores")
                    if name == "teacher":
                        cfg.card = False
                        cfg.revision, cfg.trust_remote_code = config.teacher.revision, config.teacher.trust_remote_code
                        own = config.tokenizer.get("name")
                        cfg.tokenizer = None if own == teacher else own
                    try:
                        evaluate(cfg)
                    except Exception as error:
                        note_failure(f"{name} on {task}, seed {seed},", error)
        results = read_results([sweep / "scores"]) if (sweep / "scores").is_dir() else []
        file = write_report(
            results,
            find_runs([sweep]),
            out=sweep / "report",
            teacher="teacher" if any(result.name == "teacher" for result in results) else None,
            baseline=None,
            title=f"Ablation: {config.name}",
            wandb=None,
        )
        print(f"report: {file}")
