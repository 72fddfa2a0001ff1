"""The largest micro-batch that fits: doubled as long as the growth so far predicts that the next one fits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Point(NamedTuple):
    """A micro-batch size that was tried: its peak memory in bytes, and its seconds for each block."""

    size: int
    peak: float
    seconds_per_block: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The sizes that were tried, and the largest that fits ``limit`` bytes, 0 if none does."""

    points: tuple[Point, ...]
    least: float  # bytes of the models, gradients and optimizer, without activations
    limit: float
    largest: int = 0
    measured: bool = True  # false: time ended the search, and the growth of the memory tells the largest

    def predict(self, size: int) -> float:
        """Return the peak memory in bytes of a micro-batch size, by the line through the last two points."""
        if not self.points:
            return self.least
        last = self.points[-1]
        before = self.points[-2] if len(self.points) > 1 else Point(0, min(self.least, last.peak), 0.0)
        return last.peak + max(0.0, last.peak - before.peak) / (last.size - before.size) * (size - last.size)


def grow(measure: Callable[[int], Point], *, most: int, least: float, limit: float, seconds: float) -> Fit:
    """Find the largest micro-batch of up to ``most`` blocks that fits ``limit`` bytes.

    ``measure`` runs a few steps. A size is tried only if its predicted peak fits, and its predicted time what is left of
    ``seconds``. An out-of-memory error of CUDA ends the search.
    """
    fit = Fit(points=(), least=least, limit=limit)
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    for size in sizes:
        if fit.predict(size) > limit:
            break
        seconds -= 4 * size * fit.points[-1].seconds_per_block if fit.points else 0.0  # two steps of two micro-batches
        if seconds < 0:
            largest = max(each for each in sizes if fit.predict(each) <= limit)
            return Fit(points=fit.points, least=least, limit=limit, largest=largest, measured=False)
        try:
            point = measure(size)
        except torch.OutOfMemoryError:
            break
        largest = size if point.peak <= limit else fit.largest
        fit = Fit(points=(*fit.points, point), least=least, limit=limit, largest=largest)
        if point.peak > limit:
            break
    return fit
