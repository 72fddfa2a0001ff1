"""What each term is worth (arXiv 1910.01108, table 4): fine-tune the students of a sweep, and report the changes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from distilkit.comparison import read_runs
from distilkit.entry import check_names, report_errors
from distilkit.evaluate import evaluate
from distilkit.report import find_runs, write_report
from distilkit.results import read_results

log = logging.getLogger(__name__)


@contextmanager
def evaluation_configs() -> Iterator[None]:
    """Compose the configs of distilkit.evaluate while those of distilkit.train are in use."""
    hydra = GlobalHydra.instance()
    before = hydra.hydra
    hydra.clear()
    try:
        with initialize_config_module("distilkit.conf.evaluate", version_base="1.3"):
            yield
    finally:
        hydra.hydra = before


def evaluation(task: str, *, data_dir: str | None, overrides: Sequence[str]) -> DictConfig:
    """Compose the config of a task, before its model is known."""
    with evaluation_configs():
        cfg = compose("evaluate", [f"task={task}", "save_model=false", *overrides])
    if data_dir is not None:
        cfg.task.data_dir = data_dir
    return cfg


class Ablation(Callback):
    """Hydra callback: when the students of a sweep are trained, score them, and write the report."""

    # Hydra turns an error of a callback into a warning; an exit is an exit.

    @report_errors
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Read each task's rows once, so that what is wrong with them is said before hours of training.

        Raises:
            UserError: a key or a task is unknown, or its rows cannot be read.
        """
        check_names(config.ablation, ("tasks", "data_dir", "seeds", "overrides"), path="ablation")
        for task in config.ablation.tasks:
            found = instantiate(evaluation(task, **_given(config)).task)
            if hasattr(found, "scored_examples"):
                found.scored_examples()

    @report_errors
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
