"""Start the other ranks of a job on the job's own composed config.

Lightning repeats ``sys.argv`` for each rank. In a multirun that is the whole sweep, so each rank would train a job of
its own choosing; and the rank variables it sets would turn the sweep's next job into a waiting child.
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
    """Let child ranks run ``config_file``, and leave no trace of the process group behind.

    Variables that were set before, by torchrun or SLURM, are kept.
    """
    before = {name: os.environ.get(name) for name in _RANK_VARIABLES}
    arguments = sys.argv[1:]
    sys.argv[1:] = [f"--config-path={config_file.parent.resolve()}", f"--config-name={config_file.stem}"]
    hydra_config: Any = HydraConfig.instance().cfg
    run_dir = hydra_config.hydra.run.dir
    with flag_override(hydra_config.hydra, "readonly", False):
        hydra_config.hydra.run.dir = str(config_file.parent.resolve())  # Lightning hands it to the children
    try:
        yield
    finally:
        sys.argv[1:] = arguments
        with flag_override(hydra_config.hydra, "readonly", False):
            hydra_config.hydra.run.dir = run_dir
        launched_here = before["LOCAL_RANK"] is None
        if launched_here:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
