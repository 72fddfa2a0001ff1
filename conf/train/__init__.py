"""The Hydra configs of distilkit.train, distilkit.prepare and distilkit.export."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distilkit.errors import UserError


def _unless_steps(epochs: int, *, _parent_: Any, _root_: Any) -> int:
    """Return a number of epochs for ``max_epochs``, or -1 where ``max_steps`` beside it or a budget ends the run."""
    return epochs if _parent_.max_steps == -1 and _root_.get("budget") is None else -1


def _training_seconds(folder: str) -> float:
    """Return the seconds of training of a finished run, to which another run's ``budget`` is set."""
    file = Path(folder).expanduser() / "summary.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; its run has failed or is not finished, so run it again first")
    seconds: float | None = json.loads(file.read_text("utf-8")).get("training_seconds")
    if not seconds:
        raise UserError(f"{file} has training_seconds={seconds}; give the folder of a run that has trained")
    return seconds


OmegaConf.register_new_resolver("unless_steps", _unless_steps, replace=True)
OmegaConf.register_new_resolver("training_seconds", _training_seconds, replace=True)
