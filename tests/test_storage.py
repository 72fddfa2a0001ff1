import errno
import os
import tempfile
from pathlib import Path

import pytest

from distilkit.errors import UserError
from distilkit.storage import flush, temporary_folder, writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("of_rust", [False, True])
def test_a_full_disk_or_quota_is_one_message_with_folder_and_cure(tmp_path: Path, number: int, of_rust: bool) -> None:
    text = os.strerror(number)
    error = Exception(f"I/O error: {text} (os error {number})") if of_rust else OSError(number, text)
    message = rf"no space left on the disk of {tmp_path} \(or in your quota\); free some, or set out to another folder"
    with pytest.raises(UserError, match=message) as caught, writing(tmp_path, cure="set out to another folder"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG])
def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path, number: int) -> None:
    file = tmp_path / "a"
    reason = os.strerror(number)
    with pytest.raises(UserError, match=rf"{file} cannot be written \({reason}\); set"), writing(tmp_path, cure="set"):
        raise OSError(number, reason, str(file))


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


def test_files_and_folders_are_flushed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    flush(tmp_path / "a")
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "b")
