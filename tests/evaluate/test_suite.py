"""A sweep of evaluations as a whole: data are read before its first job, and its best setting is trained once more."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distilkit.evaluate.__main__
from distilkit.evaluate.finetune import FinetuningModule
from distilkit.records import Result, read_results
from distilkit.report.frame import gather
from jobs import Outcome, call, write_rows

FAST = ("trainer=cpu", "trainer.enable_progress_bar=false", "finetune.epochs=1", "finetune.batch_size=16")


@pytest.fixture
def sweep(tmp_path: Path, save_teacher: Callable[..., Path]) -> Callable[..., Outcome]:
    """Evaluate a tiny model in a sweep, on rows like those of SST-2."""
    write_rows(tmp_path / "glue" / "SST-2")

    def go(*overrides: str) -> Outcome:
        model = save_teacher("distilbert", num_layers=1)
        given = ["-m", f"model={model}", "name=mine", "task.data_dir=glue", "task.max_length=60", *FAST, *overrides]
        return call(distilkit.evaluate.__main__.main, *given, cwd=tmp_path)

    return go


def test_data_that_cannot_be_read_are_told_before_the_first_job_and_the_other_tasks_run(
    sweep: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    step = FinetuningModule.training_step

    def spy(self: FinetuningModule, *args: Any) -> Any:
        told.append([f"error: task {name} will fail" in sys.stderr.getvalue() for name in ("rte", "wnli", "sst2")])  # type: ignore[attr-defined]
        return step(self, *args)

    monkeypatch.setattr(FinetuningModule, "training_step", spy)
    done = sweep("task=sst2,rte,wnli", "seed=1")
    assert done.code == 1
    assert told[0] == told[-1] == [True, True, False]
    assert [each.task for each in read_results([tmp_path])] == ["sst2"]
    assert "2 failed:" in done.out


def test_where_no_task_has_data_nothing_runs_and_each_reason_is_said_once(sweep: Callable[..., Outcome]) -> None:
    done = sweep("task=rte,wnli", "seed=1,2")
    assert (done.code, "Launching" in done.out, done.err.count("error: ")) == (1, False, 1)


GRID = ("finetune.lr=2e-3,1e-9", "finetune.held_out=0.25", "seed=1,2")


def by_kind(tmp_path: Path) -> tuple[list[Result], list[Result]]:
    """Return the results of a grid, and those of its refit."""
    found = read_results([tmp_path])
    return [each for each in found if not each.settings.get("refit")], [
        each for each in found if "refit" in each.settings
    ]


def test_the_best_setting_by_held_out_rows_is_trained_on_all_rows_and_counts(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = sweep(*GRID, "refit=true")
    assert done.code == 0, done.err
    assert done.out.rindex("Quality") > done.out.rindex("results: ")  # the table has the refits
    grid, refits = by_kind(tmp_path)
    assert (len(grid), [each.seed for each in refits]) == (4, [1, 2])
    chosen = [each for each in grid if each.settings["lr"] == 2e-3]
    for each in refits:
        expected = {"lr": 2e-3, "held_out": 0.0, "train_rows": 160, "refit": True, "settings_tried": 2}
        assert expected.items() <= each.settings.items()
        assert each.held_out == statistics.median(own.held_out for own in chosen if own.held_out is not None)
        assert each.cost["tokens"] > chosen[0].cost["tokens"]
    (counts,) = [line for line in gather([*grid, *refits]).frame.itertuples() if line.metric == ""]
    assert (counts.row, counts.settings.get("refit"), counts.seeds) == ("mine", True, 2)
    before = {str(file): file.stat().st_mtime_ns for file in tmp_path.glob("outputs/**/results.json")}
    assert sweep(*GRID, "refit=true").code == 0
    assert {str(file): file.stat().st_mtime_ns for file in tmp_path.glob("outputs/**/results.json")} == before


def test_a_refit_takes_seeds_of_its_own_and_leaves_failed_jobs_out(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = sweep("finetune.lr=2e-3,0,1e-9", "finetune.held_out=0.25", "seed=1", "refit=[5,6]")
    assert (done.code, "1 failed:" in done.out) == (1, True)
    _, refits = by_kind(tmp_path)
    assert [(each.seed, each.settings["lr"], each.settings["settings_tried"]) for each in refits] == [
        (5, 2e-3, 2),
        (6, 2e-3, 2),
    ]


def test_each_task_of_a_sweep_has_its_own_best_setting(sweep: Callable[..., Outcome], tmp_path: Path) -> None:
    write_rows(tmp_path / "glue" / "other")
    (tmp_path / "glue" / "CoLA").mkdir()
    for name in ("train", "dev"):
        lines = (tmp_path / "glue" / "other" / f"{name}.tsv").read_text("utf-8").splitlines()[1:]
        rows = [f"x\t{line[-1]}\t\t{line[:-2]}" for line in lines]
        (tmp_path / "glue" / "CoLA" / f"{name}.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    assert sweep("task=sst2,cola", "finetune.lr=2e-3,1e-9", "finetune.held_out=0.25", "refit=true").code == 0
    _, refits = by_kind(tmp_path)
    assert sorted((each.task, each.settings["settings_tried"]) for each in refits) == [("cola", 2), ("sst2", 2)]


def test_the_tasks_of_a_sweep_may_be_a_pattern_and_a_task_that_trains_nothing_is_not_refitted(
    sweep: Callable[..., Outcome], save_teacher: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    done = sweep("task=glob(sst*)", "finetune.held_out=0.25", "refit=true", "seed=1")
    assert done.code == 0, done.out + done.err
    assert len(by_kind(tmp_path)[1]) == 1
    given = ["task=lm", f"task.paths={text_file}", "task.max_tokens=50", "finetune.held_out=0.25", "refit=true"]
    model = f"model={save_teacher('bert', num_layers=1)}"
    done = call(distilkit.evaluate.__main__.main, "-m", model, *given, "trainer=cpu", cwd=tmp_path)
    assert done.code == 0, done.out + done.err
    assert len(read_results([tmp_path])) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["refit=true"], "refit=True takes the best setting of a sweep by held-out rows"),
        (["refit=true", "finetune.held_out=0.1", "finetune.patience=2"], "and finetune.patience=null"),
        (["refit=5", "finetune.held_out=0.1"], "refit=5, but it takes true, false or a list of seeds"),
        (["refit=[]", "finetune.held_out=0.1"], "but it takes true, false or a list of seeds"),
    ],
)
def test_a_refit_that_cannot_be_ends_before_the_first_job(
    overrides: list[str], message: str, sweep: Callable[..., Outcome]
) -> None:
    done = sweep(*overrides)
    assert done.code == 1
    assert message in done.err
    assert "Launching" not in done.out


def test_a_single_job_has_nothing_to_refit(tmp_path: Path, save_teacher: Callable[..., Path]) -> None:
    given = [f"model={save_teacher('distilbert', num_layers=1)}", *FAST, "refit=true", "finetune.held_out=0.1"]
    done = call(distilkit.evaluate.__main__.main, *given, cwd=tmp_path)
    assert (done.code, "refit=True follows a sweep of settings; add grid=bert" in done.err) == (1, True)
