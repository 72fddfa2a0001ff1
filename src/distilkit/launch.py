"""Start the other ranks of a job on the job's own composed config.

Lightning repeats ``sys.argv`` for each rank. In a multirun these are the arguments of the whole sweep, so that each rank
would choose a job itself. The rank variables that Lightning sets would make the sweep's next job a waiting child.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import flag_override

_RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def ranks_on_config(config_file: Path) -> Iterator[None]:
    """Let child ranks run ``config_file``, and remove the process group and its variables at the end.

    Variables that were set before, by torchrun or SLURM, are kept. Without a Hydra command line, as in a notebook,
    child ranks repeat the caller's own script.
    """
    before = {name: os.environ.get(name) for name in _RANK_VARIABLES}
    try:
        with _command_line(config_file):
            yield
    finally:
        launched_here = before["LOCAL_RANK"] is None
        if launched_here:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)


@contextmanager
def _command_line(config_file: Path) -> Iterator[None]:
    """Point the arguments and Hydra's run folder at a config, if Hydra has started this job."""
    if not HydraConfig.initialized():
        yield
        return
    folder = str(config_file.parent.resolve())
    arguments = sys.argv[1:]
    hydra: Any = HydraConfig.get()
    run_dir = hydra.run.dir
    sys.argv[1:] = [f"--config-path={folder}", f"--config-name={config_file.stem}"]
    with flag_override(hydra, "readonly", False):
        hydra.run.dir = folder  # Lightning passes it to the children
    try:
        yield
    finally:
        sys.argv[1:] = arguments
        with flag_override(hydra, "readonly", False):
            hydra.run.dir = run_dir
