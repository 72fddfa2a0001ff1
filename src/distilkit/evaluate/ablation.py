"""What each term is worth (arXiv 1910.01108, table 4): fine-tune the students of a sweep, and report the changes."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
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
from rich.console import Console

from distilkit.cli import check_names, report_errors
from distilkit.errors import UserError
from distilkit.evaluate.__main__ import check_settings, evaluate
from distilkit.records import find_runs, read_results, read_runs
from distilkit.report.__main__ import write_report

log = logging.getLogger(__name__)


@contextmanager
def evaluation_configs() -> Iterator[None]:
    """Compose the configs of distilkit.evaluate while those of distilkit.train are in use."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = before


def evaluation(task: str, *, data_dir: str | None, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a task, before its model is known.

    Raises:
        UserError: there is no such task, or an override is wrong.
    """
    try:
        with evaluation_configs():
            cfg = compose("evaluate", [f"task={task}", "save_model=false", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"ablation: task {task!r} with overrides {list(overrides)}: {error}") from error
    if data_dir is not None and "data_dir" in cfg.task:
        cfg.task.data_dir = data_dir
    return cfg


def exits(method: Callable[..., None]) -> Callable[..., None]:
    """End the command where a callback fails: Hydra would turn its error into a warning, and go on."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            report_errors(method)(*args, **kwargs)
        except Exception as error:
            log.exception("the ablation stopped")
            raise SystemExit(1) from error

    return wrapped


class Ablation(Callback):
    """Hydra callback: when the students of a sweep are trained, score them, and write the report."""

    @exits
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Read each task's rows once, so that what is wrong with them is said before hours of training.

        Raises:
            UserError: a key or a task is unknown, or its rows cannot be read.
        """
        check_names(config.ablation, ("tasks", "data_dir", "seeds", "overrides"), path="ablation")
        for task in config.ablation.tasks or []:
            cfg = evaluation(task, **_given(config))
            cfg.model, cfg.seed = "a student", 0
            check_settings(cfg)
            found = instantiate(cfg.task)
            if hasattr(found, "train_examples"):
                found.train_examples()
                found.scored_examples()

    @exits
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Fine-tune each student and the teacher on each task, unless it is done already, and report."""
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
                    cfg = evaluation(task, **_given(config))
                    if name == "teacher":
                        cfg.revision, cfg.trust_remote_code = config.teacher.revision, config.teacher.trust_remote_code
                        own = config.tokenizer.get("name")
                        cfg.tokenizer = None if own == teacher else own
                    cfg.model, cfg.name, cfg.seed, cfg.output_dir = model, name, seed, str(sweep / "scores")
                    evaluate(cfg)
        file = write_report(
            read_results([sweep / "scores"]),
            find_runs([sweep]),
            out=sweep / "report",
            teacher=None if teacher is None else "teacher",
            baseline=None,
            title=f"Ablation: {config.name}",
            wandb=None,
        )
        Console().print(f"report: {file}", soft_wrap=True, highlight=False)


def _given(config: DictConfig) -> dict[str, Any]:
    """Return what a sweep says of its evaluations; they run where the training ran."""
    where = f"trainer.accelerator={config.trainer.accelerator}"
    return {"data_dir": config.ablation.data_dir, "overrides": [where, *config.ablation.overrides]}
