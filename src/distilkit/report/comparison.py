"""Compare the runs of a sweep: one table and one plot out of their summaries."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from distilkit.language_model import lm_of
from distilkit.report.page import markdown_table, print_table
from distilkit.summary import write_json
from distilkit.timing import latency, seconds_in_turn

log = logging.getLogger(__name__)


def run_label(folder: Path, common: set[str]) -> str:
    """Name a run by the overrides that not all runs share; a stage by its name alone."""
    return ", ".join(_short(item) for item in _overrides(folder) if item not in common) or folder.name


def _short(override: str) -> str:
    """Drop the plus of an added key, and the group of an added option: +experiment/demo=teacher is the stage teacher."""
    key, _, value = override.partition("=")
    return value if key.startswith("+") and "/" in key else override.lstrip("+")


def _overrides(folder: Path) -> list[str]:
    file = folder / ".hydra" / "overrides.yaml"
    return [str(item) for item in OmegaConf.load(file)] if file.is_file() else []


def read_runs(sweep: Path, *, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Read the summaries of a sweep's finished runs, in the order they ran, each with ``label`` and ``folder``.

    With ``only`` the summaries of other folders are left unread; what is common to all runs names none all the same.
    """
    files = sorted(sweep.glob("*/summary.json"), key=lambda file: file.stat().st_mtime)
    sets = [set(_overrides(file.parent)) for file in files]
    common = set.intersection(*sets) if len(sets) > 1 else set()
    return [
        {**json.loads(file.read_text("utf-8")), "label": run_label(file.parent, common), "folder": str(file.parent)}
        for file in files
        if only is None or str(file.parent) in only
    ]


@torch.inference_mode()
def measure_latency(folders: Sequence[str], *, block_size: int, rounds: int = 15) -> list[float]:
    """Time one forward pass of one block on this CPU for each model, in turn; return the medians in milliseconds.

    In turn, so that a machine that slows down slows all of them.
    """
    models = []
    for folder in folders:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        causal = lm_of(config["model_type"], config["architectures"]) == "clm"
        models.append((AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_pretrained(folder).eval())
    ids = torch.randint(10, min(model.config.vocab_size for model in models), (1, block_size))
    passes = [[partial(model, input_ids=ids)] for model in models]
    return [latency(seconds)["latency_ms"] for seconds in seconds_in_turn(passes, warm_up=3, rounds=rounds)]


_COLUMNS = (
    ("parameters", "student_parameters", "{:,.0f}"),
    ("tokens seen", "tokens_seen", "{:,.0f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("cross-entropy", "val/nll", "{:.3f}"),
    ("accuracy", "val/accuracy", "{:.3f}"),
    ("agreement", "val/agreement", "{:.3f}"),
    ("untrained", "before", "{:.3f}"),
    ("latency ms", "latency_ms", "{:.1f}"),
)


def cell(run: Mapping[str, Any], key: str, form: str) -> str:
    """Format one value of a run, a dash where it has none."""
    value = run["before"].get("val/nll") if key == "before" else run.get(key, run["after"].get(key))
    return "-" if value is None else form.format(value)


def table_rows(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Lay out runs as rows; a column that no run fills is left out."""
    rows = [[cell(run, key, form) for _, key, form in _COLUMNS] for run in runs]
    used = [index for index in range(len(_COLUMNS)) if any(row[index] != "-" for row in rows)]
    header = ["run", *(_COLUMNS[index][0] for index in used)]
    return header, [[str(run["label"]), *(row[index] for index in used)] for run, row in zip(runs, rows, strict=True)]


def plot_runs(runs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw held-out cross-entropy and accuracy of each run as bars."""
    labels = [str(run["label"]) for run in runs]
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(runs)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, title, form in (
        (axes[0], "val/nll", "cross-entropy (nats per token), lower is better", "%.3f"),
        (axes[1], "val/accuracy", "accuracy at labelled tokens, higher is better", "%.3f"),
    ):
        bars = axis.barh(
            labels,
            [run["after"][key] for run in runs],
            color=["tab:gray" if label == "teacher" else "tab:blue" for label in labels],
        )
        axis.bar_label(bars, fmt=form, padding=3)
        axis.set(xlabel=title)
        axis.margins(x=0.15)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle("held-out documents after training")
    figure.savefig(out, dpi=120)


def compare(sweep: Path, *, latency: bool) -> None:
    """Print the table of a sweep, and write comparison.json, comparison.md and comparison.png beside its runs."""
    runs = read_runs(sweep)
    if not runs:
        return
    if latency:
        block_size = min(int(run["block_size"]) for run in runs)
        measured = measure_latency([f"{run['folder']}/student" for run in runs], block_size=block_size)
        for run, milliseconds in zip(runs, measured, strict=True):
            run["latency_ms"] = milliseconds
    header, rows = table_rows(runs)
    first, *others = (
        [header, *rows] if len(rows) > len(header) else zip(header, *rows, strict=True)
    )  # the way that fits
    console = Console()
    print_table(f"runs of {sweep.name}, on held-out documents", first, others, console=console)
    write_json(sweep / "comparison.json", {"runs": runs})
    (sweep / "comparison.md").write_text(markdown_table(header, rows), "utf-8")
    plot_runs(runs, sweep / "comparison.png")
    console.print(f"table and plot: {sweep / 'comparison'}.md, .json, .png", soft_wrap=True, highlight=False)
    for run in runs:
        console.print(f"{run['label']}: {run['folder']}/student", soft_wrap=True, highlight=False)


class SweepReport(Callback):
    """Hydra callback: compare the runs when a sweep has ended."""

    def __init__(self, *, measure_latency: bool) -> None:
        """Choose whether each student's latency is measured too."""
        self.measure_latency = measure_latency

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the comparison."""
        compare(Path(config.hydra.sweep.dir), latency=self.measure_latency)
