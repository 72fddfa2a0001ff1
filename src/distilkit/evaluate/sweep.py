"""Score the students of a sweep on tasks when it has ended: the ablation (arXiv 1910.01108, table 4), and equal rows."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

_KEYS = ("tasks", "data_dir", "seeds", "overrides")
_BASELINES = ("baseline_time", "baseline")  # equal time before equal tokens


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


def evaluation(config: DictConfig, task: str, *, group: str, model: str, seed: int) -> DictConfig:
    """Compose the evaluation of a model on a task; it runs on the same accelerator as the training.

    ``group`` is the node of ``config`` that holds the tasks' settings.
    """
    own = config[group]
    given = [f"task={task}", f"trainer.accelerator={config.trainer.accelerator}"]
    try:
        with _evaluation_configs():
            cfg = compose("evaluate", [*given, *own.overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{group}: task {task!r} with overrides {list(own.overrides)}: {error}") from error
    if own.data_dir is not None and "data_dir" in cfg.task:
        cfg.task.data_dir = own.data_dir
    cfg.model, cfg.seed = model, seed
    return cfg


def _exits(method: Callable[..., None]) -> Callable[..., None]:
    """End the command if a callback fails: Hydra would turn its error into a warning and continue."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            report_errors(method)(*args, **kwargs)
        except Exception as error:
            log.exception("scoring the sweep stopped")
            raise SystemExit(1) from error

    return wrapped


@dataclass(kw_only=True)
class SweepTasks(Callback):
    """Hydra callback: score the students of a sweep once they are trained, and write the report.

    ``group`` is the config's node with ``tasks``, ``data_dir``, ``seeds`` and ``overrides``.
    """

    group: str

    @_exits
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Read the data of each task once, so that an error in it shows before hours of training."""
        known = (*_KEYS, "baseline_lr") if self.group == "versus" else _KEYS
        check_names(config[self.group], known, path=self.group)
        for key in ("tasks", "seeds", "overrides"):
            value = config[self.group][key]
            if not OmegaConf.is_list(value) and (key, value) != ("tasks", None):
                raise UserError(
                    f"{self.group}.{key}={value} is no list; set it in brackets, as {self.group}.{key}=[...]"
                )
        for name in config[self.group].tasks or []:
            cfg = evaluation(config, name, group=self.group, model="a student", seed=0)
            check_settings(cfg)
            task: Task = instantiate(cfg.task)
            task.check_data()

    @_exits
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Fine-tune each student and the teacher on each task, unless it is recorded already, and report."""
        own, sweep = config[self.group], Path(config.hydra.sweep.dir).resolve()
        runs = read_runs(sweep)
        if not own.tasks or not runs:
            return
        models = {str(run["label"]): f"{run['folder']}/student" for run in runs}
        teacher = next((run["teacher"] for run in runs if run.get("teacher")), None)  # a demo trains its own
        if teacher is not None:
            models = {"teacher": str(teacher["name"]), **models}
        for task in own.tasks:
            for seed in own.seeds:
                for name, model in models.items():
                    cfg = evaluation(config, task, group=self.group, model=model, seed=seed)
                    cfg.name, cfg.output_dir = name, str(sweep / "scores")
                    if teacher is not None and name == "teacher":
                        cfg.card = False
                        cfg.revision = teacher.get("revision", "main")
                        cfg.trust_remote_code = config.teacher.trust_remote_code
                        mine = OmegaConf.select(config, "tokenizer.name")
                        cfg.tokenizer = None if mine == OmegaConf.select(config, "teacher.name") else mine
                    try:
                        evaluate(cfg)
                    except Exception as error:
                        note_failure(f"{name} on {task}, seed {seed},", error)
        results = read_results([sweep / "scores"]) if (sweep / "scores").is_dir() else []
        scored = {result.name for result in results}
        file = write_report(
            results,
            find_runs([sweep]),
            out=sweep / "report",
            teacher="teacher" if "teacher" in scored else None,
            baseline=next((name for name in _BASELINES if name in scored), None),
            title=f"{self.group.capitalize()}: {config.name}",
            wandb=None,
        )
        print(f"report: {file}")
