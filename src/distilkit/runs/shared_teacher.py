"""A sweep whose jobs train side by side in one process, so that the teacher runs once for all of them."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import basic_launcher
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, filter_overrides
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distilkit.cli import quiet
from distilkit.errors import UserError, ends_command
from distilkit.runs.signals import ENDING, Stopped, command_again, inbox, listening, release
from distilkit.runs.sweeps import settings_of
from distilkit.runs.turns import Turns, own_turn

log = logging.getLogger(__name__)

# What decides the batches, what the teacher makes of them, and flags of the whole process.
_COMMON = ["teacher", "tokenizer", "data", "seed", "cache_dir", "matmul_precision", "compile"]
_COMMON += [f"trainer.{key}" for key in ("precision", "accelerator", "devices", "deterministic", "benchmark")]
_CURE = "leave sweep.share_teacher=true out"

_launch = BasicLauncher.launch


class ShareTeacher(Callback):
    """Hydra callback: with ``sweep.share_teacher=true``, train the jobs of a sweep in threads that take turns.

    Otherwise say that it would pay, where the jobs have teacher and data in common.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take the place of Hydra's own launcher; others start processes."""
        with ends_command():
            if config.sweep.share_teacher:
                _check(config)
        BasicLauncher.launch = _launch_sweep  # type: ignore[method-assign]

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave Hydra's launcher as it was."""
        BasicLauncher.launch = _launch  # type: ignore[method-assign]


def _launch_sweep(
    self: BasicLauncher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> Sequence[JobReturn]:
    """Run the jobs of a sweep as ``BasicLauncher.launch`` does, or in turns."""
    context, config = self.hydra_context, self.config
    assert context is not None
    assert config is not None
    shares = OmegaConf.select(config, "sweep.share_teacher")
    if shares is None:  # a sweep of another command, after one that was interrupted
        return _launch(self, job_overrides, initial_job_idx)
    jobs = [context.config_loader.load_sweep_config(config, list(each)) for each in job_overrides]
    if shares:
        with ends_command():
            _check_jobs(jobs)
        return _take_turns(self, job_overrides, initial_job_idx)
    try:
        _check_jobs(jobs)
        if len(jobs) > 1:
            log.info("all %s jobs read one teacher: sweep.share_teacher=true runs it once for all of them", len(jobs))
    except UserError:
        pass  # it would be refused
    return _launch(self, job_overrides, initial_job_idx)


def _check_jobs(jobs: Sequence[DictConfig]) -> None:
    """Refuse jobs that cannot run side by side, or that have no teacher and batches in common."""
    for job in jobs:
        _check(job)
    if differing := _differing(jobs):
        found = f"sweep.share_teacher=true, but the jobs differ in {', '.join(differing)}, which the teacher reads"
        raise UserError(f"{found}; sweep over objective, student, optimizer or scheduler, or {_CURE}")


def _check(config: DictConfig) -> None:
    """Refuse what cannot run side by side in one process."""
    hydra, trainer = config.hydra, config.trainer
    if not hydra.launcher._target_.endswith(".BasicLauncher"):
        raise UserError(f"sweep.share_teacher=true trains in one process, but hydra/launcher starts others; {_CURE}")
    devices = trainer.get("devices", "auto")
    if trainer.get("num_nodes", 1) != 1 or devices not in (1, "1", "auto"):
        found = f"trainer.devices={devices} and trainer.num_nodes={trainer.get('num_nodes', 1)}"
        raise UserError(f"sweep.share_teacher=true trains on one device, but {found}; set both to 1, or {_CURE}")
    if hydra.sweeper.get("max_batch_size") == 1 or OmegaConf.is_interpolation(config, "row"):
        raise UserError(f"sweep.share_teacher=true, but the jobs of this sweep read those before them; {_CURE}")
    baseline = config.get("baseline")
    if baseline is not None and Path(hydra.sweep.dir).resolve() in Path(str(baseline)).expanduser().resolve().parents:
        raise UserError(f"sweep.share_teacher=true, but baseline={baseline} is a job of the same sweep; {_CURE}")
    if config.row is not None:
        raise UserError(f"sweep.share_teacher=true, but row={config.row} changes a job after this check; {_CURE}")
    if hydra.job.chdir or hydra.job.env_set:
        key = "chdir" if hydra.job.chdir else "env_set"
        raise UserError(f"hydra.job.{key}={hydra.job[key]} is of a whole process, which all jobs share; {_CURE}")
    if config.budget is not None:
        raise UserError(f"sweep.share_teacher=true trains by steps, but budget={config.budget}; set trainer.max_steps")
    if config.teacher_cache.epochs:
        found = f"teacher_cache.epochs={config.teacher_cache.epochs} and sweep.share_teacher=true"
        raise UserError(f"{found} both save the teacher's passes; choose one of them")
    if config.teacher.name is None:
        raise UserError(f"sweep.share_teacher=true, but teacher=none; {_CURE}")


def _differing(jobs: Sequence[DictConfig]) -> list[str]:
    """Return what of the common keys is not the same in all jobs, as ``data.block_size``."""

    def differing(values: Sequence[Any], key: str) -> list[str]:
        if not all(isinstance(value, dict) for value in values):
            return [key] if any(value != values[0] for value in values) else []
        names = dict.fromkeys(name for value in values for name in value)
        return [each for name in names for each in differing([value.get(name) for value in values], f"{key}.{name}")]

    return [each for key in _COMMON for each in differing([_plain(job, key) for job in jobs], key)]


def _plain(job: DictConfig, key: str) -> Any:
    """Return what a job has at a key, with interpolations resolved where that is possible before it begins."""
    node = OmegaConf.select(job, key, throw_on_resolution_failure=False)
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException:
        return OmegaConf.to_container(node, resolve=False)


def _take_turns(
    launcher: BasicLauncher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> Sequence[JobReturn]:
    """Run each job in a thread of its own; signals reach this one, and the jobs see them after their next step."""
    common = set.intersection(*map(set, job_overrides))
    names = [", ".join(each for each in filter_overrides(job) if each not in common) for job in job_overrides]
    names = [name or f"job {initial_job_idx + number}" for number, name in enumerate(names)]
    first: dict[frozenset[str], int] = {}
    for number, job in enumerate(job_overrides):
        first.setdefault(settings_of(job), number)
    numbers = list(first.values())  # a job that is there twice has one folder, and is trained once
    log.info("%s jobs take turns, with one pass of the teacher for all:", len(numbers))
    for number in numbers:
        log.info("\t#%s : %s", initial_job_idx + number, names[number])
    turns, returns, stops = Turns([names[number] for number in numbers]), {}, []

    def run(place: int) -> None:
        number, turn = numbers[place], turns.join(place)
        try:
            (returns[number],) = _launch(launcher, [job_overrides[number]], initial_job_idx + number)
        except BaseException as error:  # a signal's, or one of Hydra's, which ends the sweep
            stops.append(error)
        finally:
            turn.leave()

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(numbers))]
    with _logging(), quiet(), listening(*ENDING, *_requeue(launcher.config)):
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(1.0)  # a signal that the system gives to another thread is seen then
        except Stopped:  # nothing holds signals: no job trains yet
            folder = str(Path(launcher.config.hydra.sweep.dir).resolve())  # type: ignore[union-attr]
            again = command_again({"hydra.sweep.dir": folder}) if inbox.command else "the same command"
            log.warning("%s ended the command, which starts again with: %s", signal.Signals(inbox.received).name, again)
            logging.shutdown()
            os._exit(128 + inbox.received)  # what the other threads write is whole or not there
        if stops:
            raise stops[0]
        release()
    for number, job in enumerate(job_overrides):
        if number not in returns:
            (returns[number],) = _launch(launcher, [job], initial_job_idx + number)
    return [returns[number] for number in range(len(job_overrides))]


def _requeue(config: Any) -> list[signal.Signals]:
    """Return the signal after which SLURM starts a training again, if it is one."""
    name = str(OmegaConf.select(config, "callbacks.signals.requeue"))
    return [signal.Signals[name]] if name in signal.Signals.__members__ else []


@contextmanager
def _logging() -> Iterator[None]:
    """Begin what is logged with the name of its job, and leave out that Hydra launches one job at a time."""
    plain, level = logging.getLogRecordFactory(), basic_launcher.log.level

    def named(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = plain(*args, **kwargs)
        if turn := own_turn():
            name = turn.name.replace("%", "%%") if record.args else turn.name
            record.msg = f"{name}: {record.msg}"
        return record

    logging.setLogRecordFactory(named)
    basic_launcher.log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        basic_launcher.log.setLevel(level)
        logging.setLogRecordFactory(plain)
