"""Time models on batches, in turn and in one process, so that their ratios hold on a busy machine."""

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
    """Time every batch of every pass, (rounds, batches) seconds for each pass.

    First each pass runs ``warm_up`` batches untimed. Then each batch is run by all passes before the next one is, in an
    order that turns round each round, so that a slow moment of the machine hits all of them.
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
    """Return median, 10th and 90th percentile over batches in ms; each batch counts with its median over rounds."""
    low, median, high = np.percentile(np.median(seconds, axis=0) * 1000, [10, 50, 90])
    return {"latency_ms": float(median), "latency_ms_p10": float(low), "latency_ms_p90": float(high)}


def throughput(seconds: NDArray[np.float64], *, num_sentences: int) -> dict[str, float]:
    """Return sentences per second, the median over rounds."""
    return {"sentences_per_second": float(np.median(num_sentences / seconds.sum(axis=1)))}


def times_faster(scores: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Say for all that was timed how many times faster it is than ``other``: above 1 is faster, or more a second."""
    timed = [key for key in scores if "/" in key]
    return {key: other[key] / scores[key] if "latency" in key else scores[key] / other[key] for key in timed}


def torch_pass(model: nn.Module, batches: Sequence[Batch], *, device: str) -> Pass:
    """Make batches ready for PyTorch, their tensors on the device already; each waits for its result."""

    def run(batch: Batch) -> None:
        model(**batch)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    model.to(device)
    return [partial(run, {key: tensor.to(device) for key, tensor in batch.items()}) for batch in batches]


def onnx_pass(session: Any, batches: Sequence[Batch]) -> Pass:
    """Make batches ready for ONNX Runtime."""
    return [partial(session.run, None, {key: tensor.numpy() for key, tensor in batch.items()}) for batch in batches]


@contextmanager
def torch_threads(number: int | None) -> Iterator[int]:
    """Let torch use so many threads for a while, and say how many it uses."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
