"""Checkpoints under kills at exact moments, full disks and umasks, and when they are saved."""

import errno
import functools
import itertools
import multiprocessing
import os
import random
import resource
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from distilkit.callbacks import ValidateEvery
from distilkit.errors import UserError
from distilkit.runs import saving
from distilkit.runs.checkpoints import checkpoints_of, find_checkpoint, read_checkpoint
from distilkit.runs.saving import Checkpoints, WholeFiles
from test_module import Steps, build_module, uneven_step


def content(step: int, *, size: int = 30_000) -> dict[str, Any]:
    weights = {"a": torch.arange(float(size)) + step}
    saved = {"state_dict": weights, "optimizer_states": [], "global_step": step}
    return {**saved, "distilkit": {"record": {"config": {}}}}


def steps(folder: Path) -> dict[str, int]:
    """Return the step of each checkpoint in a folder, all of which must be sound."""
    found = {}
    for file in checkpoints_of(folder):
        saved = read_checkpoint(file)
        assert torch.equal(saved["state_dict"]["a"], content(saved["global_step"])["state_dict"]["a"])
        found[file.name] = saved["global_step"]
    return found


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# -------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("keep", [1, 2, 4])
@pytest.mark.parametrize("links", [True, False])
def test_the_newest_are_kept_under_their_numbers(
    keep: int, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    files, folder = WholeFiles(keep=keep), tmp_path / "run" / "checkpoints"
    for step in range(1, 7):
        files.save_checkpoint(content(step), folder / "last.ckpt")
        expected = {f"last-{index}.ckpt" if index else "last.ckpt": step - index for index in range(min(keep, step))}
        assert steps(folder) == expected
        assert {file.name for file in folder.iterdir()} == set(expected)


def test_other_files_are_replaced_and_not_numbered(tmp_path: Path) -> None:
    files = WholeFiles(keep=3)
    for step, name in itertools.product((1, 2), ("best", "step=4")):
        files.save_checkpoint(content(step), str(tmp_path / f"{name}.ckpt"))
    assert {file.name for file in tmp_path.iterdir()} == {"best.ckpt", "step=4.ckpt"}
    assert steps(tmp_path) == {"best.ckpt": 2}


def test_no_file_or_less_is_refused() -> None:
    with pytest.raises(UserError, match="callbacks.checkpoint.keep=0, but it must be at least 1"):
        WholeFiles(keep=0)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_mode_follows_the_umask(mask: int, mode: int, tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(mask)
    WholeFiles().save_checkpoint(content(1), tmp_path / "new" / "last.ckpt")
    assert (tmp_path / "new" / "last.ckpt").stat().st_mode & 0o777 == mode


def test_nothing_is_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir(0o500)
    opened: list[str] = []
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "mkstemp", lambda *_, **__: opened.append("a temporary file"))
    WholeFiles().save_checkpoint(content(1), tmp_path / "run" / "last.ckpt")
    assert (opened, list(elsewhere.iterdir())) == ([], [])


def test_what_is_loaded_was_checked(tmp_path: Path) -> None:
    files, file = WholeFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint(content(1), file)
    assert files.load_checkpoint(file)["global_step"] == 1
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert TorchCheckpointIO().load_checkpoint(file)["global_step"] == 1  # Lightning's own loads it
    with pytest.raises(UserError, match="last.ckpt is damaged: the checksum of its part .*data/0 differs"):
        files.load_checkpoint(file)


# ------------------------------------------------------------------------------------- kills


class _Killer:
    """Kill this process before the ``moment``-th call of what a save uses of the system."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    def writing(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Kill also in the middle of the file, with its first bytes on the disk."""

        def wrapped(checkpoint: Any, stream: Any) -> None:
            self.left -= 1
            if self.left:
                save(checkpoint, stream)
                return
            save(checkpoint, stream)
            stream.flush()
            os.truncate(stream.fileno(), stream.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        return wrapped


def _save_and_die(file: Path, step: int, moment: int, keep: int, links: bool) -> None:
    killer = _Killer(moment)
    if not links:
        os.link = lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links"))  # type: ignore[assignment]
    for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink"), (os, "open")):
        setattr(owner, name, killer.before(getattr(owner, name)))
    torch.save = killer.writing(torch.save)
    WholeFiles(keep=keep).save_checkpoint(content(step), file)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(keep: int, links: bool, tmp_path: Path) -> None:
    fork, ended, lost = multiprocessing.get_context("fork"), False, []
    for moment in itertools.count(1):
        run = tmp_path / str(moment)
        file = run / "checkpoints" / "last.ckpt"
        for step in (1, 2, 3):
            WholeFiles(keep=keep).save_checkpoint(content(step), file)
        child = fork.Process(target=_save_and_die, args=(file, 4, moment, keep, links))
        child.start()
        child.join()
        ended = child.exitcode == 0
        assert child.exitcode in (0, -signal.SIGKILL)
        found = find_checkpoint(str(run), tmp_path / "new", config={}, differs=lambda _: False)
        assert found is not None
        newest = steps(file.parent)[found.name]  # all are sound
        assert newest == 4 if ended else newest in (2, 3, 4)
        lost += [moment] if newest == 2 else []
        WholeFiles(keep=keep).save_checkpoint(content(5), file)
        assert not list(file.parent.glob(".*"))  # what the killed process has left is gone
        assert steps(file.parent)["last.ckpt"] == 5
        if ended:
            break
    assert moment > 6
    # Without links the newest has no name for the time of one call.
    assert len(lost) == (1 if keep > 1 and not links else 0)


# --------------------------------------------------------------------------------- full disks


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Let the system refuse to write more than some bytes into a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 60_000, 120_000])
def test_a_write_that_fails_leaves_the_good_file_and_says_what_it_takes(
    room: int, tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    files, file = WholeFiles(keep=2), tmp_path / "last.ckpt"
    for step in (1, 2):
        files.save_checkpoint(content(step), file)
    full_disk(room)
    with pytest.raises(UserError) as refusal:
        files.save_checkpoint(content(3, size=2_000_000), file)
    full_disk(resource.RLIM_INFINITY)
    said = str(refusal.value)
    assert said.startswith(f"{file} cannot be written: File too large. It takes 8 MB, ")
    assert "MB are free there" in said
    assert "Free space, or your quota, or set hydra.run.dir to another disk; then ckpt_path=auto goes on" in said
    assert steps(tmp_path) == {"last.ckpt": 2, "last-1.ckpt": 1}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("owner", ["fsync", "replace", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_each_refusal_of_the_system_is_one_message(
    owner: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, file = WholeFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint(content(1), file)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os if owner == "fsync" else Path, owner, fail)
    with pytest.raises(UserError, match=f"last.ckpt cannot be written: {os.strerror(code)}. It takes 0 MB"):
        files.save_checkpoint(content(2), file)
    assert steps(tmp_path) == {"last.ckpt": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_the_place_of_a_checkpoint_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").mkdir()
    with pytest.raises(UserError, match="best.ckpt cannot be written: Is a directory"):
        WholeFiles().save_checkpoint(content(1), tmp_path / "best.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]


def test_another_error_is_passed_on_without_a_half_file(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="pickle"):
        WholeFiles().save_checkpoint({"a": lambda: None}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_the_write_of_another_process_is_not_disturbed_by_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    names = []
    monkeypatch.setattr(torch, "save", lambda _, stream: names.append(Path(stream.name).name))
    for host in ("a", "b"):
        monkeypatch.setattr(saving.socket, "gethostname", lambda host=host: host)
        WholeFiles().save_checkpoint(content(1), tmp_path / "last.ckpt")
    assert len(set(names)) == 2


# --------------------------------------------------------------------------- when it is saved


class Time:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr("distilkit.runs.saving.monotonic", clock)
    monkeypatch.setattr("distilkit.budget.perf_counter", clock)
    return clock


class SlowFiles(WholeFiles):
    """Note the step of each save, and take many seconds for it."""

    def __init__(self, time: Time) -> None:
        super().__init__(keep=2)
        self.time, self.steps = time, []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path)
        if Path(path).name == "last.ckpt":
            self.steps.append(checkpoint["global_step"])
            assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] % 2 == 0
        self.time.now += 500.0


class Spend(Callback):
    """Let each optimizer step take its seconds, and a validation some."""

    def __init__(self, time: Time, seconds: Iterable[float], *, validation: float = 0.0) -> None:
        self.time, self.seconds, self.validation = time, iter(seconds), validation

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.time.now += next(self.seconds)

    def on_validation_start(self, *_: Any) -> None:
        self.time.now += self.validation


def train(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    time: Time,
    seconds: Iterable[float],
    *,
    steps: int = 20,
    validate: int = 1000,
    **given: Any,
) -> tuple[list[int], Any]:
    """Train in steps of two micro-batches that take their seconds; return the saved steps and the module."""
    options = {"keep": 2, "every_n_train_steps": None, "train_time_interval": None, **given}
    best = {"dirpath": folder, "filename": "best", "monitor": "val/loss", "enable_version_counter": False}
    files, module = (
        SlowFiles(time),
        build_module(tokenizer, budget=1e9, optimizer=functools.partial(torch.optim.SGD, lr=0.01)),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=1000,
        callbacks=[ValidateEvery(optimizer_steps=validate), Spend(time, seconds), Checkpoints(**options, **best)],
        plugins=[files],
        limit_val_batches=1 if validate < 1000 else 0,
    )
    held_out = DataLoader([uneven_step(lm="mlm", seed=99, size=4)], batch_size=None)
    trainer.fit(module, Steps([uneven_step(lm="mlm", seed=seed, size=4) for seed in range(5)], 2), held_out)
    return files.steps, module


def test_the_clock_saves_before_a_step_would_lose_more_than_its_interval(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(self: Any, optimizer: Any) -> Any:
        time.now += 50.0  # as ranks do before a save
        return optimizer.state_dict()

    monkeypatch.setattr(SingleDeviceStrategy, "optimizer_state", gather)
    saved, module = train(tmp_path, tokenizer, time, itertools.repeat(60.0), train_time_interval="5m")
    assert saved == [5, 10, 15, 20]
    assert module.clock.seconds == 20 * 60.0  # without the 550 seconds of each save
    last, before = (read_checkpoint(tmp_path / name)["global_step"] for name in ("last.ckpt", "last-1.ckpt"))
    assert (last, before) == (20, 15)


@pytest.mark.parametrize("seed", range(4))
def test_the_clock_keeps_its_interval_where_steps_take_different_times(
    seed: int, time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    seconds = [random.Random(seed).uniform(1.0, 1.6) for _ in range(60)]
    saved, _ = train(tmp_path, tokenizer, time, seconds, steps=60, train_time_interval=20)
    ends = [0, *saved]
    lost = [sum(seconds[begin:end]) for begin, end in itertools.pairwise(ends)]
    assert all(12.0 < each <= 20.0 for each in lost), lost
    assert sum(seconds[ends[-1] :]) < 20.0


def test_steps_and_validations_save_too_each_step_once(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    saved, module = train(tmp_path, tokenizer, time, itertools.repeat(1.0), steps=12, validate=4, every_n_train_steps=3)
    assert saved == [3, 4, 6, 8, 9, 12]
    assert module.clock.seconds == 12.0
    saved, _ = train(tmp_path, tokenizer, time, itertools.repeat(1.0), steps=12, validate=4)
    assert saved == [4, 8, 12]


def test_the_best_is_saved_where_the_clock_has_saved_the_step_before_its_validation(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    saved, _ = train(tmp_path, tokenizer, time, itertools.repeat(1.0), steps=4, validate=4, every_n_train_steps=4)
    assert saved == [4]
    assert read_checkpoint(tmp_path / "best.ckpt")["global_step"] == 4


def test_a_run_can_go_on_where_the_best_is_weights_alone(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train(tmp_path, tokenizer, time, itertools.repeat(1.0), steps=2, validate=2, save_weights_only=True)
    saved = {file.stem for file in checkpoints_of(tmp_path) if "optimizer_states" in read_checkpoint(file)}
    assert saved == {"last"}


def test_ranks_take_the_decision_of_the_first_and_ask_for_it_seldom(
    time: Time, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[int] = []

    def broadcast(self: Any, value: Any, src: int = 0) -> Any:
        if isinstance(value, int):
            said.append(value)
        return value

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", broadcast)
    first, _ = train(tmp_path, tokenizer, time, itertools.repeat(1.0), steps=200, train_time_interval=100)
    assert first == [100, 200]
    assert len(said) <= 30
    heard = iter(said)
    monkeypatch.setattr(
        SingleDeviceStrategy, "broadcast", lambda _, value, src=0: next(heard) if isinstance(value, int) else value
    )
    other, _ = train(tmp_path, tokenizer, time, itertools.repeat(9.0), steps=200, train_time_interval=100)
    assert other == first


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"train_time_interval": "soon"},
            "callbacks.checkpoint.train_time_interval=soon, but it must be a time above 0",
        ),
        ({"train_time_interval": timedelta(0)}, "callbacks.checkpoint.train_time_interval=0.0, but it must be a time"),
        ({"every_n_train_steps": 0}, "callbacks.checkpoint.every_n_train_steps=0, but it must be at least 1; null"),
    ],
)
def test_an_interval_that_is_none_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Checkpoints(**{"keep": 1, "every_n_train_steps": None, "train_time_interval": None, **given})


def test_an_interval_is_a_text_or_lightnings_own() -> None:
    for interval in ("2m", timedelta(minutes=2), 120):
        assert Checkpoints(keep=1, every_n_train_steps=None, train_time_interval=interval).seconds == 120.0
