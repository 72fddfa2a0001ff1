"""The optimizer step at rising batch sizes until memory runs out, for ``make bench-gpu``."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.machine import Precision
from benchmarks.measure import Caller, in_turn, peak_megabytes
from benchmarks.step import Step, Variant, Workload, batch_of, build_steps, variants


def rising_batch_sizes(
    call: Caller, *, works: Sequence[Workload], fast: Precision, batch_sizes: Sequence[int], rounds: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure each variant of each workload in its own process; yield its name and one record per batch size."""
    for work in works:
        for variant in variants(fast, work.family):
            name = f"{work.family} at {work.length}, {variant.name}"
            try:
                yield name, call(measure_until_full, work, variant, tuple(batch_sizes), rounds, raised=True)
            except MemoryError:  # the process was killed, and what it had measured is lost
                yield name, []


def measure_until_full(
    work: Workload, variant: Variant, batch_sizes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Measure time and memory of one variant at each batch size, up to the first that does not fit."""
    records: list[dict[str, Any]] = []
    step: Step | None = None
    for batch_size in batch_sizes:
        try:
            step = step or next(iter(build_steps([variant], work).values()))
            batch = batch_of(work, batch_size)
            run = partial(step, batch)
            run()  # compiles, and allocates the optimizer's state
            step.optimizer.zero_grad()
            peak = peak_megabytes(run, device=work.device)
            timing = in_turn({"step": run}, rounds=rounds, device=work.device)["step"]
        except (RuntimeError, MemoryError) as error:
            if is_full(error):
                break
            raise
        records.append(
            {
                "family": work.family,
                "length": work.length,
                "variant": variant.name,
                "maker": variant.maker,
                "precision": variant.precision,
                "rows": variant.rows,
                "blocks": batch_size,
                "tokens_per_second": batch_size * work.length / timing.wall_seconds,
                "gflops": 1e-9 * step.flops(batch) / timing.wall_seconds,
                "peak_mb": peak,
            }
        )
    return records


def is_full(error: Exception) -> bool:
    """Return whether memory ran out; CUDA's libraries raise errors of their own."""
    message = str(error)
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "out of memory" in message or "STATUS_ALLOC_FAILED" in message


def best_of_each(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take each variant's fastest batch size and compare it with the fastest naive bf16 step on the same rows.

    ``times_naive`` is the ratio of tokens per second. ``memory_share`` is the ratio of the peaks at the largest batch
    size that fits for both.
    """
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["family"], record["length"], record["rows"], record["variant"]), []).append(record)
    best = []
    for (family, length, rows, _), mine in found.items():
        fastest = max(mine, key=lambda record: float(record["tokens_per_second"]))
        naive = found.get((family, length, rows, f"naive bf16, {rows} rows"), [])
        peaks = {record["blocks"]: record["peak_mb"] for record in naive}
        shares = {
            record["blocks"]: record["peak_mb"] / peaks[record["blocks"]]
            for record in mine
            if record["blocks"] in peaks
        }
        rates = [record["tokens_per_second"] for record in naive]
        best.append(
            {
                **fastest,
                "times_naive": fastest["tokens_per_second"] / max(rates) if rates else None,
                "memory_share": shares[max(shares)] if shares else None,
            }
        )
    return best
