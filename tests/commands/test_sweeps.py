"""A sweep with jobs that fail: the others run, the table is written, and the command ends with exit status 1."""

import json
import math
import os
import pickle
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import distilkit.evaluate.__main__
import distilkit.train
from distilkit import cli, losses
from distilkit.errors import UserError
from distilkit.runs import search, sweeps
from jobs import QUIET, SMALL, Outcome, call, only, spawn, write_rows


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


OWN = "hydra._internal.core_plugins."


def config_of(
    sweep: Path, *overrides: str, sweeper: str = f"{OWN}basic_sweeper.X", launcher: str = f"{OWN}basic_launcher.X"
) -> DictConfig:
    """Return what Hydra's callbacks read of a sweep's config."""
    hydra = {"mode": RunMode.MULTIRUN, "job": {"num": 3}, "overrides": {"task": list(overrides), "hydra": []}}
    hydra |= {"sweep": {"dir": str(sweep)}, "sweeper": {"_target_": sweeper}, "launcher": {"_target_": launcher}}
    own = dict(each.split("=") for each in overrides if each.startswith("ckpt_path="))
    return OmegaConf.create({"hydra": hydra, **own})


@pytest.mark.parametrize("plugin", ["hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "optuna.Sweeper"])
@pytest.mark.parametrize("same_process", [True, False])
def test_a_failed_job_is_nan_to_hydras_sweeper_and_an_error_to_others(
    plugin: str, same_process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, "a=1", sweeper=plugin)
    callback, returned = sweeps.SweepFailures(), JobReturn(overrides=["a=1", "b=2"], status=JobStatus.FAILED)
    returned.return_value = UserError("wrong")
    callback.on_multirun_start(config)
    with monkeypatch.context() as there:
        if not same_process:
            there.setattr(cli, "notes", [])
            there.setattr(cli, "failures", [])
        pickle.loads(pickle.dumps(callback)).on_job_end(config, returned)
    assert pickle.loads(pickle.dumps(returned)).status == returned.status
    assert cli.all_failures() == ["job 3 (b=2) failed: wrong"]
    if "basic" in plugin:
        assert math.isnan(returned.return_value)
    else:
        with pytest.raises(UserError, match="wrong"):
            print(returned.return_value)
    with pytest.raises(SystemExit) as stopped:
        callback.on_multirun_end(config)
    assert stopped.value.code == 1
    assert list(tmp_path.iterdir()) == []
    callback.on_multirun_start(config)
    callback.on_multirun_end(config)  # nothing is left of the earlier sweep


@pytest.mark.parametrize(("plugin", "fails"), [("hydra._internal.core_plugins.basic_sweeper.X", 0), ("optuna.X", 1)])
def test_a_job_without_a_score_has_failed_for_a_sweeper_that_needs_one(plugin: str, fails: int, tmp_path: Path) -> None:
    config = config_of(tmp_path, "a=1", sweeper=plugin)
    callback, returned = sweeps.SweepFailures(), JobReturn(overrides=["b=2"], status=JobStatus.COMPLETED)
    returned.return_value = math.nan
    callback.on_multirun_start(config)
    callback.on_job_end(config, returned)
    assert cli.all_failures() == ["job 3 (b=2) failed: it has no score"] * fails
    assert returned.status == (JobStatus.FAILED if fails else JobStatus.COMPLETED)


def test_a_launcher_that_breaks_off_leaves_the_table_and_names_the_jobs_that_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Launcher:
        def launch(self, jobs: Any) -> Any:
            raise BrokenExecutor

    monkeypatch.setattr(sweeps, "get_class", lambda _: Launcher)
    callback = sweeps.SweepFailures()
    for number in (0, 1, 2):
        record(tmp_path / f"{number}", "b=0", f"a={number}")
    (tmp_path / "0" / "summary.json").touch()
    for sweep in (tmp_path / "earlier", tmp_path):  # in one process, the second of which is told of
        callback.on_multirun_start(config_of(sweep, "b=0", "a=0,1,2,3", launcher="x.JoblibLauncher"))
    assert Launcher().launch([]) == []
    again = f"the same command with hydra.sweep.dir={tmp_path} goes on; hydra.launcher.n_jobs=1 takes less memory"
    assert cli.all_failures() == [f"the launcher failed: a process was killed; begun, not finished: 1, 2; {again}"]


# -------------------------------------------------------------------------------- going on

KILL = "+callbacks.send={_target_: jobs.SendOnce, name: SIGTERM, step: 2, file: '${output_dir}/kill'}"


def logged(folder: Path) -> str:
    return only(folder, "*.log").read_text("utf-8")


def test_a_sweep_goes_on_where_it_was_stopped_and_trains_no_job_twice(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    given = "objective.temperature=2,0,4,8", "trainer.max_steps=4", KILL
    (tmp_path / "sweep" / "2").mkdir(parents=True)
    (tmp_path / "sweep" / "2" / "kill").touch()
    assert sweep(*given).code == 143
    assert not (tmp_path / "sweep" / "3").exists()
    done = sweep(*given)
    assert done.code == 1 and "failed:" in done.out, done.out + done.err
    (failure,) = done.out.rpartition("1 failed:\n")[2].splitlines()
    assert failure.startswith("job 1 (objective.temperature=0) failed: ")
    summaries = [json.loads((tmp_path / f"sweep/{job}/summary.json").read_text("utf-8")) for job in (0, 2, 3)]
    assert [(each["objective"]["temperature"], each["optimizer_steps"]) for each in summaries] == [
        (2, 4),
        (4, 4),
        (8, 4),
    ]
    begun = [logged(tmp_path / "sweep" / job).count("student: ") for job in "023"]
    assert begun == [1, 2, 1]
    assert "has finished before, and is not trained again" in logged(tmp_path / "sweep/0")
    assert f"resuming from {tmp_path}/sweep/2/checkpoints/last.ckpt" in logged(tmp_path / "sweep/2")
    assert table_of(tmp_path / "sweep") == ["teacher", *(f"objective.temperature={each}" for each in (2, 4, 8))]
    assert "Traceback" not in done.out + done.err


def test_a_job_is_found_by_its_overrides_where_the_grid_has_changed(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert sweep("objective.temperature=2,4").code == 0
    done = sweep("objective.temperature=3,2,8", "ckpt_path=auto")
    assert done.code == 0, done.out + done.err
    found = {
        folder.name: json.loads((folder / "summary.json").read_text("utf-8"))["objective"]["temperature"]
        for folder in (tmp_path / "sweep").iterdir()
        if folder.is_dir()
    }
    assert found == {"0": 2, "1": 4, "0-2": 3, "2": 8}
    assert [logged(tmp_path / "sweep" / job).count("student: ") for job in found] == [1] * 4
    assert sorted(table_of(tmp_path / "sweep")) == [
        *(f"objective.temperature={each}" for each in (2, 3, 4, 8)),
        "teacher",
    ]


def record(folder: Path, *overrides: str) -> None:
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(overrides), "utf-8")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["a=1,2", "b=4"], "has b=3, where this command has b=4; choose another hydra.sweep.dir"),
        (["a=1,2"], "has b=3, where this command has nothing more; choose"),
        (["a=1,2", "b=3", "c=0"], "has nothing more, where this command has c=0; choose"),
        (["a=1,2", "b=3"], None),
        (["a=5,6", "b='3'", "ckpt_path=auto"], None),
        (["a=2", "b=3,4"], None),
        (["a=2", "b=3", "optuna.trials=40"], None),  # a search goes on
    ],
)
def test_a_sweeps_folder_is_not_taken_by_a_command_of_other_settings(
    command: list[str], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in (1, 2):
        record(tmp_path / "sweep" / str(job), f"a={job}", "b=3")
    config = config_of(tmp_path / "sweep", *command)
    if message is None:
        sweeps.SweepFailures().on_multirun_start(config)
        return
    with pytest.raises(SystemExit) as stopped:
        sweeps.SweepFailures().on_multirun_start(config)
    assert stopped.value.code == 1
    assert f"error: the sweep in {tmp_path}/sweep {message}" in capsys.readouterr().err


def test_a_damaged_record_of_a_job_is_named_with_what_to_delete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "sweep" / "1", "a=1")
    (tmp_path / "sweep" / "1" / "job.json").write_text("")  # as after a power cut
    with pytest.raises(SystemExit, match="1"):
        sweeps.SweepFailures().on_multirun_start(config_of(tmp_path / "sweep", "a=1,2"))
    assert f"1/job.json is damaged; delete {tmp_path}/sweep/1," in capsys.readouterr().err


def test_a_folder_of_another_job_is_refused_and_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "row", "seed=1")
    (tmp_path / "row" / "student").mkdir()
    (tmp_path / "row" / "summary.json").write_text('{"after": {"val/nll": 2.5}}')
    hydra = OmegaConf.create({"overrides": {"task": ["seed=2"]}})
    monkeypatch.setattr(sweeps.HydraConfig, "get", lambda: hydra)
    with pytest.raises(UserError, match="row holds a job with seed=1, where this command has seed=2; choose another"):
        sweeps.take_up(tmp_path / "row")
    assert sweeps.take_up(tmp_path / "new") is None
    assert json.loads((tmp_path / "new" / "job.json").read_text("utf-8")) == ["seed=2"]
    hydra.overrides.task = ["seed='1'"]
    assert sweeps.take_up(tmp_path / "row") == 2.5
    (tmp_path / "row" / "summary.json").write_text('{"after": {}}')
    assert math.isnan(sweeps.take_up(tmp_path / "row") or 0)


def test_the_last_sweep_is_the_newest_of_the_same_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["a=1,2"], ["a=1,2"], ["a=1,3"]
    for index, overrides in enumerate(commands):
        folder = tmp_path / f"{9 - index}"
        folder.mkdir()
        OmegaConf.save({"hydra": {"overrides": {"task": overrides}}}, folder / "multirun.yaml")
        os.utime(folder / "multirun.yaml", (index, index))
    for choice in ("last", "auto"):
        config = config_of(tmp_path / "new", "a=1,2", f"ckpt_path={choice}")
        sweeps.SweepFailures().on_multirun_start(config)
        assert config.hydra.sweep.dir == f"{tmp_path}/8"
        assert config.hydra.overrides.hydra == [f"hydra.sweep.dir='{tmp_path}/8'"]
    config = config_of(tmp_path / "new", "a=7,8", "ckpt_path=auto")
    sweeps.SweepFailures().on_multirun_start(config)
    assert config.hydra.sweep.dir == f"{tmp_path}/new"
    with pytest.raises(SystemExit):
        sweeps.SweepFailures().on_multirun_start(config_of(tmp_path / "new", "a=7,8", "ckpt_path=last"))
    assert f"ckpt_path=last, but no sweep below {tmp_path} has the overrides of this command" in capsys.readouterr().err


# -------------------------------------------------------------------------------- a search

SEARCH = "sweep=optuna", "optuna.trials=4", "optuna.sampler._target_=optuna.samplers.BruteForceSampler"


def states(folder: Path) -> dict[float, str]:
    """Return how the newest trial of each temperature ended."""
    trials = search._open(str(folder / "optuna.journal")).get_trials()
    return {each.params["objective.temperature"]: each.state.name for each in trials}


def test_a_search_goes_on_where_it_was_stopped_and_trains_no_trial_twice(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    given = *SEARCH, 'optuna.space=["objective.temperature=2,0,4,8"]', "trainer.max_steps=4", KILL
    (tmp_path / "sweep" / "2").mkdir(parents=True)
    (tmp_path / "sweep" / "2" / "kill").touch()
    assert sweep(*given).code == 143
    done = sweep(*given)
    assert done.code == 1 and "1 failed:" in done.out, done.out + done.err
    assert "temperature=0" in done.out.rpartition("1 failed:\n")[2]
    assert states(tmp_path / "sweep") == {2: "COMPLETE", 0: "FAIL", 4: "COMPLETE", 8: "COMPLETE"}
    summaries = [json.loads(file.read_text("utf-8")) for file in (tmp_path / "sweep").glob("*/summary.json")]
    assert sorted(each["objective"]["temperature"] for each in summaries) == [2, 4, 8]
    assert {each["optimizer_steps"] for each in summaries} == {4}
    begun = [logged(tmp_path / "sweep" / job).count("student: ") for job in "0123"]
    assert sorted(begun) == [0, 1, 1, 2]  # the job that was stopped began twice
    best = json.loads((tmp_path / "sweep/best.json").read_text("utf-8"))
    assert best["val/nll"] == min(each["after"]["val/nll"] for each in summaries)
    assert "3 trials finished, 0 pruned" in done.out


def test_a_pruned_trial_is_no_failure_and_is_not_trained_again(sweep: Callable[..., Outcome], tmp_path: Path) -> None:
    pruner = "optuna.pruner._target_=optuna.pruners.ThresholdPruner", "+optuna.pruner.upper=0.0"
    given = *SEARCH, 'optuna.space=["objective.temperature=2,4"]', "optuna.trials=2", "trainer.max_steps=4", *pruner
    for _ in range(2):
        done = sweep(*given, "callbacks.validation.optimizer_steps=2")
        assert done.code == 0, (done.out + done.err)[-3000:]
        assert states(tmp_path / "sweep") == {2: "PRUNED", 4: "PRUNED"}
    assert [logged(tmp_path / "sweep" / job).count("student: ") for job in "01"] == [1, 1]
    assert "was pruned before, and is not trained again" in logged(tmp_path / "sweep/1")
    assert not list((tmp_path / "sweep").glob("*/student"))
    assert "pruned after step 2" in logged(tmp_path / "sweep/0")
    assert "0 trials finished, 2 pruned" in done.out


@pytest.fixture
def start(tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path]) -> Callable[..., Outcome]:
    """Train a sweep in a process of its own, whose launcher starts others."""

    def go(launcher: str, *overrides: str) -> Outcome:
        given = [
            "-m",
            "teacher=hf",
            f"teacher.name={save_teacher('bert')}",
            *SMALL,
            *QUIET,
            f"hydra/launcher={launcher}",
        ]
        given += [f"data.corpus.paths={text_file}", f"cache_dir={tmp_path}/cache", "hydra.sweep.dir=sweep"]
        given += ["trainer.max_steps=4", "validate_first=false", *overrides]
        environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
        return spawn("-m", "distilkit.train", *given, cwd=tmp_path, environment=environment)

    return go


def ended(folder: Path) -> dict[float, int]:
    """Return the optimizer steps of each temperature that has a student."""
    summaries = [json.loads(file.read_text("utf-8")) for file in folder.glob("*/summary.json")]
    return {each["objective"]["temperature"]: each["optimizer_steps"] for each in summaries}


@pytest.mark.slow
@pytest.mark.parametrize("search", [False, True])
def test_jobs_that_run_side_by_side_fail_alone_and_go_on(
    search: bool, start: Callable[..., Outcome], tmp_path: Path
) -> None:
    grid = "objective.temperature=2,0,4,8"
    given = "joblib", "hydra.launcher.n_jobs=2", KILL, *((*SEARCH, f'optuna.space=["{grid}"]') if search else (grid,))
    (tmp_path / "sweep" / "2").mkdir(parents=True)
    (tmp_path / "sweep" / "2" / "kill").touch()
    first = start(*given)
    assert first.code == 143, first.out + first.err
    assert f"hydra.sweep.dir={tmp_path}/sweep" in first.out  # how it goes on
    done = start(*given)
    assert done.code == 1, done.out + done.err
    (failure,) = done.out.rpartition("1 failed:\n")[2].splitlines()
    assert "objective.temperature=0.0, but it must be above 0" in failure
    assert ended(tmp_path / "sweep") == {2: 4, 4: 4, 8: 4}
    assert len(table_of(tmp_path / "sweep")) == 4
    assert json.loads((tmp_path / "sweep/comparison.json").read_text("utf-8"))["failed"] == [failure]
    before = {file: file.stat().st_mtime for file in (tmp_path / "sweep").glob("*/summary.json")}
    assert start(*given).code == 1
    assert {file: file.stat().st_mtime for file in (tmp_path / "sweep").glob("*/summary.json")} == before
    assert not list((tmp_path / "sweep").glob(".failures-*"))


@pytest.mark.slow
def test_jobs_of_submitit_fail_alone_and_go_on(start: Callable[..., Outcome], tmp_path: Path) -> None:
    done = start("submitit_local", "objective.temperature=2,0")
    assert done.code == 1, done.out + done.err
    assert done.out.rpartition("1 failed:\n")[2].startswith("job 1 (objective.temperature=0) failed: objective.temp")
    assert ended(tmp_path / "sweep") == {2: 4}
    written = (tmp_path / "sweep" / "0" / "summary.json").stat().st_mtime
    more = start("submitit_local", "objective.temperature=4,2")
    assert more.code == 0, more.out + more.err
    assert ended(tmp_path / "sweep") == {2: 4, 4: 4}
    assert (tmp_path / "sweep" / "0" / "summary.json").stat().st_mtime == written


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_of_a_launcher_start_ranks(launcher: str, start: Callable[..., Outcome], tmp_path: Path) -> None:
    ranks = "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"
    done = start(launcher, "objective.temperature=2,0,4", *ranks)
    assert done.code == 1, done.out + done.err
    assert "1 failed:" in done.out, done.out + done.err
    assert ended(tmp_path / "sweep") == {2: 4, 4: 4}
    assert set(table_of(tmp_path / "sweep")) == {"teacher", "objective.temperature=2", "objective.temperature=4"}


@pytest.mark.slow
def test_rows_that_read_each_other_keep_their_order_with_any_launcher(
    start: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = start("joblib", "hydra.launcher.n_jobs=2", "sweep=versus", "trainer.max_steps=12")
    assert done.code == 0, done.out + done.err
    assert table_of(tmp_path / "sweep") == ["teacher", *ROWS]


def test_overrides_are_the_same_however_their_numbers_are_written() -> None:
    written = ["optimizer.lr=1e-3", "optimizer.betas=[0.9,.98]", "seed=12345678", "data.corpus.paths=[a-1.txt,2024/b]"]
    recorded = [
        "optimizer.lr=0.001",
        "optimizer.betas=[0.90, 0.98]",
        "seed=12345678",
        "data.corpus.paths=[a-1.txt,2024/b]",
    ]
    assert sweeps.settings_of(written) == sweeps.settings_of(recorded)
    assert sweeps.settings_of(["seed=12345678"]) != sweeps.settings_of(["seed=12345679"])
    assert sweeps.settings_of(["name=v1.0"]) != sweeps.settings_of(["name=v1.00"])
