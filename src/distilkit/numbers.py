"""Spikes of the loss and of the gradient norm, counted on the device, so that the host need not wait for it."""

from typing import Any

import torch
from torch import Tensor

_RECENT, _FEWEST = 64, 16  # values of the band, and those that come before the first count
_BAND = 7.0  # robust standard deviations
_NORMAL, _LEAST = 1.4826, 0.01  # standard deviations in a median deviation of a normal; of the median, the least one


class Spikes:
    """Count values of optimizer steps that lie far above recent ones.

    A spike is more than 7 standard deviations above the median of the last 64 values. OLMo 2 (arXiv 2501.00656, section
    3) measures from a rolling mean. The standard deviation here is that of a normal with the median absolute deviation,
    which spikes do not move, and at least 1 % of the median. Values that are not finite are no spikes.
    """

    def __init__(self) -> None:
        """Start without values."""
        self.recent = torch.zeros(_RECENT)
        self.count = torch.tensor(0)
        self.seen = 0

    def add(self, value: Tensor) -> None:
        """Add the value () of a step; nothing is read from the device."""
        value = value.detach().float()
        self.recent, self.count = self.recent.to(value.device), self.count.to(value.device)
        if self.seen:
            recent = self.recent[: min(self.seen, _RECENT)]
            median = recent.median()
            deviation = torch.maximum(_NORMAL * (recent - median).abs().median(), _LEAST * median.abs())
            if self.seen >= _FEWEST:
                self.count = self.count + (value.isfinite() & (value > median + _BAND * deviation))
        else:
            median = torch.zeros_like(value)
        self.recent[self.seen % _RECENT] = torch.where(value.isfinite(), value, median)
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"recent": self.recent.cpu(), "count": int(self.count), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the values of the parts before."""
        self.recent, self.count, self.seen = state["recent"].clone(), torch.tensor(state["count"]), state["seen"]
