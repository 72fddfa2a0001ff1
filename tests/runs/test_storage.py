import errno
import os
import stat
import tempfile
from pathlib import Path
from socket import gethostname

import pytest

from distilkit.errors import UserError
from distilkit.runs.storage import temporary_folder, whole_folder, writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("of_rust", [False, True])
def test_a_full_disk_or_quota_is_one_message_with_folder_and_cure(tmp_path: Path, number: int, of_rust: bool) -> None:
    text = os.strerror(number)
    error = Exception(f"I/O error: {text} (os error {number})") if of_rust else OSError(number, text)
    message = rf"no space left on the disk of {tmp_path} \(or in your quota\); free some, or set out to another folder"
    with pytest.raises(UserError, match=message) as caught, writing(tmp_path, cure="set out to another folder"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.EEXIST])
def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path, number: int) -> None:
    file = tmp_path / "a"
    reason = os.strerror(number)
    with pytest.raises(UserError, match=rf"{file} cannot be written \({reason}\); set"), writing(tmp_path, cure="set"):
        raise OSError(number, reason, str(file))


def test_of_a_copy_the_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no space left on the disk of /target/b "), writing(tmp_path, cure="set"):
        raise OSError(errno.ENOSPC, "No space left on device", "/source/a", None, "/target/b")


def test_a_folder_that_is_renamed_while_it_is_written_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=f"{folder} is not there any more, .*; set"), writing(folder, cure="set"):
        (folder / "metrics.csv").touch()
    with pytest.raises(FileNotFoundError), writing(tmp_path, cure="set"):  # another file is missed
        (folder / "metrics.csv").touch()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("bug"), KeyError(28)])
def test_other_errors_are_left_alone(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path, cure="set"):
        raise error
    assert caught.value is error


def test_a_real_full_device_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no space left on the disk of {tmp_path} "), writing(tmp_path, cure="set"):
        Path("/dev/full").write_text("a")


def test_a_temporary_folder_is_gone_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as folder:
        (folder / "a").write_text("a")
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_without_a_usable_temporary_folder_the_message_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    found = "No usable temporary directory found in ['/tmp']"

    def refuse() -> str:
        raise FileNotFoundError(errno.ENOENT, found)

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    with (
        pytest.raises(UserError, match=r"No usable temporary .*'/tmp'\]; free some space .* set TMPDIR to"),
        temporary_folder(),
    ):
        raise AssertionError


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_folder_is_whole_or_not_there_and_has_the_permissions_that_the_umask_leaves(
    tmp_path: Path, umask: int
) -> None:
    left_over = tmp_path / f"made.tmp-{gethostname()}-{os.getpid()}"  # of a killed process of the same number
    left_over.mkdir()
    (left_over / "old").touch()
    before = os.umask(umask)
    try:
        with pytest.raises(KeyError), whole_folder(tmp_path / "made", cure="set") as folder:
            raise KeyError
        assert list(tmp_path.iterdir()) == []
        with whole_folder(tmp_path / "made", cure="set") as folder:
            (folder / "a").write_text("a")
            assert not (tmp_path / "made").exists()
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "a"]
    modes = [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")]
    assert modes == [0o777 & ~umask, 0o666 & ~umask]


def test_a_folder_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / "made").exists()
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_folder(tmp_path / "made", cure="set") as folder:
        (folder / "b").mkdir()
        (folder / "b" / "a").write_text("a")
    assert sorted(flushed) == ["a", "b", f"made.tmp-{gethostname()}-{os.getpid()}"]


def test_a_disk_that_reports_only_at_the_end_that_it_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:  # as of a network's file system
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fsync)
    message = f"no space left on the disk of {tmp_path} "
    with pytest.raises(UserError, match=message), whole_folder(tmp_path / "made", cure="set") as folder:
        (folder / "a").write_text("a")
    assert list(tmp_path.iterdir()) == []
