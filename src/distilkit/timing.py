"""Time models on batches in turn, in one process, so that their ratios are valid on a busy machine."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Batch = dict[str, Tensor]
Pass = Sequence[Callable[[], object]]  # a model's batches, each ready to run


def seconds_in_turn(passes: Sequence[Pass], *, warm_up: int, rounds: int) -> list[NDArray[np.float64]]:
    """Time every batch of every pass, and return seconds (rounds, batches) for each pass.

    Each pass first runs ``warm_up`` batches untimed. Then all passes run one batch before the next batch, in an order
    that is reversed each round. A slow moment of the machine thus affects all passes.
    """
    for batches in passes:
        for run in itertools.islice(itertools.cycle(batches), warm_up):
            run()
    seconds = [np.empty((rounds, len(batches))) for batches in passes]
    for turn in range(rounds):
        order = range(len(passes)) if turn % 2 == 0 else reversed(range(len(passes)))
        for number, which in itertools.product(range(len(passes[0])), list(order)):
            start = time.perf_counter()
            passes[which][number]()
            seconds[which][turn, number] = time.perf_counter() - start
    return seconds


def latency(seconds: NDArray[np.float64]) -> dict[str, float]:
    """Return median, 10th and 90th percentile over batches in ms, after the median over rounds of each batch."""
    low, median, high = np.percentile(np.median(seconds, axis=0) * 1000, [10, 50, 90])
    return {"latency_ms": float(median), "latency_ms_p10": float(low), "latency_ms_p90": float(high)}


def throughput(seconds: NDArray[np.float64], *, num_sentences: int) -> dict[str, float]:
    """Return sentences per second, as the median over rounds."""
    return {"sentences_per_second": float(np.median(num_sentences / seconds.sum(axis=1)))}


def times_faster(scores: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Return how many times faster each timed value is than in ``other``; above 1 is faster."""
    timed = [key for key in scores if "/" in key]
    return {key: scores[key] / other[key] if "per_second" in key else other[key] / scores[key] for key in timed}


def torch_pass(model: nn.Module, batches: Sequence[Batch], *, device: str) -> Pass:
    """Move a model and its batches to the device; each run waits for its result."""

    def run(batch: Batch) -> None:
        model(**batch)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    model.to(device)
    return [partial(run, {key: tensor.to(device) for key, tensor in batch.items()}) for batch in batches]


def onnx_pass(session: Any, batches: Sequence[Batch]) -> Pass:
    """Convert batches to the inputs of ONNX Runtime."""
    return [partial(session.run, None, {key: tensor.numpy() for key, tensor in batch.items()}) for batch in batches]


@contextmanager
def torch_threads(number: int | None) -> Iterator[int]:
    """Set the number of torch's threads in a context, and yield the number in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
