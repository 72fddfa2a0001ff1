"""A search over settings with Optuna: each job of a sweep trains one trial of a study that outlives the command."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import OverrideParseException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from distilkit.errors import UserError, ends_command
from distilkit.module import DistillationModule
from distilkit.records import write_json
from distilkit.runs.sweeps import PRUNED

log = logging.getLogger(__name__)

_NO_KEY = object()


def _open(journal: str, **options: Any) -> optuna.Study:
    """Open the study in a file, to which processes of several machines may append."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(Path(journal).resolve())))  # its lock expires where it leads there
    return optuna.create_study(storage=storage, study_name="distilkit", load_if_exists=True, **options)


def _trial_of(study: optuna.Study, job: int) -> FrozenTrial | None:
    """Return the newest trial of a job: one that failed is tried again when the sweep goes on."""
    found = [each for each in study.get_trials(deepcopy=False) if each.user_attrs.get("job") == job]
    return found[-1] if found else None


def _distribution(override: Override) -> BaseDistribution:
    """Return the values that an override in Hydra's syntax spans: ``interval``, ``range`` or a choice."""
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        of_kind = IntDistribution if whole else FloatDistribution
        return of_kind(value.start, value.end, log="log" in value.tags)  # type: ignore[arg-type]
    values: Any = [each.text if isinstance(each, QuotedString) else each for each in override.sweep_iterator()]
    if isinstance(value, RangeSweep) and all(isinstance(each, int) for each in values):
        return IntDistribution(min(values), max(values), step=abs(int(value.step)))
    if wrong := [each for each in values if not isinstance(each, str | int | float | None)]:
        raise UserError(f"optuna.space: {override.input_line} has {wrong[0]}; give numbers, texts, true, false or null")
    return CategoricalDistribution(values)


def space_of(lines: Any) -> dict[str, BaseDistribution]:
    """Return the values of each key of a search, which are given as overrides of a sweep."""
    try:
        overrides = OverridesParser.create().parse_overrides(list(map(str, lines or ())))
        space = {each.get_key_element(): _distribution(each) for each in overrides if each.is_sweep_override()}
    except (OverrideParseException, ValueError) as error:
        raise UserError(f"optuna.space={lines} cannot be read: {str(error).splitlines()[0]}") from error
    if not space or len(space) < len(overrides):
        cure = 'each needs several values, as optuna.space=["optimizer.lr=tag(log,interval(1e-5,1e-3))","seed=1,2"]'
        raise UserError(f"optuna.space={lines}; {cure}")
    return space


def suggest(own: DictConfig, *, seed: int) -> DictConfig:
    """Return what the trial of a job sets, as a row of a sweep.

    A job that was stopped keeps its trial. A failed one gets another trial with the same values, because a trial of a
    study ends once. The sampler is seeded by ``seed`` and the job.
    """
    (state,) = np.random.SeedSequence([seed, own.trial]).generate_state(1)
    study = _open(own.journal, sampler=instantiate(own.sampler, seed=int(state)))
    trial = _trial_of(study, own.trial)
    if trial is None:
        asked = study.ask(space_of(own.space))
        asked.set_user_attr("job", own.trial)
        params = asked.params
    else:
        params = trial.params
        if trial.state == TrialState.FAIL:
            again: Any = {"params": params, "distributions": trial.distributions, "user_attrs": trial.user_attrs}
            study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, **again))
    row = OmegaConf.create({})
    for key, value in params.items():
        OmegaConf.update(row, key, value)
    return row


class Prune(Callback):
    """Report the held-out cross-entropy of each validation to the study, and end the trial if ``pruner`` says so.

    The pruner compares trials at the same optimizer step. The first rank asks it for all ranks.
    """

    def __init__(self, *, journal: str, trial: int, pruner: optuna.pruners.BasePruner | None) -> None:
        """Take what the config's node ``optuna`` has."""
        self.journal, self.trial, self.pruner = journal, trial, pruner or optuna.pruners.NopPruner()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``TrialPruned`` on the first rank, and end the others without a word; not at the end of the training."""
        assert isinstance(pl_module, DistillationModule)
        step = trainer.global_step
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not step:
            return
        stop = False
        if trainer.is_global_zero:
            study = _open(self.journal, pruner=self.pruner)
            found = _trial_of(study, self.trial)
            if found and not found.state.is_finished() and step not in found.intermediate_values:
                trial = optuna.Trial(study, found._trial_id)
                trial.report(float(trainer.callback_metrics["val/nll"]), step)
                stop = trial.should_prune()
        stop &= not pl_module.clock.done and step < trainer.estimated_stepping_batches
        if trainer.strategy.broadcast(stop):
            raise optuna.TrialPruned(f"pruned after step {step}") if trainer.is_global_zero else SystemExit(0)


class Study(HydraCallback):
    """Hydra callback: open the study of a sweep, tell it how each trial ended, and name the best one.

    It stands behind ``SweepFailures``, so that a pruned trial is none of its failures.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the search before the first job."""
        own = config.optuna
        with ends_command():
            unknown = [key for key in space_of(own.space) if OmegaConf.select(config, key, default=_NO_KEY) is _NO_KEY]
            if unknown:
                raise UserError(f"optuna.space names {', '.join(unknown)}, which the config does not have")
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                found = "each rank of torchrun would ask for a trial of its own"
                raise UserError(f"{found}; start one process, which starts its ranks itself")
        journal = _journal(config)
        journal.parent.mkdir(parents=True, exist_ok=True)
        content = (journal.read_bytes() if journal.is_file() else b"") or b"\n"
        if not content.endswith(b"\n"):  # what is appended would spoil it
            log.warning("the last line of %s was cut short, and is dropped", journal)
            os.truncate(journal, content.rfind(b"\n") + 1)
        _open(str(journal))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Tell the study the score of a trial, or that it was pruned or has failed."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        study = _open(str(_journal(config)))
        trial, result = _trial_of(study, config.optuna.trial), job_return._return_value
        pruned = isinstance(result, optuna.TrialPruned)
        if pruned:
            log.info("%s", result)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, math.nan
            out = Path(config.hydra.runtime.output_dir)
            write_json(out / PRUNED, {"reason": str(result), "values": trial.params if trial else {}})
        if trial is None or trial.state.is_finished():
            return
        failed = job_return.status == JobStatus.FAILED or math.isnan(result if not pruned else 0.0)
        state = TrialState.PRUNED if pruned else TrialState.FAIL if failed else TrialState.COMPLETE
        study.tell(trial.number, None if pruned or failed else result, state=state)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the best trial, and write it to best.json in the sweep's folder."""
        journal = _journal(config)
        trials = _open(str(journal)).get_trials()
        count = {state: sum(each.state == state for each in trials) for state in TrialState}
        scored = [each for each in trials if each.state == TrialState.COMPLETE]
        print(f"{count[TrialState.COMPLETE]} trials finished, {count[TrialState.PRUNED]} pruned")
        if scored:
            best = min(scored, key=lambda each: each.value or 0.0)
            job = best.user_attrs["job"]
            write_json(journal.with_name("best.json"), {"trial": job, "val/nll": best.value, "values": best.params})
            values = ", ".join(f"{key}={value}" for key, value in best.params.items())
            print(f"best: trial {job}, {best.value:.4f} nats per labelled token with {values}")


def _journal(config: DictConfig) -> Path:
    return Path(config.hydra.sweep.dir).expanduser().resolve() / "optuna.journal"
