"""Weights & Biases with a fallback: a run is kept offline where there is no key or no network."""

import logging
import netrc
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


def _has_key(settings: wandb.Settings, host: str) -> bool:
    """Tell whether W&B would find a key: in its settings, in the environment, or in ~/.netrc."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def offline_reason() -> str | None:
    """Tell why W&B cannot be reached, or None when it can."""
    if os.environ.get("WANDB_MODE"):
        return None  # the user has decided
    settings = wandb.setup().settings
    url = urlparse(settings.base_url)
    host = str(url.hostname)
    if not _has_key(settings, host):
        return "no API key is set (wandb login)"
    try:
        socket.create_connection((host, url.port or 443), timeout=3).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


def wandb_logger(*, save_dir: str, project: str, name: str, group: str | None, **settings: Any) -> WandbLogger:
    """Build Lightning's W&B logger, offline with one line in the log when W&B cannot be reached.

    ``group`` gathers the runs of one sweep, by default under the name of its folder; further settings go to ``wandb.init``.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        group = group or Path(HydraConfig.get().sweep.dir).name
        wandb.finish()  # the sweep's job before, which Lightning would go on with
    reason = offline_reason()
    if reason:
        log.warning("W&B runs offline, because %s; later: wandb sync %s/wandb/offline-run-*", reason, save_dir)
        settings["settings"] = wandb.Settings(silent=True)  # the line above says it all
        settings["mode"] = "offline"  # Lightning's own ``offline`` sets a variable that W&B has read by now
    return WandbLogger(save_dir=save_dir, project=project, name=name, group=group, **settings)
