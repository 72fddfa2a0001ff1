"""Time runs in turn, measure peak memory, and run both in separate processes."""

import ctypes
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distilkit.cli import keep_large_buffers

Run = Callable[[], object]
T = TypeVar("T")


class Caller(Protocol):
    """Call a function in another process (``apart``) or in this one (``here``)."""

    def __call__(self, function: Callable[..., T], *arguments: Any, raised: bool, threads: int = 1) -> T:
        """Return the function's result."""
        ...


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds in seconds: process time of all threads, and wall time."""

    core_seconds: float
    wall_seconds: float
    rounds: int


def in_turn(
    runs: Mapping[str, Run], *, rounds: int, device: str = "cpu", once: frozenset[str] = frozenset()
) -> dict[str, Timing]:
    """Time runs as A B C A B C, so that a slow moment hits all of them; those in ``once`` run in the first round only."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round_ in range(rounds):
        for name, run in runs.items():
            if round_ == 0 or name not in once:
                seconds[name].append(_time(run, device))
    medians = {}
    for name, pairs in seconds.items():
        core, wall = (statistics.median(clock) for clock in zip(*pairs, strict=True))
        medians[name] = Timing(core, wall, rounds=len(pairs))
    return medians


def _time(run: Run, device: str) -> tuple[float, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    core, wall = time.process_time(), time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - core, time.perf_counter() - wall


def peak_megabytes(run: Run, *, device: str = "cpu") -> float:
    """Return the peak memory of a run in MB: of this process, on CUDA of the allocator.

    Memory that earlier runs have freed is returned to the system first, so that it does not hide the peak.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # Linux: reset the high-water mark to the resident memory
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def time_and_weigh(run: Run, *, device: str = "cpu") -> tuple[Timing, float]:
    """Return the time and the peak memory in MB of a single run."""
    timings: list[Timing] = []
    peak = peak_megabytes(lambda: timings.append(in_turn({"run": run}, rounds=1, device=device)["run"]), device=device)
    return timings[0], peak


class NoProducts(TorchDispatchMode):
    """Replace the result of each matrix product with zeros: the same memory without the time.

    Used to measure the memory of a bf16 step on a processor that emulates bf16, where one step takes half an hour.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace mm, addmm and bmm, forward and backward."""
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            left, right = args[-2:]
            return left.new_zeros((*left.shape[:-1], right.shape[-1])).fill_(0)  # writing makes its pages resident
        return func(*args, **(kwargs or {}))


def apart(function: Callable[..., T], *arguments: Any, raised: bool, threads: int = 1) -> T:
    """Call a function in its own process, with glibc's malloc thresholds raised or at their defaults.

    Raises:
        MemoryError: the system killed the process because memory ran out.
    """
    context = multiprocessing.get_context("forkserver")  # fresh memory without importing torch each time
    context.set_forkserver_preload(["benchmarks.step", "benchmarks.loss"])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(raised, threads)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MemoryError(f"the process of {function.__name__} was killed") from error


def here(function: Callable[..., T], *arguments: Any, raised: bool, threads: int = 1) -> T:
    """Call a function in this process, for tests."""
    return function(*arguments)


def _start(raised: bool, threads: int) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(threads)
    if raised:
        keep_large_buffers()
