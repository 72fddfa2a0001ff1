"""A sweep whose jobs may fail or be stopped: the others run, and the same command goes on where it ended."""

import functools
import gc
import itertools
import json
import logging
import math
import os
import re
import shutil
import traceback
import uuid
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from distilkit import cli
from distilkit.errors import UserError, ends_command
from distilkit.records import NOT_SETTINGS

log = logging.getLogger(__name__)

PRUNED = "pruned.json"  # in the folder of a job that a search has ended early
_RECORD = "job.json"  # in the folder of each job: its overrides
_NOT_SETTINGS = (*NOT_SETTINGS, "optuna.trials=")
# As 1e-3, which Hydra writes as 0.001.
_NUMBER = re.compile(r"(?<![\w./-])-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?(?![\w./-])")


def _plain(override: str) -> str:
    """Return an override without quotes, spaces and capitals; a sweeper may write them and numbers in its own way."""
    text = re.sub(r"[\s'\"]", "", override).casefold()
    return _NUMBER.sub(lambda number: repr(float(number[0])).removesuffix(".0"), text)


def settings_of(overrides: Iterable[str]) -> frozenset[str]:
    """Return what identifies a job."""
    return frozenset(each for each in map(_plain, overrides) if not each.startswith(_NOT_SETTINGS))


def _keys(settings: Iterable[str]) -> set[str]:
    return {each.partition("=")[0] for each in settings}


def _recorded(sweep: Path) -> dict[str, frozenset[str]]:
    """Read the settings of each job of a sweep by the name of its folder."""
    found = {}
    for file in sorted(sweep.glob(f"*/{_RECORD}")):
        try:
            found[file.parent.name] = settings_of(json.loads(file.read_text("utf-8")))
        except ValueError as error:  # as after a power cut
            raise UserError(f"{file} is damaged; delete {file.parent}, whose job is then trained again") from error
    return found


def job_folder() -> str:
    """Return the name of this job's folder in its sweep: that of a job of the same overrides, or else a free one.

    It is the job's number, unless that is taken by a job of other overrides, since the grid has changed.
    """
    hydra: Any = HydraConfig.get()
    number, own = str(hydra.job.num), settings_of(cli.unresolved(hydra.overrides.task))
    recorded = _recorded(Path(hydra.sweep.dir))
    same = [name for name, settings in recorded.items() if settings == own]
    names = itertools.chain([number], (f"{number}-{n}" for n in itertools.count(2)))
    return min(same, key=lambda name: name != number) if same else next(name for name in names if name not in recorded)


def take_up(folder: Path) -> float | None:
    """Record this job's overrides in its folder; return its score there if it has finished before, else None.

    The score is the held-out cross-entropy, or nan where nothing was scored. A folder of other overrides is an error.
    """
    given = cli.unresolved(HydraConfig.get().overrides.task)
    own, recorded = settings_of(given), _recorded(folder.parent).get(folder.name)
    if recorded is None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{_RECORD}.{os.getpid()}"  # ranks that torchrun has started write the same
        temporary.write_text(json.dumps(given), "utf-8")
        temporary.replace(folder / _RECORD)
    elif recorded != own:
        raise UserError(f"{folder} holds a job with {_difference(recorded, own)}; choose another hydra.sweep.dir")
    elif (folder / PRUNED).is_file():
        log.info("%s was pruned before, and is not trained again", folder)
        return math.nan
    elif (folder / "summary.json").is_file() and (folder / "student").is_dir():
        log.info("%s has finished before, and is not trained again", folder)
        after: dict[str, float] = json.loads((folder / "summary.json").read_text("utf-8"))["after"]
        return after.get("val/nll", math.nan)
    return None


def _difference(recorded: Iterable[str], own: Iterable[str]) -> str:
    there, here = (", ".join(sorted(set(a) - set(b))) or "nothing more" for a, b in ((recorded, own), (own, recorded)))
    return f"{there}, where this command has {here}"


class SweepFailures(Callback):
    """Hydra callback: let a sweep go on after failed jobs, and end it with exit status 1 and the list of failures.

    It stands before other callbacks in the config, so that it ends the command after they have printed their tables.
    Launchers give the processes of jobs a copy of it, which leaves a file for each failed job.
    """

    common: frozenset[str] = frozenset()  # the overrides of the command line, which all jobs share
    notes: Path

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Forget an earlier sweep of this process, and find the one that this command goes on with."""
        cli.replace_unprintable()
        given = cli.unresolved(config.hydra.overrides.task)
        self.common = frozenset(map(_plain, given))
        with ends_command():
            _find_sweep(config, given)
            _check_sweep(config, given)
        folder = Path(config.hydra.sweep.dir).expanduser().resolve()
        own = bool(_recorded(folder))  # where jobs have no folders, sweeps share it
        for left in folder.glob(".failures-*") if own else ():
            shutil.rmtree(left, ignore_errors=True)
        self.notes = folder / f".failures-{uuid.uuid4().hex[:8]}"
        cli.forget_failures(self.notes)
        if config.hydra.launcher._target_.endswith("JoblibLauncher"):
            _outlive(get_class(config.hydra.launcher._target_), folder)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Log the error of a job, and give Hydra's own sweeper NaN instead; others have rules for failed jobs."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        own_sweeper = config.hydra.sweeper._target_.startswith("hydra._internal.core_plugins.basic_")
        result: Any = job_return._return_value  # the property would raise an error
        if not own_sweeper and job_return.status == JobStatus.COMPLETED and result != result:  # NaN is no score to them
            job_return.status, job_return.return_value = JobStatus.FAILED, UserError("it has no score")
        if job_return.status != JobStatus.FAILED:
            return
        error: Any = job_return._return_value
        own = ", ".join(each for each in job_return.overrides or () if _plain(each) not in self.common)
        note = cli.note_failure(f"job {config.hydra.job.num} ({own})", error)
        if not cli.notes:  # in a process of its own
            self.notes.mkdir(parents=True, exist_ok=True)
            (self.notes / f"{config.hydra.job.num:06}").write_text(note, "utf-8")
            job_return.return_value = UserError(note)  # of any error it is not known whether it can be sent
        if own_sweeper:
            job_return.status, job_return.return_value = JobStatus.COMPLETED, math.nan
        traceback.clear_frames(error.__traceback__)  # they hold the models, whose memory the next job needs
        gc.collect()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """List the failures, and end with exit status 1; Hydra would turn an error into a warning."""
        if failures := cli.all_failures():
            print(f"{len(failures)} failed:", *failures, sep="\n")
            raise SystemExit(1)


def _outlive(launcher: Any, folder: Path) -> None:
    """Let a launcher that breaks off, since a process was killed, end its jobs and not the sweep."""
    plain = getattr(launcher.launch, "__wrapped__", launcher.launch)  # an earlier sweep of this process

    @functools.wraps(plain)
    def launch(*args: Any, **kwargs: Any) -> Any:
        try:
            return plain(*args, **kwargs)
        except BrokenExecutor:
            ended = {file.parent.name for name in (PRUNED, "summary.json") for file in folder.glob(f"*/{name}")}
            left = ", ".join(name for name in _recorded(folder) if name not in ended) or "no job"
            cure = f"the same command with hydra.sweep.dir={folder} goes on; hydra.launcher.n_jobs=1 takes less memory"
            cli.note_failure("the launcher", UserError(f"a process was killed; begun, not finished: {left}; {cure}"))
            return []

    launcher.launch = launch


def _find_sweep(config: DictConfig, given: list[str]) -> None:
    """With ``ckpt_path=last`` or ``auto``, set the sweep's folder to that of the newest sweep of the same overrides."""
    folder = Path(config.hydra.sweep.dir).expanduser()
    if config.get("ckpt_path") not in ("last", "auto") or (folder / "multirun.yaml").is_file():
        return
    same = []
    for file in sorted(folder.parent.glob("*/multirun.yaml"), key=lambda file: file.stat().st_mtime):
        overrides: Any = OmegaConf.load(file)
        if settings_of(cli.unresolved(overrides.hydra.overrides.task)) == settings_of(given):
            same.append(file.parent)
    if same:
        log.info("going on with the sweep in %s", same[-1])
        cli.set_folder(config, "sweep", same[-1])
    elif config.ckpt_path == "last":
        raise UserError(
            f"ckpt_path=last, but no sweep below {folder.parent} has the overrides of this command; "
            "give the sweep's folder as hydra.sweep.dir, or start without ckpt_path"
        )


def _check_sweep(config: DictConfig, given: list[str]) -> None:
    """Refuse the folder of a sweep with other settings: the finished jobs there are not jobs of this command."""
    sweep = Path(config.hydra.sweep.dir).expanduser()
    recorded = list(_recorded(sweep).values())
    try:
        parsed = OverridesParser.create().parse_overrides(given)
    except OverrideParseException:  # Hydra will say so
        return
    last = {each.get_key_element(): each for each in parsed}.values()  # of each key
    shared = settings_of(each.input_line or "" for each in last if not each.is_sweep_override())
    keys = _keys(settings_of(given)) | set(config.hydra.sweeper.get("params") or {})
    if recorded and not any(shared <= job and _keys(job) == keys for job in recorded):
        job = min(recorded, key=lambda each: len(shared - each) + len(_keys(each) ^ keys))
        there = {each for each in job if _keys([each]) & (_keys(shared) | (_keys(job) - keys))}
        here = shared | (keys - _keys(job) - _keys(shared))
        raise UserError(f"the sweep in {sweep} has {_difference(there, here)}; choose another hydra.sweep.dir")
