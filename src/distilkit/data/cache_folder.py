"""Folders of the cache, each made once: whole or not at all, by one process while others wait."""

import errno
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from distilkit.errors import UserError

log = logging.getLogger(__name__)


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

    A folder that is there is whole. It is used without a lock, so that it may be on a read-only disk.
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
            log.info("another process makes %s; waiting for it", folder)
            held = lock.acquire()
    with held:
        if folder.is_dir():
            return folder
        with usable(cache_dir):
            for left_over in folder.parent.glob(f"{folder.name}.tmp*"):
                shutil.rmtree(left_over)  # of a killed process: this process holds the lock, so no other writes here
            temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
        try:
            write(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"no space left on the disk of {folder.parent} (or in your quota) for the cache; free some, or set "
                "cache_dir to another disk (2 bytes per token, or 4 if the vocabulary exceeds 65,536)"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
