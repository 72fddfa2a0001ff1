"""Whole trainings, as users start them: distilkit's command and a script with transformers' Trainer, in turn."""

import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks import synthetic
from benchmarks.machine import describe, faster_precision, matmul_peaks
from benchmarks.report import caption, wide_console
from distilkit.records import write_json
from distilkit.report.page import print_table

OURS, DEFAULT, RAISED = "distilkit", "Trainer script", "Trainer script, malloc raised"
_SCRIPT = Path(__file__).with_name("trainer_script.py")
_RAISED = {"MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # as distilkit's own
_SKIPPED = 5  # first steps, which compile

SMALL = {  # the shape of a small BERT
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def run_training(
    *,
    out: Path,
    teacher: str | None = None,
    text: Sequence[str] = (),
    steps: int = 15,
    batch_size: int = 32,
    rounds: int = 2,
    threads: int | None = None,
    shape: Mapping[str, int] = SMALL,
    runs: Sequence[str] = (OURS, DEFAULT, RAISED),
) -> dict[str, Any]:
    """Time ``steps`` optimizer steps of half-depth distillation, ``rounds`` times each; print and write tokens/s.

    Without ``teacher`` and ``text``, a BERT with random weights reads synthetic text.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit("transformers' Trainer needs accelerate: pip install -c constraints.txt -e '.[bench]'")
    console, threads = wide_console(), threads or os.cpu_count() or 1
    fast = "bf16" if torch.cuda.is_available() else faster_precision(matmul_peaks("cpu"))
    rates: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if teacher is None:
            teacher = str(_random_teacher(place / "teacher", shape))
        if not text:
            text = [str(place / "text.txt")]
            synthetic.write_text(Path(text[0]), megabytes=2)
        for round_ in range(rounds):
            for name in runs:
                console.print(f"round {round_ + 1}: {name}", highlight=False)
                given: Any = {"teacher": teacher, "text": text, "steps": steps, "batch_size": batch_size}
                run: Callable[..., float] = _ours if name == OURS else partial(_theirs, raised=name == RAISED)
                rates[name].append(run(place / f"{name}-{round_}", bf16=fast == "bf16", threads=threads, **given))
    results: dict[str, Any] = {
        "machine": describe("cuda" if torch.cuda.is_available() else "cpu"),
        **{"precision": fast, "threads": threads, "steps": steps, "tokens_a_step": batch_size * 128},
        "tokens_per_second": rates,
        "ratios": {name: statistics.median(rates[runs[0]]) / statistics.median(rates[name]) for name in runs[1:]},
    }
    write_json(out / "bench-train.json", results)
    rows = [
        [name, *(f"{rate:,.0f}" for rate in found), f"{results['ratios'].get(name, 1):.2f}"]
        for name, found in rates.items()
    ]
    header = ["training", *(f"tokens/s, round {round_ + 1}" for round_ in range(rounds)), "distilkit is faster by"]
    print_table(f"{fast}, {threads} threads; {caption(results)}", header, rows, console=console)
    return results


def _random_teacher(folder: Path, shape: Mapping[str, int]) -> Path:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(folder)  # type: ignore[arg-type]
    synthetic.tokenizer(shape["vocab_size"]).save_pretrained(folder)
    return folder


def _call(line: Sequence[str], *, threads: int, more: Mapping[str, str] | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **(more or {})}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _ours(
    out: Path, *, teacher: str, text: Sequence[str], steps: int, batch_size: int, bf16: bool, threads: int
) -> float:
    """Return the median of the logged tokens/s, after the steps that compile."""
    paths = ",".join(f"'{path}'" for path in text)
    line = [
        "-m",
        "distilkit.train",
        "teacher=hf",
        f"teacher.name={teacher}",
        "data=text",
        f"data.corpus.paths=[{paths}]",
    ]
    line += ["data.block_size=128", f"data.global_batch_size={batch_size}", f"data.micro_batch_size={batch_size}"]
    line += [f"trainer.max_steps={steps}", "trainer.log_every_n_steps=1", "validate_first=false"]
    line += [f"trainer.precision={'bf16-mixed' if bf16 else '32-true'}", "+trainer.limit_val_batches=0"]
    line += [f"hydra.run.dir={out}", f"cache_dir={out}/cache"]
    _call([sys.executable, *line], threads=threads)
    with next(out.rglob("metrics.csv")).open(newline="", encoding="utf-8") as stream:
        rates = [row["throughput/tokens_per_second"] for row in csv.DictReader(stream)]
    return statistics.median([float(rate) for rate in rates if rate][_SKIPPED:])


def _theirs(
    out: Path, *, teacher: str, text: Sequence[str], steps: int, batch_size: int, raised: bool, bf16: bool, threads: int
) -> float:
    """Return what the script has printed."""
    line = [str(_SCRIPT), f"--teacher={teacher}", "--text", *text, f"--steps={steps}", f"--batch_size={batch_size}"]
    line += [f"--out={out}", f"--skip={_SKIPPED}", *(["--bf16"] if bf16 else [])]
    printed = _call([sys.executable, *line], threads=threads, more=_RAISED if raised else None)
    return float(json.loads(printed.strip().splitlines()[-1])["tokens_per_second"])
