"""A sweep with jobs that fail: the others run, the table is written, and the command ends with exit status 1."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

import distilkit.evaluate.__main__
import distilkit.train
from distilkit import cli, losses
from distilkit.errors import UserError
from jobs import QUIET, SMALL, Outcome, call, only, write_rows


@pytest.fixture
def sweep(tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path]) -> Callable[..., Outcome]:
    """Train a sweep of short runs into ``tmp_path``/sweep."""

    def go(*overrides: str) -> Outcome:
        given = ["-m", "teacher=hf", f"teacher.name={save_teacher('bert')}", *SMALL, *QUIET]
        given += [f"data.corpus.paths={text_file}", f"cache_dir={tmp_path}/cache", "hydra.sweep.dir=sweep"]
        given += ["trainer.max_steps=1", "validate_first=false"]
        return call(distilkit.train.main, *given, *overrides, cwd=tmp_path)

    return go


def test_a_refused_job_of_a_sweep_leaves_the_others_and_the_table(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = sweep("objective.temperature=2,0,4")
    assert done.code == 1
    finished = [json.loads((tmp_path / f"sweep/{job}/summary.json").read_text("utf-8")) for job in (0, 2)]
    assert [each["objective"]["temperature"] for each in finished] == [2, 4]
    failure = (
        "job 1 (objective.temperature=0) failed: objective.temperature=0.0, but it must be above 0; the paper uses 2"
    )
    table, _, last = done.out.rpartition("1 failed:\n")
    assert last.strip() == failure
    assert "objective.temperature=4" in table
    assert "Traceback" not in done.out + done.err
    assert failure in only(tmp_path / "sweep/1", "*.log").read_text("utf-8")
    *rows, _, note = (tmp_path / "sweep/comparison.md").read_text("utf-8").splitlines()
    names = [row.split("|")[1].strip() for row in rows[2:]]
    assert names == ["teacher", "objective.temperature=2", "objective.temperature=4"]
    assert note.startswith("job 1 (objective.temperature=0) failed: objective.temperature=0.0, but")
    assert json.loads((tmp_path / "sweep/comparison.json").read_text("utf-8"))["failed"] == [failure]


def test_a_fault_of_ours_in_a_sweep_is_logged_once_and_the_sweep_goes_on(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    stop = "+callbacks.stop={_target_: jobs.StopAfter, step: 0}", "callbacks.validation.optimizer_steps=1"
    done = sweep(*stop, "seed=1,2,3")
    assert done.code == 1
    assert (done.out + done.err).count("Traceback (most recent call last)") == 1
    assert "RuntimeError: the power went out" in only(tmp_path / "sweep/0", "*.log").read_text("utf-8")
    last = done.out.rpartition("3 failed:\n")[2].splitlines()
    assert last == [f"job {job} (seed={job + 1}) failed: RuntimeError: the power went out" for job in range(3)]
    assert len((tmp_path / "sweep/comparison.md").read_text("utf-8").splitlines()) == 5  # no table


ROWS = ["cut", "distilled", "baseline", "baseline_time"]


def table_of(folder: Path) -> list[str]:
    """Return the names of the rows in a sweep's table."""
    table, *_ = (folder / "comparison.md").read_text("utf-8").partition("\n\n")
    return [row.split("|")[1].strip() for row in table.splitlines()[2:]]


def test_equal_rows_are_cut_distilled_and_trained_without_the_teacher(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = sweep("sweep=versus", "trainer.max_steps=24", "objective.alpha_cos=1.5", "validate_first=true")
    assert done.code == 0, done.out + done.err
    cut, distilled, baseline, timed = (
        json.loads((tmp_path / "sweep" / row / "summary.json").read_text("utf-8")) for row in ROWS
    )
    assert [each["optimizer_steps"] for each in (cut, distilled, baseline)] == [0, 24, 24]
    assert cut["tokens_seen"] == 0 < distilled["tokens_seen"] == baseline["tokens_seen"]
    assert cut["after"]["val/nll"] == distilled["before"]["val/nll"] == timed["before"]["val/nll"]
    assert timed["budget_seconds"] == pytest.approx(distilled["training_seconds"])
    assert timed["optimizer_steps"] >= 10
    assert [each["objective"] for each in (baseline, timed)] == [{"alpha_mlm": 1.0}] * 2
    assert distilled["objective"]["alpha_cos"] == cut["objective"]["alpha_cos"] == 1.5  # of the command line
    assert all("val/agreement" in each["after"] for each in (cut, distilled, baseline, timed))
    assert table_of(tmp_path / "sweep") == ["teacher", *ROWS]
    assert "At equal tokens, " in done.out and "set versus.tasks=" in done.out
    assert "Traceback" not in done.out + done.err


def test_a_distilled_job_that_fails_leaves_the_baseline_of_equal_tokens(
    sweep: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cosine = losses.hidden_cosine

    def broken(*states: Any) -> Any:
        if torch.is_grad_enabled():  # in training, which the cut student has none of
            raise UserError("the teacher is on strike")
        return cosine(*states)

    monkeypatch.setattr(losses, "hidden_cosine", broken)
    done = sweep("sweep=versus")
    assert done.code == 1
    last = done.out.rpartition("2 failed:\n")[2].splitlines()
    assert last[0] == "job 1 (+sweep/versus=distilled) failed: the teacher is on strike"
    assert last[1].startswith("job 3 (+sweep/versus=baseline_time) failed: sweep/distilled/summary.json does not exist")
    assert table_of(tmp_path / "sweep") == ["teacher", "cut", "baseline"]
    assert "Traceback" not in done.out + done.err


def test_a_sweep_of_evaluations_goes_on_after_a_task_without_data(
    tmp_path: Path, save_teacher: Callable[..., Path]
) -> None:
    write_rows(tmp_path / "glue" / "SST-2")
    given = [f"model={save_teacher('distilbert', num_layers=2)}", "task=mrpc,sst2", f"task.data_dir={tmp_path}/glue"]
    given += ["trainer=cpu", "trainer.enable_progress_bar=false", "task.max_length=16", "finetune.epochs=1"]
    done = call(distilkit.evaluate.__main__.main, "-m", *given, "save_model=false", cwd=tmp_path)
    assert done.code == 1
    assert len(list(tmp_path.glob("outputs/evaluate/*/sst2/*/results.json"))) == 1
    table, _, last = done.out.rpartition("1 failed:\n")
    assert last.startswith("job 0 (task=mrpc) failed: ")
    assert "has 0 files" in last
    assert "SST-2" in table
    assert "Traceback" not in done.out + done.err


@pytest.mark.parametrize("plugin", ["hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "optuna.Sweeper"])
def test_a_failed_job_is_nan_to_hydras_sweeper_and_an_error_to_others(plugin: str) -> None:
    launcher = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    hydra = {"mode": RunMode.MULTIRUN, "job": {"num": 3}, "overrides": {"task": ["a=1"]}}
    config = OmegaConf.create({"hydra": {**hydra, "launcher": {"_target_": launcher}, "sweeper": {"_target_": plugin}}})
    callback, returned = cli.SweepFailures(), JobReturn(overrides=["a=1", "b=2"], status=JobStatus.FAILED)
    returned.return_value = UserError("wrong")
    callback.on_multirun_start(config)
    callback.on_job_end(config, returned)
    assert cli.failures == ["job 3 (b=2) failed: wrong"]
    if "Basic" in plugin:
        assert math.isnan(returned.return_value)
    else:
        assert returned.status == JobStatus.FAILED
    with pytest.raises(SystemExit) as stopped:
        callback.on_multirun_end(config)
    assert stopped.value.code == 1
    callback.on_multirun_start(config)
    callback.on_multirun_end(config)  # nothing is left of the earlier sweep
