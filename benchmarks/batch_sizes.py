"""The step at rising batch sizes until memory runs out: what ``make bench-gpu`` shows."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.machine import Precision
from benchmarks.measure import Caller, in_turn, peak_megabytes
from benchmarks.step import Variant, Workload, batch_of, build_steps, variants


def rising_batch_sizes(
    call: Caller, *, works: Sequence[Workload], fast: Precision, batch_sizes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Measure every variant of every workload, each in a process of its own, one record for each batch size."""
    return [
        record
        for work in works
        for variant in variants(fast, work.family)
        for record in call(measure_until_full, work, variant, tuple(batch_sizes), rounds, raised=True)
    ]


def measure_until_full(
    work: Workload, variant: Variant, batch_sizes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Time and weigh one variant at each batch size, up to the first that does not fit."""
    (step,) = build_steps([variant], work).values()
    records = []
    for batch_size in batch_sizes:
        try:
            batch = batch_of(work, batch_size)
            run = partial(step, batch)
            run()  # compiles, and makes the optimizer's state
            step.optimizer.zero_grad()
            peak = peak_megabytes(run, device=work.device)
            timing = in_turn({"step": run}, rounds=rounds, device=work.device)["step"]
        except (torch.OutOfMemoryError, MemoryError):
            break
        records.append(
            {
                "family": work.family,
                "length": work.length,
                "variant": variant.name,
                "blocks": batch_size,
                "tokens_per_second": batch_size * work.length / timing.wall_seconds,
                "gflops": 1e-9 * step.flops(batch) / timing.wall_seconds,
                "peak_mb": peak,
            }
        )
    return records
