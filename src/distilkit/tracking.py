"""Weights & Biases with a fallback: a run is kept offline where there is no key or no network."""

import logging
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from pytorch_lightning.loggers import WandbLogger

log = logging.getLogger(__name__)


def offline_reason() -> str | None:
    """Tell why W&B cannot be reached, or None when it can."""
    if os.environ.get("WANDB_MODE"):
        return None  # the user has decided
    if not wandb.api.api_key:
        return "no API key is set (wandb login)"
    url = urlparse(wandb.api.api_url)
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=3).close()
    except OSError as error:
        return f"{url.hostname} cannot be reached ({error})"
    return None


def wandb_logger(*, save_dir: str, project: str, name: str, group: str | None, **settings: Any) -> WandbLogger:
    """Build Lightning's W&B logger, offline with one line in the log when W&B cannot be reached.

    ``group`` gathers the runs of one sweep, by default under the name of its folder; further settings go to ``wandb.init``.
    """
    if group is None and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        group = Path(HydraConfig.get().sweep.dir).name
    reason = offline_reason()
    if reason:
        log.warning("W&B runs offline, because %s; later: wandb sync %s/wandb/offline-run-*", reason, save_dir)
    return WandbLogger(
        save_dir=save_dir, project=project, name=name, group=group, offline=reason is not None, **settings
    )
