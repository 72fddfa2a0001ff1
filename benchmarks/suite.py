"""The suites of measurements, and the files that they write."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from benchmarks import growth
from benchmarks.batch_sizes import best_of_each, is_full, rising_batch_sizes
from benchmarks.data_path import time_data_path
from benchmarks.loss import absent, loss_variants, time_losses, weigh_loss
from benchmarks.machine import Precision, describe, faster_precision, matmul_peaks
from benchmarks.measure import Caller, apart
from benchmarks.models import SIZES, Family
from benchmarks.ratios import ratios
from benchmarks.report import (
    caption,
    gpu_tables,
    plot_batch_sizes,
    plot_results,
    print_results,
    wide_console,
)
from benchmarks.step import Variant, Workload, profile_step, time_steps, variants, weigh_step
from distilkit.records import write_json
from distilkit.report.page import markdown_table, print_table

Malloc = Literal["default", "raised"]  # glibc's thresholds for returning memory to the system

DROPOUT = 0.1  # the value of BERT, RoBERTa and GPT-2
GPU_BATCH_SIZES = tuple(2**power for power in range(3, 13))
GPU_LENGTHS = (128, 512)
GPU_FAMILIES: tuple[Family, ...] = ("bert", "roberta", "gpt2")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of a suite: blocks of a step, tokens of the loss, batches of the data path, and rounds of each."""

    size: str
    length: int
    blocks: int
    memory_blocks: int
    step_rounds: int
    loss_tokens: int
    loss_rounds: int
    data_batches: int
    data_rounds: int
    weighed: tuple[Malloc, ...]


STANDARD = Plan(
    size="base",
    length=128,
    blocks=32,
    memory_blocks=32,
    step_rounds=2,
    loss_tokens=4096,
    loss_rounds=1,
    data_batches=50,
    data_rounds=7,
    weighed=("default",),  # with raised thresholds naive needs even more memory
)
QUICK = Plan(
    size="small",
    length=128,
    blocks=8,
    memory_blocks=8,
    step_rounds=3,
    loss_tokens=1024,
    loss_rounds=2,
    data_batches=20,
    data_rounds=5,
    weighed=("default",),
)


def run_suite(call: Caller, plan: Plan, *, out: Path) -> dict[str, Any]:
    """Measure steps, loss and data path on the CPU; print, plot, write and return the results."""
    console, start = wide_console(), time.perf_counter()
    say = _progress_printer(console)
    peaks = matmul_peaks("cpu")
    fast = faster_precision(peaks)
    work = Workload(family="bert", size=plan.size, length=plan.length, dropout=DROPOUT)
    width, vocabulary = SIZES[plan.size].width, SIZES[plan.size].vocabulary_of("bert")

    steps = []
    for malloc in ("default", "raised"):
        raised = malloc == "raised"
        say(f"steps in turn, malloc thresholds {malloc}")
        records = call(time_steps, work, fast, plan.blocks, plan.step_rounds if raised else 1, raised=raised)
        for record, variant in zip(records, variants(fast), strict=True):
            weighed: dict[str, Any] = {"peak_mb": None, "products": True}
            if malloc in plan.weighed:
                say(f"memory of {variant.name}, malloc thresholds {malloc}")
                weighed = _weighed(call, weigh_step, work, variant, plan.memory_blocks, raised=raised)
            steps.append({**record, **weighed, "malloc": malloc, "memory_tokens": plan.memory_blocks * plan.length})
    say("a profile of our step")
    profile = call(profile_step, work, Variant("ours", fast, "all"), plan.blocks, raised=True)
    say("the loss alone")
    losses = call(time_losses, plan.loss_tokens, vocabulary, width, fast, plan.loss_rounds, raised=True)
    for record, loss_variant in zip(losses, loss_variants(fast), strict=True):
        record |= _weighed(call, weigh_loss, loss_variant, plan.loss_tokens, vocabulary, width, raised=False)
    say("the data path")
    data = call(time_data_path, plan.length, 32, plan.data_batches, plan.data_rounds, raised=True)
    for record in (*steps, *losses):
        record["peak_share"] = record["gflops"] / peaks[record["precision"]]

    results: dict[str, Any] = {
        "machine": describe("cpu"),
        "peaks": peaks,
        "fast_precision": fast,
        "family": "bert",
        "size": plan.size,
        "length": plan.length,
        "loss_tokens": plan.loss_tokens,
        "vocabulary": vocabulary,
        "steps": steps,
        "losses": losses,
        "profile": profile,
        "data": data,
        "notes": _notes(peaks, fast),
        "seconds": time.perf_counter() - start,
    }
    results["ratios"] = ratios(results)
    print_results(console, results)
    write_json(out / f"bench-{plan.size}.json", results)
    plot_results(results, out / f"bench-{plan.size}.png")
    say(f"written: {out / f'bench-{plan.size}.json'} and .png")
    return results


def _progress_printer(console: Console) -> Callable[[str], None]:
    """Return a function that prints a step of the suite with the seconds since the start."""
    start = time.perf_counter()
    return lambda what: console.print(f"[{time.perf_counter() - start:4.0f} s] {what}", highlight=False, markup=False)


def _weighed(call: Caller, function: Any, *arguments: Any, raised: bool) -> dict[str, Any]:
    """Return the peak of a run, or None if memory ran out."""
    try:
        weighed = call(function, *arguments, raised=raised, threads=os.cpu_count() or 1)
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        return {"peak_mb": None, "products": True}
    return {key: weighed[key] for key in ("peak_mb", "products")}


def _notes(peaks: dict[Precision, float], fast: Precision) -> list[str]:
    notes = [f"{maker}: not measured, {reason}" for maker, reason in absent().items()]
    if fast == "fp32":
        notes.append(
            f"this processor has no bf16 units: a bf16 product runs at {peaks['bf16'] / peaks['fp32']:.0%} of the speed of fp32. "
            "Naive bf16 was timed once on few tokens, and its memory was measured without computing matrix products. "
            "Ours ran in fp32; compare its speed with naive fp32"
        )
    return notes


def run_growth(
    call: Caller,
    *,
    out: Path,
    tokens: Sequence[int] = growth.TOKENS,
    vocabularies: Sequence[int] = growth.VOCABULARIES,
    megabytes: Sequence[int] = growth.MEGABYTES,
    width: int = 768,
) -> dict[str, Any]:
    """Measure the loss by tokens and vocabulary, and the preparation by size of text; an empty sequence skips one."""
    console = wide_console()
    say = _progress_printer(console)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = faster_precision(matmul_peaks(device))
    tokens, megabytes = [count for count in tokens if count], [size for size in megabytes if size]
    results: dict[str, Any] = {"machine": describe(device), "precision": fast}
    results["loss"] = growth.loss_growth(
        call,
        fast=fast,
        tokens=tokens,
        vocabularies=vocabularies,
        width=width,
        naive_limit_mb=_memory_megabytes(device) / 2,
        device=device,
        say=say,
    )
    write_json(out / "growth.json", results)  # half of the time has passed
    results["preparation"] = growth.preparation_growth(call, megabytes=megabytes, say=say)
    name = caption(results)
    if results["loss"]:
        seconds = "seconds" if device == "cuda" else "core-seconds"
        title = f"the loss with both heads, width {width}, {fast}\n{name}"
        growth.plot_loss_growth(results["loss"], out / "growth-loss.png", title=title, seconds=f"time, {seconds}")
    if results["preparation"]:
        title = f"preparing a corpus: reading, tokenizing, writing\n{name}"
        growth.plot_preparation_growth(results["preparation"], out / "growth-preparation.png", title=title)
    write_json(out / "growth.json", results)
    for part in ("loss", "preparation"):
        records = results[part]
        if records:
            rows = [[f"{v:,.4g}" if isinstance(v, float) else f"{v}" for v in record.values()] for record in records]
            print_table(f"cost of the {part}; {name}", list(records[0]), rows, console=console)
    return results


def _memory_megabytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e6
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6


def run_gpu(
    call: Caller = apart,
    *,
    out: Path,
    device: str = "cuda",
    size: str = "base",
    families: Sequence[Family] = GPU_FAMILIES,
    lengths: Sequence[int] = GPU_LENGTHS,
    batch_sizes: Sequence[int] = GPU_BATCH_SIZES,
    rounds: int = 5,
    loss_tokens: int = STANDARD.loss_tokens,
) -> dict[str, Any]:
    """Measure the loss alone, then each family and length at rising batch sizes until memory runs out.

    Results are printed, plotted and written. The JSON file is written after each variant, so that an interrupted run
    keeps its results.
    """
    console = wide_console()
    say = _progress_printer(console)
    peaks = matmul_peaks(device)
    fast: Precision = "bf16" if device == "cuda" else faster_precision(peaks)
    width, vocabulary = SIZES[size].width, SIZES[size].vocabulary_of("bert")
    say(f"the loss alone, {loss_tokens:,} tokens")
    losses: list[dict[str, Any]] = []
    try:
        losses = call(time_losses, loss_tokens, vocabulary, width, fast, rounds, device, raised=True)
        for record, variant in zip(losses, loss_variants(fast), strict=True):
            record |= _weighed(call, weigh_loss, variant, loss_tokens, vocabulary, width, device, raised=False)
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        say("the loss alone: skipped, because the naive loss does not fit in memory")
    works = [
        Workload(family=family, size=size, length=length, dropout=DROPOUT, device=device)
        for family in families
        for length in lengths
    ]
    results: dict[str, Any] = {"machine": describe(device), "peaks": peaks, "fast_precision": fast, "losses": losses}
    results |= {"loss_tokens": loss_tokens, "vocabulary": vocabulary, "steps": []}
    write_json(out / "bench-gpu.json", results)
    for name, found in rising_batch_sizes(call, works=works, fast=fast, batch_sizes=batch_sizes, rounds=rounds):
        results["steps"] += found
        most = f"up to {found[-1]['blocks']} blocks" if found else "nothing, because memory ran out"
        say(f"{name}: {most}")
        write_json(out / "bench-gpu.json", results)
    for record in (*losses, *results["steps"]):
        record["peak_share"] = record["gflops"] / peaks[record["precision"]]
    results["best"] = best_of_each(results["steps"])
    write_json(out / "bench-gpu.json", results)
    products = ", ".join(f"{name} {peak:,.0f} GFLOP/s" for name, peak in peaks.items())
    page = [f"{caption(results)}; fastest matrix products: {products}"]
    for title, header, rows in gpu_tables(results):
        print_table(f"{title}; {caption(results)}", header, rows, console=console)
        page += [title, markdown_table(header, rows)]
    (out / "bench-gpu.md").write_text("\n\n".join(page), "utf-8")
    plot_batch_sizes(results["steps"], out / "bench-gpu.png", title=caption(results))
    return results
