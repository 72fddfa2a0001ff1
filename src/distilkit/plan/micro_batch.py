"""The largest micro-batch that fits: grown step by step, and never beyond what the growth so far predicts to fit."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Point:
    """A micro-batch size that was tried: its peak memory in bytes, and its seconds for each block."""

    micro_batch_size: int
    peak: int
    seconds_per_block: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The points that were measured, and the largest micro-batch that fits, 0 if none does.

    ``measured`` is false where time ended the search, so that ``largest`` follows from the growth of the memory.
    ``least`` are the bytes of both models, the gradients and the optimizer, without activations.
    """

    points: tuple[Point, ...]
    largest: int
    measured: bool
    least: float
    limit: float

    def predict(self, size: int) -> float:
        """Return the peak memory in bytes of a micro-batch size, by the line through the last two points."""
        return _predict(self.points, size, least=self.least)


def _predict(points: tuple[Point, ...], size: int, *, least: float) -> float:
    if not points:
        return least
    last = points[-1]
    before = (points[-2].micro_batch_size, points[-2].peak) if len(points) > 1 else (0, min(least, last.peak))
    slope = max(0.0, (last.peak - before[1]) / (last.micro_batch_size - before[0]))
    return last.peak + slope * (size - last.micro_batch_size)


def grow(measure: Callable[[int], Point], *, most: int, least: float, limit: float, seconds: float) -> Fit:
    """Double the micro-batch up to ``most`` blocks, and return the largest that fits ``limit`` bytes.

    ``measure`` runs two optimizer steps. A size is only tried if its predicted peak fits, and if its predicted time
    fits what is left of ``seconds``; an out-of-memory error of CUDA ends the search, and is no error of this function.
    """
    points: tuple[Point, ...] = ()
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    beyond, timed_out = most + 1, False  # the smallest size that does not fit, as far as is known
    for size in sizes:
        if _predict(points, size, least=least) > limit:
            beyond = size
            break
        spent = 4 * points[-1].seconds_per_block * size if points else 0.0  # two steps of two micro-batches
        if spent > seconds:
            timed_out = True
            break
        seconds -= spent
        try:
            point = measure(size)
        except torch.OutOfMemoryError:
            beyond = size
            break
        points += (point,)
        if point.peak > limit:
            beyond = size
            break
    fitting = [size for size in sizes if size < beyond and _predict(points, size, least=least) <= limit]
    tried = [point.micro_batch_size for point in points if point.micro_batch_size < beyond]
    largest = max(itertools.chain(fitting if timed_out else tried, [0]))
    return Fit(points=points, largest=largest, measured=largest in tried, least=least, limit=limit)
