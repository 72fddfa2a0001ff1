"""Spikes against a plain loop, and a band that they do not move."""

import math
import statistics

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distilkit.numbers import Spikes


def plain(values: list[float]) -> int:
    """Count values above the median of the 64 before + 7 * max(1.4826 * median deviation, 1 % of the median)."""
    kept: list[float] = []
    count = 0
    for value in values:
        median = 0.0
        if kept:
            recent = kept[-64:]
            median = statistics.median_low(recent)
            deviation = statistics.median_low([abs(each - median) for each in recent])
            limit = median + 7 * max(1.4826 * deviation, 0.01 * abs(median))
            count += len(kept) >= 16 and math.isfinite(value) and value > limit
        kept.append(value if math.isfinite(value) else median)
    return count


def fed(values: list[float], spikes: Spikes | None = None) -> Spikes:
    spikes = spikes or Spikes()
    for value in values:
        spikes.add(torch.tensor(value))
    return spikes


def falling(steps: int, *, seed: int = 0) -> list[float]:
    """Return a noisy loss that falls as one of a training does."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    return [float(np.float32(3 + 9 * math.exp(-step / 40) + each)) for step, each in enumerate(noise)]


@pytest.mark.parametrize("seed", range(3))
def test_spikes_are_those_of_a_plain_loop(seed: int) -> None:
    values = falling(400, seed=seed)
    assert int(fed(values).count) == plain(values) == 0
    for step in (5, 15, 16, 100, 101, 250, 399):
        values[step] *= 10
    values[180], values[300] = math.nan, math.inf
    assert int(fed(values).count) == plain(values) == 5


def test_a_band_is_not_moved_by_the_spikes_within_it() -> None:
    values = falling(200)
    values[120:145] = [447.0] * 25
    assert int(fed(values).count) == plain(values) == 25


def test_a_constant_loss_may_move_by_a_few_percent() -> None:
    assert int(fed([2.0] * 50 + [2.1, 2.15]).count) == 1


def test_counts_go_on_from_their_state() -> None:
    values = falling(300)
    values[40] = values[200] = 50.0
    again = Spikes()
    again.load_state_dict(fed(values[:150]).state_dict())
    assert int(fed(values[150:], again).count) == int(fed(values).count) == 2
    assert torch.equal(again.recent, fed(values).recent)


def test_the_host_reads_nothing_from_the_device() -> None:
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
        ) -> object:
            assert "_local_scalar_dense" not in str(func), "a value is read"
            return func(*args, **(kwargs or {}))  # type: ignore[operator]

    spikes, values = Spikes(), [torch.tensor(value) for value in falling(40)]
    with Refuse():
        for value in values:
            spikes.add(value)
        with pytest.raises(AssertionError, match="a value is read"):
            int(spikes.count)
