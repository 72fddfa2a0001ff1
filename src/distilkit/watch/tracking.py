"""Weights & Biases, offline if there is no key or no network."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from pytorch_lightning.loggers import Logger, WandbLogger
from requests.utils import get_netrc_auth

from distilkit.runs.turns import own_turn

log = logging.getLogger(__name__)


def offline_reason() -> str | None:
    """Return why W&B cannot be reached, or None if it can, or if the user has set a mode."""
    if os.environ.get("WANDB_MODE"):
        return None
    settings = wandb.setup().settings
    keys = settings.api_key, os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if not any(keys) and not get_netrc_auth(settings.base_url):
        return "no API key is set (wandb login)"
    proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
    try:  # as W&B does: through its own proxies, or those of the environment
        requests.head(settings.base_url, timeout=3, proxies={name: url for name, url in proxies.items() if url})
    except requests.exceptions.SSLError:
        return None  # a server answers; which certificates to trust is a setting of W&B
    except requests.RequestException as error:
        return f"{settings.base_url} cannot be reached ({error})"
    return None


def wandb_logger(
    *, save_dir: str, project: str, name: str, group: str | None, log_model: bool = False, **settings: Any
) -> WandbLogger:
    """Build Lightning's W&B logger, offline if W&B cannot be reached; ``settings`` go to ``wandb.init``.

    Runs of a sweep share a ``group``, by default the name of the sweep's folder. ``log_model`` is read by the end of a
    training, which uploads the student, whereas Lightning would upload each checkpoint.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        group = group or Path(HydraConfig.get().sweep.dir).name
        wandb.finish()  # or Lightning would continue the run of the previous job
    if own_turn():
        settings["reinit"] = "create_new"  # beside the runs of other trainings in this process
    if reason := offline_reason():
        log.warning("W&B runs offline: %s; upload later with wandb sync %s/wandb/offline-run-*", reason, save_dir)
        settings["settings"] = wandb.Settings(silent=True)  # the warning above is enough
        settings["mode"] = "offline"  # Lightning's ``offline`` sets a variable that W&B has already read
    logger = WandbLogger(save_dir=save_dir, project=project, name=name, group=group, **settings)
    logger._wandb_init.pop("anonymous", None)  # Lightning always gives it, and W&B warns of it in each run
    return logger


@contextmanager
def closing(loggers: Iterable[Logger]) -> Iterator[None]:
    """Finish the runs of ``loggers``, as failed after an error; a later training in this process would continue them."""
    code = 1
    try:
        yield
        code = 0
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger.experiment.finish(exit_code=code)


def log_student(logger: WandbLogger, folder: Path, *, metadata: Mapping[str, Any]) -> None:
    """Upload a student's folder as an artifact of type model, named by the run; offline, ``wandb sync`` uploads it."""
    name = re.sub(r"[^\w.-]+", "-", f"{logger.experiment.name or 'student'}-{logger.experiment.id}")
    artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
    artifact.add_dir(str(folder), policy="immutable")  # without a copy of the weights
    logger.experiment.log_artifact(artifact)
