"""Trainings that broke off, and the command lines that go on with them."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distilkit.train
from distilkit.runs.checkpoints import checkpoints_of, read_checkpoint
from jobs import QUIET, SMALL, Outcome, call, only, spawn

Go = Callable[..., Outcome]
CRASH = "+callbacks.stop={_target_: jobs.StopAfter, step: 5}"
EVERY_STEP = "callbacks.checkpoint.every_n_train_steps=1"
TESTS = Path(__file__).parents[1]


@pytest.fixture
def given(text_file: Path, cache: Path, save_teacher: Callable[..., Path]) -> tuple[str, ...]:
    """Return the overrides of a run of eight steps, with dropout, that is validated at its end only."""
    teacher = "teacher=hf", f"teacher.name={save_teacher('bert')}", "trainer.max_steps=8", "validate_first=false"
    return *teacher, *SMALL, *QUIET, f"data.corpus.paths={text_file}", f"cache_dir={cache}"


@pytest.fixture
def go(given: tuple[str, ...], tmp_path: Path) -> Go:
    return lambda *more: call(distilkit.train.main, *given, *more, cwd=tmp_path)


def assert_same_student(one: Path, two: Path) -> None:
    first, second = (load_file(run / "student" / "model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def step_of(file: Path) -> int:
    return int(read_checkpoint(file)["global_step"])


def test_a_run_goes_on_in_its_own_folder_from_the_checkpoint_before_a_damaged_one(go: Go, tmp_path: Path) -> None:
    assert go("hydra.run.dir=whole").code == 0
    assert "the power went out" in go("hydra.run.dir=run", EVERY_STEP, CRASH).err
    run = tmp_path / "run"
    last = run / "checkpoints" / "last.ckpt"
    assert [step_of(file) for file in checkpoints_of(run)] == [5, 4]
    content = bytearray(last.read_bytes())
    content[len(content) // 3] ^= 4
    last.write_bytes(content)
    (last.parent / ".last.ckpt.host-1.tmp").write_bytes(b"half")
    (run / "student").mkdir()  # as if it had been killed before its summary
    for refused in (go("hydra.run.dir=run"), go("hydra.run.dir=run", "ckpt_path=last")):
        assert (refused.code, "Traceback" in refused.err) == (1, False)
    (run / "student").rmdir()
    refused = go("hydra.run.dir=run")
    assert (refused.code, f"{run} holds a run that broke off" in refused.err) == (1, True), refused.err
    (run / "student").mkdir()
    on = go("hydra.run.dir=run", "ckpt_path=auto")
    assert on.code == 0, on.err
    assert f"{last} is damaged: the checksum of its part archive/data" in on.out
    assert f"going back to step 4 of {run}/checkpoints/last-1.ckpt" in on.out
    assert f"ckpt_path=auto goes on from step 4 of {run}/checkpoints/last-1.ckpt" in on.out
    assert_same_student(run, tmp_path / "whole")
    assert {file.name for file in last.parent.iterdir()} == {"last.ckpt", "last-1.ckpt", "best.ckpt"}
    again = go("hydra.run.dir=run", "ckpt_path=auto")
    assert (again.code, f"{run} holds a finished run" in again.err) == (1, True)


def test_auto_starts_and_goes_on_with_the_newest_run_of_its_settings(go: Go, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "distil"
    assert "the power went out" in go("ckpt_path=auto", EVERY_STEP, CRASH).err
    broken = only(folder, "*")
    assert "the power went out" in go("ckpt_path=auto", EVERY_STEP, CRASH, "seed=7").err  # other settings: it starts
    assert len(list(folder.iterdir())) == 2
    on = go("ckpt_path=auto")
    assert on.code == 0, on.err
    assert f"ckpt_path=auto goes on from step 5 of {broken}/checkpoints/last.ckpt" in on.out
    (finished,) = (each for each in folder.iterdir() if (each / "summary.json").is_file())
    whole = go("ckpt_path=auto", "hydra.run.dir=outputs/distil/whole")
    assert f"ckpt_path=auto starts: the newest run of these settings, {finished}, is finished" in whole.out
    assert_same_student(finished, folder / "whole")
    last = go("ckpt_path=last", "hydra.run.dir=outputs/distil/again")
    assert last.code == 1
    assert f"{folder}/whole has finished this training, with {folder}/whole/student; set trainer.max_steps" in last.err
    assert not (folder / "again" / "student").exists()


@pytest.mark.parametrize("form", ["a dict", "keys"])
def test_a_checkpoint_callback_of_lightning_saves_by_the_clock_from_the_command_line(
    form: str, go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "+callbacks.mine={_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: mine, save_top_k: -1"
    interval = {
        "a dict": (f"{own}, train_time_interval: {{_target_: datetime.timedelta, microseconds: 1}}}}",),
        "keys": (
            f"{own}}}",
            "+callbacks.mine.train_time_interval._target_=datetime.timedelta",
            "+callbacks.mine.train_time_interval.microseconds=1",
        ),
    }
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))  # where Lightning writes first
    done = go("hydra.run.dir=run", *interval[form], "trainer.max_steps=2", "+trainer.max_time={minutes: 10}")
    assert done.code == 0, done.err
    files = sorted((tmp_path / "mine").iterdir())
    assert [step_of(file) for file in files] == [1, 2]
    within = next(file for file in files if step_of(file) == 1)
    on = go("hydra.run.dir=on", f"ckpt_path='{within}'", "trainer.max_steps=2")
    assert on.code == 0, on.err
    assert_same_student(tmp_path / "run", tmp_path / "on")


def test_a_full_disk_ends_a_run_with_one_message_and_leaves_the_good_checkpoint(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, whole = iter(range(4)), os.fsync

    def fsync(number: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(number)

    monkeypatch.setattr(os, "fsync", fsync)  # two for each save: the file, and its folder
    done = go("hydra.run.dir=run", EVERY_STEP)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (done.code, "Traceback" in done.err) == (1, False), done.err
    assert f"error: {last} cannot be written: No space left on device. It takes" in done.err
    monkeypatch.undo()
    assert {file.name: step_of(file) for file in last.parent.iterdir()} == {"last.ckpt": 2, "last-1.ckpt": 1}
    assert go("hydra.run.dir=run", "ckpt_path=auto").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "{_target_: distilkit.sharding.FullyShardedStrategy}"])
def test_two_ranks_save_by_the_clock_and_go_on_together(strategy: str, given: tuple[str, ...], tmp_path: Path) -> None:
    two = "trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}"
    clock = "callbacks.checkpoint.train_time_interval=0.001", "callbacks.checkpoint.keep=3"
    environment: dict[str, Any] = {"PYTHONPATH": str(TESTS)}
    run, more = ("-m", "distilkit.train", *given, *two), {"cwd": tmp_path, "environment": environment}
    broken = spawn(*run, *clock, CRASH, "hydra.run.dir=run", **more)
    assert "the power went out" in broken.err
    assert [step_of(file) for file in checkpoints_of(tmp_path / "run")] == [5, 4, 3]
    for folder, again in (("run", ["ckpt_path=auto"]), ("whole", [])):
        done = spawn(*run, *again, f"hydra.run.dir={folder}", **more)
        assert done.code == 0, done.err
    assert "goes on from step 5" in (tmp_path / "run" / "train.log").read_text("utf-8")
    assert_same_student(tmp_path / "run", tmp_path / "whole")
