"""Checkpoints under kills at exact moments, full disks and umasks, and when they are saved."""

import errno
import itertools
import multiprocessing
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from distilkit import saving
from distilkit.checkpoints import checkpoints_of, find_checkpoint, read_checkpoint
from distilkit.errors import UserError
from distilkit.saving import WholeFiles


def content(step: int, *, size: int = 30_000) -> dict[str, Any]:
    weights = {"a": torch.arange(float(size)) + step}
    return {"state_dict": weights, "global_step": step, "distilkit": {"record": {"config": {}}}}


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
