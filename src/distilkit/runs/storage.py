"""Say in one message what a full disk, a quota or a read-only folder asks of the user."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

from distilkit.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
_CLOSED |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP}


def storage_fault(error: Exception, folder: Path | None, *, cure: str) -> UserError | None:
    """Return the message for an error in writing below ``folder``, or None if it is of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):  # of libraries in Rust
        number = int(said[1])
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)  # the target of a copy, if it is one
    place = Path(os.fsdecode(file)) if isinstance(file, str | bytes) else folder
    if number in _FULL:
        disk = f"the disk of {place}" if place else "a disk that is written to, or in $TMPDIR"
        return UserError(f"no space left on {disk} (or in your quota); free some, or {cure}")
    if number in _CLOSED and place and (folder or number == errno.EROFS):  # else a file may not be readable
        return UserError(f"{place} cannot be written ({os.strerror(number)}); {cure}")
    if number == errno.ENOENT and folder and not folder.exists():  # renamed or deleted while it is written
        return UserError(f"{folder} is not there any more, or cannot be made; {cure}")
    return None


@contextmanager
def writing(folder: str | Path, *, cure: str) -> Iterator[None]:
    """Turn the errors of a disk that is full, or a folder that cannot be written, into a ``UserError``."""
    try:
        yield
    except Exception as error:
        if (fault := storage_fault(error, Path(folder), cure=cure)) is None:
            raise
        raise fault from error


def check_writable(file: str | Path, *, cure: str) -> None:
    """Refuse a file that cannot be written, before the work whose result it will hold."""
    with writing(folder := Path(file).parent, cure=cure):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def whole_folder(folder: Path, *, cure: str) -> Iterator[Path]:
    """Make a folder under a temporary name beside it, which holds host and process, and rename it in the end.

    So it is whole or not there, also after a power cut. It has the permissions that the umask leaves.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{gethostname()}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number, as in a container
    try:
        with writing(folder.parent, cure=cure):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _flush(file)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def permit_reading(folder: Path) -> None:
    """Give a model's weights the permissions of its config.json: safetensors lets only their owner read them."""
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder below $TMPDIR that is deleted in the end."""
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"{error.strerror}; free some space there, or set TMPDIR to a folder on another disk"
        ) from error
    with writing(place, cure="set TMPDIR to a folder on another disk"), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _flush(file: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: without it, a power cut may leave zeros."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot do it for folders
            raise
    finally:
        os.close(descriptor)
