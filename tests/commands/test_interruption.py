"""Signals to a command: what it saves, how it ends, and that it goes on as if nothing had happened."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distilkit.data.cache
import distilkit.evaluate.__main__
import distilkit.prepare
import distilkit.train
from distilkit.records import read_metrics
from jobs import QUIET, SMALL, call

UNSEEN = "callbacks.progress=null", "+trainer.enable_progress_bar=false"


@pytest.fixture(scope="module")
def given(text_file: Path, cache: Path, save_teacher: Callable[..., Path]) -> tuple[str, ...]:
    """Overrides of a run of 4 steps that is scored after 2 and 4, and whose teacher has dropout."""
    paths = f"data.corpus.paths={text_file}", f"cache_dir={cache}"
    steps = "trainer.max_steps=4", "callbacks.validation.optimizer_steps=2", "validate_first=false"
    return ("teacher=hf", f"teacher.name={save_teacher('bert')}", *SMALL, *paths, *steps)


def send(name: str, **fields: Any) -> str:
    values = ", ".join(f"{key}: {value}" for key, value in {"name": name, **fields}.items())
    return f"+callbacks.send={{_target_: jobs.Send, {values}}}"


@pytest.fixture(scope="module")
def whole(given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    done = call(distilkit.train.main, *given, *UNSEEN, "hydra.run.dir=run", cwd=folder)
    assert done.code == 0, done.err
    return folder / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def assert_equal(one: Path, two: Path) -> None:
    """Check that two runs have the same students and the same scores of the end."""
    first, second = weights(one), weights(two)
    assert all(torch.equal(first[name], second[name]) for name in second)
    after = [json.loads((run / "summary.json").read_text("utf-8"))["after"] for run in (one, two)]
    assert after[0] == after[1]


@pytest.mark.parametrize(
    ("name", "status", "at", "step", "saved"),
    [
        ("SIGTERM", 143, "step", 2, 3),
        ("SIGINT", 130, "step", 0, 1),
        ("SIGHUP", 129, "step", 1, 2),
        ("SIGUSR1", 138, "step", 3, 4),
        ("SIGTERM", 143, "validation", 2, 2),
        ("SIGINT", 130, "validation", 4, 4),
        ("SIGTERM", 143, "save", 2, 3),
    ],
)
def test_a_run_that_a_signal_ended_goes_on_to_the_weights_of_an_unbroken_one(
    name: str, status: int, at: str, step: int, saved: int, given: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    given = *given, *UNSEEN
    stopped = call(distilkit.train.main, *given, send(name, at=at, step=step), "hydra.run.dir=stopped", cwd=tmp_path)
    assert stopped.code == status
    file = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    (line,) = [each for each in stopped.out.splitlines() if "stopped after" in each]
    said, _, command = line.partition("; go on with: ")
    assert said.endswith(f"{name}: stopped after step {saved}, saved as {file}")
    assert torch.load(file, weights_only=True)["global_step"] == saved
    assert "Traceback" not in stopped.out + stopped.err
    assert not (tmp_path / "stopped" / "student").exists()
    python, dash, module, *arguments = shlex.split(command)
    assert (python, dash, module) == ("python", "-m", "distilkit.train")
    arguments = [each for each in arguments if "jobs.Send" not in each]
    assert arguments == [*given, "hydra.run.dir=stopped", f"ckpt_path={file}"]
    done = call(distilkit.train.main, *arguments, "hydra.run.dir=on", cwd=tmp_path)
    assert done.code == 0, done.err
    assert_equal(tmp_path / "on", whole)
    scored = [read_metrics(run / "metrics.csv")["val/nll"] for run in (tmp_path / "on", whole)]
    assert scored[0] == scored[1]  # also that of a validation which was due, or which the signal ended


@pytest.mark.parametrize("at", ["step", "validation"])
def test_a_run_that_a_signal_ended_at_the_end_of_an_epoch_goes_on_as_an_unbroken_one(
    at: str, given: tuple[str, ...], tmp_path: Path
) -> None:
    epochs = *given, *UNSEEN, "+trainer.limit_train_batches=4"  # of two steps each
    send_at = send("SIGTERM", at=at, step=1 if at == "step" else 2)
    stopped = call(distilkit.train.main, *epochs, send_at, "hydra.run.dir=on", cwd=tmp_path)
    assert (stopped.code, "stopped after step 2" in stopped.out) == (143, True)
    for run, more in (("on", ["ckpt_path=auto"]), ("whole", [])):
        done = call(distilkit.train.main, *epochs, *more, f"hydra.run.dir={run}", cwd=tmp_path)
        assert done.code == 0, done.err
    assert_equal(tmp_path / "on", tmp_path / "whole")
    scored = [read_metrics(tmp_path / run / "metrics.csv")["val/nll"] for run in ("on", "whole")]
    assert scored[0] == scored[1]


def test_a_signal_before_the_first_step_ends_a_run_at_once(given: tuple[str, ...], tmp_path: Path) -> None:
    stopped = call(distilkit.train.main, *given, *QUIET, send("SIGTERM", at="setup"), "name=x y", cwd=tmp_path)
    assert stopped.code == 143
    assert "SIGTERM ended the command, which starts again with: python -m distilkit.train teacher=hf" in stopped.out
    assert stopped.out.strip().endswith("'name=x y'")
    assert "Traceback" not in stopped.out + stopped.err
    assert list(tmp_path.glob("outputs/**/*.ckpt")) == []


def test_a_signal_after_the_last_step_lets_the_run_be_finished(given: tuple[str, ...], tmp_path: Path) -> None:
    stopped = call(
        distilkit.train.main, *given, *QUIET, send("SIGINT", at="end", step=4), "hydra.run.dir=run", cwd=tmp_path
    )
    assert stopped.code == 130
    assert "SIGINT: the run is finished" in stopped.out
    assert {"student", "summary.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_signal_ends_a_sweep_with_its_job(given: tuple[str, ...], tmp_path: Path) -> None:
    in_job = "+callbacks.send={_target_: jobs.Send, name: SIGTERM, step: 2, job: '${hydra:job.num}'}"
    swept = "-m", *given, *QUIET, in_job, "objective.temperature=2,3,4", "hydra.sweep.dir=a sweep"
    stopped = call(distilkit.train.main, *swept, cwd=tmp_path)
    assert stopped.code == 143
    folder = tmp_path / "a sweep"
    again = [*(each for each in swept if "sweep.dir" not in each), f"hydra.sweep.dir='{folder}'"]
    assert f"go on with: {shlex.join(['python', '-m', 'distilkit.train', *again])}" in stopped.out
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"0", "1"}
    assert (folder / "0" / "summary.json").is_file()
    assert torch.load(folder / "1" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_preparation_of_a_cache_without_half_a_cache(
    name: str, status: int, given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.Signals[name])
        raise AssertionError("the signal did not end it")

    monkeypatch.setattr(distilkit.data.cache, "split_of", interrupted)
    stopped = call(distilkit.prepare.main, *given, f"cache_dir={tmp_path}/new", cwd=tmp_path)
    assert stopped.code == status
    assert f"{name} ended the command, which starts again with: python -m distilkit.prepare teacher=hf" in stopped.out
    assert "Traceback" not in stopped.out + stopped.err
    assert [path.name for path in (tmp_path / "new").iterdir() if not path.name.endswith(".lock")] == []


def test_a_signal_ends_an_evaluation_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilkit.evaluate.__main__, "evaluate", lambda cfg: os.kill(os.getpid(), signal.SIGTERM))
    stopped = call(distilkit.evaluate.__main__.main, "model=m", "task=sst2", cwd=tmp_path)
    assert (stopped.code, "Traceback" in stopped.out + stopped.err) == (143, False)
    assert "starts again with: python -m distilkit.evaluate model=m task=sst2" in stopped.out
