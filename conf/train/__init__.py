"""The Hydra configs of distilkit.train, distilkit.prepare and distilkit.export."""

from typing import Any

from omegaconf import OmegaConf


def _unless_steps(epochs: int, *, _parent_: Any) -> int:
    """Return a number of epochs for ``max_epochs``, or -1 where ``max_steps`` beside it ends the training."""
    return epochs if _parent_.max_steps == -1 else -1


OmegaConf.register_new_resolver("unless_steps", _unless_steps, replace=True)
