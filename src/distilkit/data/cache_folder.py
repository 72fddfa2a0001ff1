"""Folders of the cache, each made once: whole or not at all, by one process while others wait."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from distilkit.errors import UserError
from distilkit.runs.storage import whole_folder

log = logging.getLogger(__name__)

_CURE = "set cache_dir to another disk (2 bytes per token, or 4 if the vocabulary exceeds 65,536)"


@contextmanager
def usable(cache_dir: Path) -> Iterator[None]:
    """Turn the errors of a cache that cannot be read, written or locked into a ``UserError``."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise UserError(
            f"cache_dir={cache_dir} cannot be written ({error}); set cache_dir or DISTILKIT_CACHE to another folder"
        ) from error


def make_once(cache_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache; if it is not there, ``write`` fills it under a temporary name first.

    A folder that is there is whole. It is used without a lock, so that it may be on a read-only disk. The temporary name
    holds the host and the process, which those that wait report.
    """
    folder = cache_dir / name
    with usable(cache_dir):
        if folder.is_dir():
            log.debug("%s is ready", folder)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.info("%s makes %s; waiting for it", _maker(folder), folder)
            held = lock.acquire()
    with held:
        if folder.is_dir():
            return folder
        with usable(cache_dir):
            for left_over in folder.parent.glob(f"{folder.name}.tmp*"):
                shutil.rmtree(left_over)  # of a killed process: this process holds the lock, so no other writes here
        with whole_folder(folder, cure=_CURE) as temporary:
            write(temporary)
    return folder


def _maker(folder: Path) -> str:
    """Name the process that makes a folder, as its temporary name does, and since when."""
    newest, maker = 0.0, "another process"
    for temporary in folder.parent.glob(f"{folder.name}.tmp-*"):
        host, _, process = temporary.name.removeprefix(f"{folder.name}.tmp-").rpartition("-")
        with suppress(OSError):  # it may be finished by now
            begun = temporary.stat().st_mtime
            if begun > newest:
                newest, since = begun, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun))
                maker = f"process {process} on {host}, which began at {since},"
    return maker
