"""What a sweep of evaluations does as a whole: read all data before its first job, and refit the best setting."""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from distilkit import cli
from distilkit.errors import UserError, ends_command
from distilkit.evaluate.job import Refit, Task, check_refit, evaluate, prepare
from distilkit.records import FILE, read_file


def jobs_of(config: DictConfig, *, only_tasks: bool = False) -> list[DictConfig]:
    """Compose the config of each job of a sweep; with ``only_tasks``, of those that differ in their task."""
    params = config.hydra.sweeper.get("params") or {}
    given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given)
    if only_tasks:
        named = ("task", "evaluate/task")
        overrides = [each for each in overrides if not each.is_sweep_override() or each.key_or_group.startswith(named)]
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [compose(config.hydra.job.config_name, job) for job in jobs]


class Suite(Callback):
    """Hydra callback: say before the first job which data cannot be read, and end with ``refit``."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check ``refit``, and read the data of each task once; the tasks whose data are there still run."""
        with ends_command():
            check_refit(config)
            if config.refit and not config.hydra.sweeper._target_.endswith(BasicSweeper.__name__):
                raise UserError(f"refit={config.refit} needs Hydra's own sweeper; set hydra/sweeper=basic")
            nodes = {json.dumps(OmegaConf.to_container(cfg.task, resolve=True)): cfg for cfg in _tasks(config)}
        missing: dict[str, Exception] = {}
        for node, cfg in nodes.items():
            try:
                task: Task = instantiate(cfg.task)
                task.check_data(train=cfg.finetune.epochs > 0)
            except Exception as error:
                if (cause := cli.user_cause(error)) is not None:  # else the job shows it
                    missing[node] = cause
        if missing and len(missing) == len(nodes):
            print(*dict.fromkeys(f"error: {cause}" for cause in missing.values()), sep="\n", file=sys.stderr)
            raise SystemExit(1)
        for node, cause in missing.items():
            print(f"error: task {nodes[node].task.name} will fail, the others run: {cause}", file=sys.stderr)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Train the best setting of each model and task once more on all rows."""
        if not config.refit:
            return
        for cfg, tried in best_settings(jobs_of(config)):
            seed = cfg.seed
            try:
                with cli.quiet():
                    evaluate(cfg, refit=tried)
            except Exception as error:
                cli.note_failure(f"the refit of {cfg.model} on {cfg.task.name}, seed {seed},", error)


def _tasks(config: DictConfig) -> list[DictConfig]:
    try:
        return jobs_of(config, only_tasks=True)
    except HydraException:  # the sweep itself says what is wrong
        return []


def best_settings(jobs: Iterable[DictConfig]) -> Iterator[tuple[DictConfig, Refit]]:
    """Choose the setting with the best median on held-out rows for each model and task, as the report does.

    Yields the config of a refit for each seed: those of ``refit``, or of the sweep. Jobs that failed do not count.
    """
    cells: dict[str, dict[str, list[tuple[DictConfig, float]]]] = {}
    for cfg in jobs:
        given = cfg.copy()
        try:
            _, job = prepare(cfg)
        except Exception as error:
            if cli.user_cause(error) is None:
                raise
            continue
        if not (job.folder / FILE).is_file():
            continue
        result, *_ = read_file(job.folder / FILE)
        if result.held_out is None or math.isnan(result.held_out):  # nothing was trained, or a metric is not defined
            continue
        cell = json.dumps([job.name, job.sha256, result.task, cfg.teacher, *job.data.values()])
        setting = json.dumps(result.settings, sort_keys=True, default=str)
        cells.setdefault(cell, {}).setdefault(setting, []).append((given, result.held_out))
    for settings in cells.values():
        merits = {setting: statistics.median(value for _, value in runs) for setting, runs in settings.items()}
        best = max(merits, key=lambda setting: merits[setting])
        runs = settings[best]
        seeds = [cfg.seed for cfg, _ in runs] if runs[0][0].refit is True else list(runs[0][0].refit)
        for seed in seeds:
            cfg = runs[0][0].copy()
            cfg.seed, cfg.refit, cfg.finetune.held_out = seed, False, 0.0
            yield cfg, Refit(settings_tried=len(settings), held_out=merits[best])
