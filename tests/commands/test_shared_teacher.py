"""A sweep whose jobs take turns in one process: each ends as if it had run alone, and the teacher runs once for all."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import distilkit.train
from distilkit import objective
from jobs import QUIET, SMALL, Outcome, call, only, spawn

STEPS = "trainer.max_steps=4", "callbacks.validation.optimizer_steps=2"
SHARED = "sweep.share_teacher=true"
HINT = "jobs read one teacher: sweep.share_teacher=true runs it once for all of them"


@pytest.fixture(scope="module")
def given(text_file: Path, cache: Path, save_teacher: Callable[..., Path]) -> list[str]:
    """Return the overrides of all sweeps here."""
    teacher = [f"teacher.name={save_teacher('bert')}", *SMALL, *STEPS]
    return ["-m", "teacher=hf", *teacher, f"data.corpus.paths={text_file}", f"cache_dir={cache}"]


@pytest.fixture
def sweep(given: list[str], tmp_path: Path) -> Callable[..., Outcome]:
    """Train a sweep into a folder of ``tmp_path``."""

    def go(folder: str, *overrides: str) -> Outcome:
        return call(distilkit.train.main, *given, f"hydra.sweep.dir={folder}", *overrides, cwd=tmp_path)

    return go


def last(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint of a run."""
    found: dict[str, Any] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return found


def logged(folder: Path) -> list[dict[str, str]]:
    """Read what a run has logged, without what its clock, its memory and the name of its folder say."""
    with only(folder, "**/metrics.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [
        {name: text for name, text in row.items() if not name.startswith(("throughput/", "memory/", "progress/hours"))}
        for row in rows
    ]


def assert_same(one: Path, other: Path) -> None:
    """Compare weights, moments, schedules and logged numbers of two runs, bit for bit."""
    mine, theirs = last(one), last(other)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=0)
    assert mine["loops"] == theirs["loops"]
    assert logged(one) == logged(other)
    names = "before", "after", "tokens_seen", "optimizer_steps"
    mine, theirs = (json.loads((folder / "summary.json").read_text("utf-8")) for folder in (one, other))
    assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the passes of a teacher that training and validation take."""
    found, plain = [0], objective._read

    def read(model: Any, batch: Any, **kwargs: Any) -> Any:
        found[0] += not any(parameter.requires_grad for parameter in model.parameters())
        return plain(model, batch, **kwargs)

    monkeypatch.setattr(objective, "_read", read)
    return found


@pytest.mark.parametrize(
    ("jobs", "overrides"),
    [
        (3, ("objective.temperature=1,2,8",)),
        (3, ("objective.alpha_cos=0,1,2", "data.packing=documents", "trainer.precision=bf16-mixed")),
        (2, ("objective=minilm", "student=half_depth,third_depth", "+objective.relation_heads=2")),
        (2, ("optimizer.lr=1e-4,1e-3", "trainer.gradient_clip_val=0.1", "validate_first=false")),
    ],
    ids=["temperature", "documents-bf16", "students-relations", "learning-rate"],
)
def test_each_job_ends_as_if_it_had_run_alone_and_the_teacher_runs_once_for_all(
    jobs: int, overrides: tuple[str, ...], sweep: Callable[..., Outcome], tmp_path: Path, passes: list[int]
) -> None:
    alone = sweep("alone", *overrides)
    assert alone.code == 0, alone.err
    assert f"all {jobs} {HINT}" in alone.out
    one_by_one, passes[0] = passes[0], 0
    done = sweep("shared", *overrides, SHARED)
    assert done.code == 0, done.err
    assert HINT not in done.out
    for job in range(jobs):
        assert_same(tmp_path / "alone" / str(job), tmp_path / "shared" / str(job))
    assert passes[0] * jobs == one_by_one > 0


@pytest.mark.parametrize(
    "overrides",
    [
        ("+trainer.limit_train_batches=4,8", "trainer.max_steps=6"),
        ("data.masking.mlm_probability=[[0,0.9],[1,0.1]]", "trainer.max_steps=2,3"),
        ("objective=distilbert,mlm", "callbacks.validation.optimizer_steps=1,3"),
    ],
    ids=["epochs", "masks", "validations"],
)
def test_jobs_that_read_other_batches_end_as_if_each_had_run_alone(
    overrides: tuple[str, ...], sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    for folder, more in (("alone", ()), ("shared", (SHARED,))):
        done = sweep(folder, *overrides, "validate_first=false", *more)
        assert done.code == 0, done.err
    folders = sorted(folder.name for folder in (tmp_path / "alone").glob("[0-9]"))
    assert len(folders) in (2, 4)
    for job in folders:
        assert_same(tmp_path / "alone" / job, tmp_path / "shared" / job)


def test_a_signal_ends_all_jobs_where_they_can_be_resumed_and_the_sweep_goes_on(
    sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    rates = "optimizer.lr=1e-4,2e-4,3e-4"
    whole = sweep("whole", rates, *QUIET)
    assert whole.code == 0, whole.err
    (tmp_path / "send").touch()
    send = f"+callbacks.send={{_target_: jobs.SendOnce, name: SIGINT, step: 2, file: {tmp_path}/send}}"
    stopped = sweep("stopped", rates, *QUIET, SHARED, send)
    assert stopped.code == 130
    assert "Traceback" not in stopped.out + stopped.err
    steps = [last(tmp_path / "stopped" / str(job))["global_step"] for job in range(3)]
    assert set(steps) == {3}  # all have begun the step
    assert stopped.out.count("SIGINT: stopped after step 3, saved as ") == 3
    assert stopped.out.count("go on with: python -m distilkit.train") == 1
    done = sweep("stopped", rates, *QUIET, send)  # in the other way
    assert done.code == 0, done.err
    for job in "012":
        mine, theirs = last(tmp_path / "whole" / job), last(tmp_path / "stopped" / job)
        torch.testing.assert_close(mine["state_dict"], theirs["state_dict"], rtol=0, atol=0)


def test_a_signal_before_the_first_step_ends_the_command_at_once(given: list[str], tmp_path: Path) -> None:
    send = "+callbacks.send={_target_: jobs.Send, name: SIGTERM, at: setup}"
    more = "optimizer.lr=1e-4,2e-4", *QUIET, SHARED, send, f"hydra.sweep.dir={tmp_path}/sweep"
    tests = str(Path(__file__).parents[1])
    stopped = spawn("-m", "distilkit.train", *given, *more, cwd=tmp_path, environment={"PYTHONPATH": tests})
    assert stopped.code == 143
    assert "SIGTERM ended the command, which starts again with: python -m distilkit.train -m" in stopped.out
    assert "Traceback" not in stopped.out + stopped.err
    assert list(tmp_path.glob("sweep/**/*.ckpt")) == []


def test_jobs_that_are_there_twice_are_trained_once(sweep: Callable[..., Outcome], tmp_path: Path) -> None:
    done = sweep("sweep", "objective.temperature=2,2.0", *QUIET, SHARED)
    assert done.code == 0, done.out
    assert [folder.name for folder in (tmp_path / "sweep").glob("*/")] == ["0"]
    assert "has finished before, and is not trained again" in done.out


def test_a_job_that_fails_leaves_the_others(sweep: Callable[..., Outcome], tmp_path: Path) -> None:
    stop = "+callbacks.stop={_target_: jobs.StopAfter, step: 2}"
    done = sweep("sweep", "objective.temperature=0,2,4", *QUIET, SHARED)
    assert done.code == 1
    failures = done.out.rpartition("1 failed:\n")[2].splitlines()
    assert failures == [
        "job 0 (objective.temperature=0) failed: objective.temperature=0.0, but it must be above 0; the paper uses 2"
    ]
    for job in "12":
        assert json.loads((tmp_path / "sweep" / job / "summary.json").read_text("utf-8"))["optimizer_steps"] == 4
    table = (tmp_path / "sweep/comparison.md").read_text("utf-8").splitlines()
    names = [row.split("|")[1].strip() for row in table[2:5]]
    assert names == ["teacher", "objective.temperature=2", "objective.temperature=4"]
    broken = sweep("broken", "optimizer.lr=1e-4,2e-4", *QUIET, SHARED, stop)
    assert broken.code == 1
    assert "2 failed:" in broken.out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("seed=1,2",),
            "sweep.share_teacher=true, but the jobs differ in data.seed, seed, which the teacher reads; sweep over objective, "
            "student, optimizer or scheduler, or leave sweep.share_teacher=true out",
        ),
        (("data.block_size=16,32", "data.masking.mlm_probability=0.1,0.2"), "differ in data.block_size, data.masking."),
        (("row={seed: 1}", "optimizer.lr=1,2"), "but row={'seed': 1} changes a job after this check; leave"),
        (("baseline=sweep/0", "optimizer.lr=1,2"), "but baseline=sweep/0 is a job of the same sweep; leave"),
        (("hydra.job.chdir=true", "seed=1"), "hydra.job.chdir=True is of a whole process, which all jobs share; leave"),
        (("trainer.devices=2", "seed=1"), "trains on one device, but trainer.devices=2 and trainer.num_nodes=1; set"),
        (("budget=40m,50m",), "sweep.share_teacher=true trains by steps, but budget=40m; set trainer.max_steps"),
        (("budget=40m", "seed=1"), "sweep.share_teacher=true trains by steps, but budget=40m; set trainer.max_steps"),
        (
            ("teacher_cache.epochs=2", "seed=1"),
            "teacher_cache.epochs=2 and sweep.share_teacher=true both save the teacher's passes; choose one of them",
        ),
        (
            ("teacher=none", "teacher.name=null", "optimizer.lr=1,2"),
            "sweep.share_teacher=true, but teacher=none; leave",
        ),
        (("sweep=versus",), "sweep.share_teacher=true, but the jobs of this sweep read those before them; leave"),
        (
            ("hydra/launcher=joblib", "optimizer.lr=1,2"),
            "sweep.share_teacher=true trains in one process, but hydra/launcher starts others; leave",
        ),
    ],
)
def test_a_sweep_that_cannot_share_its_teacher_is_refused_before_it_begins(
    overrides: tuple[str, ...], message: str, sweep: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = sweep("sweep", *overrides, SHARED)
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.out + done.err
    assert list(tmp_path.glob("sweep/*/")) == []


def test_students_that_do_not_fit_into_memory_together_are_refused(
    sweep: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilkit.train, "free_bytes", lambda device: 2**20)
    done = sweep("sweep", "optimizer.lr=1e-4,2e-4,3e-4", *QUIET, SHARED)
    assert done.code == 1
    needs = "sweep.share_teacher=true needs 1.13 MB for gradients and optimizers of all students, but 1 MB are free; "
    assert done.out.count(needs + "leave it out, and read the teacher from the cache: teacher_cache.epochs") >= 3


def test_each_job_has_a_run_of_its_own_in_wandb_and_its_name_in_the_log(given: list[str], tmp_path: Path) -> None:
    more = "logger=wandb", "objective.temperature=1,2", SHARED, f"hydra.sweep.dir={tmp_path}/sweep"
    done = spawn("-m", "distilkit.train", *given, *more, cwd=tmp_path, environment={"WANDB_MODE": "offline"})
    assert done.code == 0, done.err
    for job, temperature in (("0", 1), ("1", 2)):
        assert len(list((tmp_path / "sweep" / job / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
        text = only(tmp_path / "sweep" / job, "*.log").read_text("utf-8")
        assert f"objective.temperature={temperature}: trained 4 steps" in text
        assert f"objective.temperature={3 - temperature}: " not in text
