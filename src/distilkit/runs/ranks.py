"""The ranks of a run that this process starts itself: one config for all of them, and nothing of them left behind."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import flag_override

from distilkit.cli import in_sweep
from distilkit.runs.signals import inbox

_STARTER = "DISTILKIT_STARTER"  # the id of the process that has started a rank
_RANK_VARIABLES = (_STARTER, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def starter() -> int | None:
    """Return the process of the same run that has started this rank, and ends with it; None for a first process."""
    found = int(os.environ.get(_STARTER, os.getpid()))
    return None if found == os.getpid() else found


@contextmanager
def ranks_on_config(config_file: Path, *, launcher: Any = None) -> Iterator[None]:
    """Let child ranks run ``config_file``, and afterwards remove all traces of the process group.

    1. Lightning starts each rank with ``sys.argv``. In a multirun that is the whole sweep, so each rank would choose a
       job. Without a Hydra command line, as in a notebook, child ranks repeat the caller's own script.
    2. Lightning's rank variables would make the next job of a sweep a waiting child; those of torchrun and SLURM stay.
    3. In a sweep, the ranks of a failed job are ended. Else the thread in which Lightning's ``launcher`` watches them
       would kill this process, and with it the sweep.
    """
    unset = [name for name in _RANK_VARIABLES if name not in os.environ]
    os.environ.setdefault(_STARTER, str(os.getpid()))
    inbox.launcher = launcher  # a signal before the first step goes to its ranks, too
    try:
        with _command_line(config_file):
            yield
    except Exception:
        children: list[Any] = getattr(launcher, "procs", []) if in_sweep() else []
        for child in children:
            child.kill()
            child.wait()
        children.clear()  # the thread reads the same list
        raise
    finally:
        if "LOCAL_RANK" in unset:  # the ranks were started here
            import torch

            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name in unset:
                os.environ.pop(name, None)


@contextmanager
def _command_line(config_file: Path) -> Iterator[None]:
    """Point the arguments and Hydra's run folder at a config, if Hydra has started this job."""
    if not HydraConfig.initialized():
        yield
        return
    folder, arguments = str(config_file.parent.resolve()), sys.argv[1:]
    hydra: Any = HydraConfig.get()
    main, run_dir = sys.modules["__main__"], hydra.run.dir
    spec = main.__spec__
    if in_sweep() and not hydra.launcher._target_.startswith("hydra._internal."):  # the program is the launcher's
        main.__spec__ = find_spec("distilkit.train")  # Lightning starts a rank with -m and this name
    sys.argv[1:] = [f"--config-path={folder}", f"--config-name={config_file.stem}"]
    with flag_override(hydra, "readonly", False):
        hydra.run.dir = folder  # Lightning passes it to the children
    try:
        yield
    finally:
        sys.argv[1:], main.__spec__ = arguments, spec
        with flag_override(hydra, "readonly", False):
            hydra.run.dir = run_dir
