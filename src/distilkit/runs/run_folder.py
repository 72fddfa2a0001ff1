"""Let one process at a time train into a folder: a second one is refused before Hydra writes anything."""

import threading
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from distilkit.errors import UserError, ends_command
from distilkit.runs.signals import first_rank

_own = threading.local()  # trainings that share a process run in threads of their own


def hold(folder: Path) -> None:
    """Lock a run's folder until ``release`` or the end of this process; only the first rank of a run does."""
    if not first_rank():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", is_singleton=True)  # this process may ask again
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        found = f"another process trains into {folder}"
        raise UserError(f"{found}; wait for its end, or choose another hydra.run.dir (from Python: out)") from error
    except (OSError, NotImplementedError):  # a read-only folder, whose own message comes later; no locks
        return
    _held().append(lock)


def release() -> None:
    """Let other processes have the folders that this one holds."""
    while held := _held():
        held.pop().release(force=True)


def _held() -> list[BaseFileLock]:
    """Return the locks of this thread."""
    locks: list[BaseFileLock] = _own.__dict__.setdefault("locks", [])
    return locks


class HoldFolder(Callback):
    """Hydra callback: hold the folder of a single run; each job of a sweep holds its own later."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hold hydra.run.dir, or end the command."""
        with ends_command():
            hold(Path(config.hydra.run.dir))
