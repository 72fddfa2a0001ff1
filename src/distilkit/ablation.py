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
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from distilkit.comparison import read_runs
from distilkit.entry import report_errors
from distilkit.errors import UserError
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


def score_students(
    models: dict[str, str], *, tasks: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], out: Path
) -> None:
    """Fine-tune each model, by the name of its row, on each task with each seed; what is done already is skipped."""
    with evaluation_configs():
        for task in tasks:
            for seed in seeds:
                for name, model in models.items():
                    log.info("%s: %s, seed %d", task, name, seed)
                    given = [f"task={task}", f"seed={seed}", "save_model=false", *overrides]
                    cfg = compose("evaluate", given)
                    with open_dict(cfg):
                        cfg.model, cfg.name, cfg.output_dir = model, name, str(out)
                    evaluate(cfg)


class Ablation(Callback):
    """Hydra callback: when the students of a sweep are trained, score them, and write the report."""

    # Hydra turns an error of a callback into a warning; an exit is an exit.

    @report_errors
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Read each task's rows once, so that what is wrong with them is said before hours of training.

        Raises:
            UserError: a key or a task is unknown, or its rows cannot be read.
        """
        known = {"tasks", "seeds", "overrides"}
        if set(config.ablation) - known:
            raise UserError(
                f"ablation.{min(set(config.ablation) - known)} is unknown; ablation takes {', '.join(sorted(known))}"
            )
        for task in config.ablation.tasks:
            with evaluation_configs():
                cfg = compose("evaluate", [f"task={task}", *config.ablation.overrides])
            found = instantiate(cfg.task)
            if hasattr(found, "scored_examples"):
                found.scored_examples()

    @report_errors
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Fine-tune and report."""
        sweep = Path(config.hydra.sweep.dir).resolve()
        settings: Any = OmegaConf.to_container(config.ablation)
        if not settings["tasks"] or not read_runs(sweep):
            return
        models = {str(run["label"]): f"{run['folder']}/student" for run in read_runs(sweep)}
        teacher = OmegaConf.select(config, "teacher.name")
        if teacher is not None:
            models = {"teacher": str(teacher), **models}
        score_students(models, **settings, out=sweep / "scores")
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
