"""A sweep whose jobs train side by side in one process, so that the teacher runs once for all of them."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, filter_overrides
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from distilkit.cli import quiet
from distilkit.errors import UserError, ends_command
from distilkit.runs.signals import ENDING, inbox, listening, release
from distilkit.runs.turns import Turns, own_turn

log = logging.getLogger(__name__)

# What decides the batches, and what the teacher makes of them.
_COMMON = ["teacher", "tokenizer", "data", "seed", "cache_dir", "matmul_precision", "compile"]
_COMMON += ["trainer.precision", "trainer.accelerator", "trainer.devices"]
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
                _check_sweep(config)
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
    jobs = [context.config_loader.load_sweep_config(config, list(each)) for each in job_overrides]
    differing = _differing(jobs)
    if not config.sweep.share_teacher:
        alone = config.hydra.sweeper.get("max_batch_size") == 1 or OmegaConf.is_interpolation(config, "row")
        if len(jobs) > 1 and not differing and not alone and config.teacher.name and not config.teacher_cache.epochs:
            log.info("all %s jobs read one teacher: sweep.share_teacher=true runs it once for all of them", len(jobs))
        return _launch(self, job_overrides, initial_job_idx)
    with ends_command():
        if differing:
            found = f"sweep.share_teacher=true, but the jobs differ in {', '.join(differing)}, which the teacher reads"
            raise UserError(f"{found}; sweep over objective, student, optimizer or scheduler, or {_CURE}")
    return _take_turns(self, job_overrides, initial_job_idx)


def _check_sweep(config: DictConfig) -> None:
    """Refuse sweeps whose jobs cannot run side by side in one process."""
    if not config.hydra.launcher._target_.endswith(".BasicLauncher"):
        raise UserError(f"sweep.share_teacher=true trains in one process, but hydra/launcher starts others; {_CURE}")
    if config.hydra.sweeper.get("max_batch_size") == 1 or OmegaConf.is_interpolation(config, "row"):
        raise UserError(f"sweep.share_teacher=true, but the jobs of this sweep read those before them; {_CURE}")
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

    plain: list[Any] = [OmegaConf.to_container(job, resolve=False) for job in jobs]
    found = []
    for key in _COMMON:
        values = plain
        for name in key.split("."):
            values = [value.get(name) for value in values]
        found += differing(values, key)
    return found


def _take_turns(
    launcher: BasicLauncher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> Sequence[JobReturn]:
    """Run each job in a thread of its own; signals reach this one, and the jobs see them after their next step."""
    common = set.intersection(*map(set, job_overrides))
    names = [", ".join(each for each in filter_overrides(job) if each not in common) for job in job_overrides]
    turns = Turns([name or f"job {initial_job_idx + number}" for number, name in enumerate(names)])
    returns: list[Any] = [None] * len(job_overrides)
    stops: list[BaseException] = []

    def run(number: int) -> None:
        turn = turns.join(number)
        try:
            returns[number] = _launch(launcher, [job_overrides[number]], initial_job_idx + number)[0]
        except BaseException as error:  # a signal's, or one of Hydra's, which ends the sweep
            stops.append(error)
        finally:
            turn.leave()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(job_overrides))]
    with _named_records(), quiet(), listening(*ENDING):
        inbox.held = True
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(1.0)  # a signal that the system gives to another thread is seen then
        if stops:
            raise stops[0]
        release()
    return returns


@contextmanager
def _named_records() -> Iterator[None]:
    """Begin what is logged with the name of its job."""
    plain = logging.getLogRecordFactory()

    def named(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = plain(*args, **kwargs)
        if turn := own_turn():
            record.msg, record.args = f"{turn.name}: {record.getMessage()}", ()
        return record

    logging.setLogRecordFactory(named)
    try:
        yield
    finally:
        logging.setLogRecordFactory(plain)
