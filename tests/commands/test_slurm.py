"""SLURM: a job that is queued again goes on, and the scripts in docs/slurm start what they say."""

import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from safetensors.torch import load_file

import distilkit.train
from distilkit.errors import UserError
from distilkit.runs.interruption import StopOnSignal, folder_of_slurm_job, note_slurm_job, slurm_job
from jobs import QUIET, SMALL, call

SCRIPTS = sorted((Path(__file__).parents[2] / "docs" / "slurm").glob("*.sbatch"))
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "distil"}
ONE_TASK = {
    f"SLURM_{name}": value for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items()
}


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of a SLURM job of one task."""
    for name, value in {**JOB, **ONE_TASK}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a scontrol on the PATH, and return the file into which it writes what it was asked."""
    asked, program = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n', "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return asked


def test_a_job_that_is_queued_again_ends_with_the_weights_of_an_unbroken_run(
    in_job: None, scontrol: Path, tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path]
) -> None:
    given = "teacher=hf", f"teacher.name={save_teacher('bert')}", *SMALL, *QUIET, f"data.corpus.paths={text_file}"
    given = *given, f"cache_dir={tmp_path}/cache", "trainer.max_steps=4", "callbacks.validation.optimizer_steps=2"
    send = "+callbacks.send={_target_: jobs.Send, name: SIGUSR1, step: 2}"
    mine = *given, send, "name=mine", "ckpt_path=auto", "validate_first=false"
    stopped = call(distilkit.train.main, *mine, cwd=tmp_path)
    assert stopped.code == 128 + signal.SIGUSR1
    assert stopped.out.count("SLURM job 4711 is queued again") == 1
    assert scontrol.read_text("utf-8") == "requeue 4711\n"
    assert list(tmp_path.rglob("hpc_ckpt*")) == []
    (first,) = tmp_path.glob("outputs/mine/*")
    assert (first / "slurm_job").read_text("utf-8").splitlines()[0] == "4711"
    assert torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    on = call(distilkit.train.main, *mine, cwd=tmp_path)
    assert on.code == 0, on.err
    done = call(distilkit.train.main, *given, "hydra.run.dir=whole", "validate_first=false", cwd=tmp_path)
    assert done.code == 0, done.err
    (student,) = tmp_path.glob("outputs/mine/*/student/model.safetensors")
    one, two = load_file(student), load_file(tmp_path / "whole" / "student" / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_run_is_found_by_its_job_among_those_with_a_checkpoint(
    in_job: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder_of_slurm_job(tmp_path) is None
    for age, (name, job, saved) in enumerate(
        [("new", "4711", False), ("newer", "4711", True), ("old", "4711", True), ("other", "12", True)]
    ):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        note_slurm_job(tmp_path / name)
        os.utime(tmp_path / name / "slurm_job", (1000 - age, 1000 - age))
        if saved:
            (tmp_path / name / "checkpoints" / "last.ckpt").touch()
    assert folder_of_slurm_job(tmp_path) == tmp_path / "other"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert folder_of_slurm_job(tmp_path) == tmp_path / "newer"
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert folder_of_slurm_job(tmp_path) is None


def test_a_task_of_an_array_has_the_id_of_the_array(in_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_job() == "4711"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    assert slurm_job() == "4700_11"


def test_a_name_that_is_no_signal_is_refused() -> None:
    with pytest.raises(UserError, match="callbacks.signals.requeue=USR1 is no signal; give a name as SIGUSR1"):
        StopOnSignal(file="last.ckpt", requeue="USR1")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_for_slurm_starts_a_config_that_composes(script: Path) -> None:
    text = script.read_text("utf-8")
    options = dict(line.split()[1].partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH"))
    assert options.keys() >= {"--requeue", "--open-mode", "--ntasks-per-node", "--gpus-per-node"}
    assert options["--ntasks-per-node"] == options["--gpus-per-node"]
    command = text.rpartition("\nsrun ")[2].replace("\\\n", " ")
    command = command.replace("$SLURM_JOB_ID", "4711").replace("$SLURM_NNODES", options["--nodes"])
    start, python, dash, module, *overrides = shlex.split(command)
    assert (start, python, dash, module) == ("--kill-on-bad-exit=1", "python", "-m", "distilkit.train")
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    assert cfg.hydra.run.dir == "outputs/distilbert/4711"
    assert (cfg.ckpt_path, cfg.trainer.devices) == ("auto", -1)
    assert OmegaConf.select(cfg, "trainer.num_nodes", default=1) == int(options["--nodes"])
    assert options["--signal"].partition("@")[0] == cfg.callbacks.signals.requeue.removeprefix("SIG")


def test_the_scripts_are_there() -> None:
    assert {script.stem for script in SCRIPTS} == {"one_node", "several_nodes"}
