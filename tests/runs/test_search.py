"""A search with Optuna: its values, its trials over several starts, and how each of them ends."""

import json
import math
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from distilkit.errors import UserError
from distilkit.runs import search

SPACE = ["optimizer.lr=tag(log,interval(1e-5,1e-3))", "data.epochs=int(interval(1,4))"]


def node(folder: Path, trial: int, *, space: list[str] = SPACE) -> DictConfig:
    """Return the config's node of a search, with an own sampler that knows the seed alone."""
    sampler = {"_target_": "optuna.samplers.RandomSampler"}
    return OmegaConf.create({"trial": trial, "space": space, "sampler": sampler, "journal": f"{folder}/optuna.journal"})


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return search._open(f"{folder}/optuna.journal").get_trials()


def test_values_are_given_as_on_the_command_line() -> None:
    given = [
        *SPACE,
        "a=interval(1,4)",
        "objective.temperature=1,2.5",
        "student.layers=range(2,9,3)",
        "scheduler.name=linear,'cosine'",
    ]
    assert search.space_of(given) == {
        "optimizer.lr": FloatDistribution(1e-5, 1e-3, log=True),
        "data.epochs": IntDistribution(1, 4),
        "a": FloatDistribution(1, 4),
        "objective.temperature": CategoricalDistribution([1, 2.5]),
        "student.layers": IntDistribution(2, 8, step=3),
        "scheduler.name": CategoricalDistribution(["linear", "cosine"]),
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([], "each needs several values, as optuna.space="),
        (["seed=1"], "each needs several values, as optuna.space="),
        (["seed=1,2", "lr=3"], "each needs several values, as optuna.space="),
        (["seed"], "cannot be read: "),
        (["lr=interval(3,1)"], "cannot be read: "),
        (["student.layers=[0,2],[0,1]"], "has \\[0, 2\\]; give numbers, texts, true, false or null"),
    ],
)
def test_a_space_that_is_none_is_refused(space: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search.space_of(space)


def test_a_job_keeps_its_trial_until_that_has_failed_and_then_tries_its_values_again(tmp_path: Path) -> None:
    first = search.suggest(node(tmp_path, 0), seed=1)
    assert set(first) == {"optimizer", "data"} and 1e-5 <= first["optimizer"]["lr"] <= 1e-3
    assert search.suggest(node(tmp_path, 0), seed=1) == first  # it was stopped
    second = search.suggest(node(tmp_path, 1), seed=1)
    assert second["optimizer"]["lr"] != first["optimizer"]["lr"]
    search._open(f"{tmp_path}/optuna.journal").tell(0, state=TrialState.FAIL)
    assert search.suggest(node(tmp_path, 0), seed=1) == first
    assert search.suggest(node(tmp_path, 1), seed=1) == second
    assert [(each.user_attrs["job"], each.state.name) for each in trials(tmp_path)] == [
        *((0, "FAIL"), (1, "RUNNING"), (0, "RUNNING"))
    ]
    (tmp_path / "again").mkdir()
    assert search.suggest(node(tmp_path / "again", 1), seed=1) == second  # whatever was asked before


@pytest.mark.parametrize(
    ("result", "state", "status"),
    [
        (2.5, TrialState.COMPLETE, JobStatus.COMPLETED),
        (math.nan, TrialState.FAIL, JobStatus.COMPLETED),
        (UserError("the power went out"), TrialState.FAIL, JobStatus.FAILED),
        (optuna.TrialPruned("pruned after step 3"), TrialState.PRUNED, JobStatus.COMPLETED),
    ],
)
def test_a_study_learns_how_each_trial_ended(
    result: Any, state: TrialState, status: JobStatus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = search.suggest(node(tmp_path, 4), seed=1)
    hydra = {"mode": RunMode.MULTIRUN, "sweep": {"dir": str(tmp_path)}, "runtime": {"output_dir": str(tmp_path)}}
    config = OmegaConf.create({"hydra": hydra, "optuna": node(tmp_path, 4), **row})
    callback = search.Study()
    callback.on_multirun_start(config)
    returned = JobReturn(status=JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED)
    returned.return_value = result
    callback.on_job_end(config, returned)
    assert returned.status == status
    (trial,) = trials(tmp_path)
    assert (trial.state, trial.value) == (state, 2.5 if state == TrialState.COMPLETE else None)
    assert (tmp_path / "pruned.json").exists() == (state == TrialState.PRUNED)
    callback.on_job_end(config, JobReturn(status=JobStatus.COMPLETED, _return_value=1.0))  # a start later
    assert trials(tmp_path)[0].state == state
    callback.on_multirun_end(config)
    assert ("best: trial 4, 2.5000 nats" in capsys.readouterr().out) == (state == TrialState.COMPLETE)
    if state == TrialState.COMPLETE:
        best = json.loads((tmp_path / "best.json").read_text("utf-8"))
        assert (best["trial"], best["val/nll"], set(best["values"])) == (4, 2.5, {"optimizer.lr", "data.epochs"})


def test_the_lock_of_a_study_leads_to_its_file_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, found = os.symlink, []

    def spy(target: str, name: str) -> None:
        link(target, name)
        found.append(Path(name).exists())

    monkeypatch.setattr(os, "symlink", spy)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").mkdir()
    search._open("sweep/optuna.journal")
    assert found and all(found)


def test_a_study_whose_last_line_was_cut_goes_on(tmp_path: Path) -> None:
    row = search.suggest(node(tmp_path, 4), seed=1)
    hydra = {"sweep": {"dir": str(tmp_path)}}
    config = OmegaConf.create({"hydra": hydra, "optuna": node(tmp_path, 4), **row})
    journal = tmp_path / "optuna.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "tri')
    search.Study().on_multirun_start(config)
    assert journal.read_bytes().startswith(whole)
    assert len(trials(tmp_path)) == 1


def test_a_search_that_cannot_run_ends_before_its_first_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hydra = {"sweep": {"dir": str(tmp_path)}}
    config = OmegaConf.create({"hydra": hydra, "optuna": node(tmp_path, 0), "optimizer": {"lr": 1.0}})
    with pytest.raises(SystemExit):
        search.Study().on_multirun_start(config)
    assert "error: optuna.space names data.epochs, which the config does not have" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        search.Study().on_multirun_start(OmegaConf.merge(config, {"data": {"epochs": None}}))
    assert "start one process, which starts its ranks itself" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
