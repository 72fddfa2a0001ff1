"""Cost of the loss by tokens and vocabulary, and of the preparation by size of the corpus."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import synthetic
from benchmarks.loss import LossVariant, build_loss, draw_heads
from benchmarks.machine import Precision
from benchmarks.measure import Caller, time_and_weigh
from distilkit.data.cache import prepare
from distilkit.data.text_files import TextFiles

TOKENS = (1024, 2048, 4096, 8192, 16384)
VOCABULARIES = (30522, 50265, 250002)  # BERT, RoBERTa, XLM-R
MEGABYTES = (10, 30, 100, 300, 1000)
_WARM_UP = 512  # tokens; enough to compile the loss


def loss_growth(
    call: Caller,
    *,
    fast: Precision,
    tokens: Sequence[int],
    vocabularies: Sequence[int],
    width: int,
    naive_limit_mb: float,
    device: str = "cpu",
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure time and memory of the loss for each number of tokens and vocabulary, each in its own process.

    The naive loss is measured for the first vocabulary only, while its estimated memory is below ``naive_limit_mb``: about
    nine float32 tensors of (tokens, vocabulary).
    """
    records = []
    for vocabulary in vocabularies:
        for count in tokens:
            makers = [LossVariant("ours", fast)]
            if vocabulary == vocabularies[0] and 9 * 4e-6 * count * vocabulary < naive_limit_mb:
                makers.append(LossVariant("naive", fast))
            for variant in makers:
                say(f"the loss, {variant.maker}: {count:,} tokens, {vocabulary:,} words")
                spent, peak = call(_measure_once, variant, count, vocabulary, width, device, raised=True)
                records.append(
                    {
                        "maker": variant.maker,
                        "tokens": count,
                        "vocabulary": vocabulary,
                        "seconds": spent,
                        "peak_mb": peak,
                    }
                )
    return records


def _measure_once(variant: LossVariant, count: int, vocabulary: int, width: int, device: str) -> tuple[float, float]:
    """Return seconds (CPU: core-seconds) and peak MB of one forward and backward pass, after a short warm-up.

    One run gives both figures, because there are many sizes and no small ratios to resolve. On CUDA two runs of the same
    size come first, to allocate memory and load kernels.
    """
    few = draw_heads(min(count, _WARM_UP), vocabulary=vocabulary, width=width, device=device)
    build_loss(variant, few)()  # compiles for any number of tokens
    del few
    heads = draw_heads(count, vocabulary=vocabulary, width=width, device=device)
    run = build_loss(variant, heads)
    if device == "cuda":
        run()
        run()
        heads.forget_gradients()
    timing, peak = time_and_weigh(run, device=device)
    return timing.wall_seconds if device == "cuda" else timing.core_seconds, peak


def preparation_growth(call: Caller, *, megabytes: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Tokenize synthetic text of each size into a cache on all cores, each size in its own process."""
    records = []
    for size in megabytes:
        say(f"the preparation of {size:,} MB")
        records.append(call(prepare_once, size, raised=False))
    return records


def prepare_once(megabytes: int) -> dict[str, Any]:
    """Tokenize one corpus; return wall seconds, core-seconds, peak memory in MB and tokens."""
    tokenizer = synthetic.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "corpus.txt")
        synthetic.write_text(file, megabytes=megabytes)
        corpus = TextFiles(paths=str(file))
        cache = Path(folder, "cache")
        timing, peak = time_and_weigh(lambda: prepare(corpus, tokenizer, cache_dir=cache, val_share=0.01))
        tokens = sum(file.stat().st_size for split in ("train", "val") for file in cache.rglob(f"{split}.bin")) // 2
    return {
        "megabytes": megabytes,
        "seconds": timing.wall_seconds,
        "core_seconds": timing.core_seconds,
        "peak_mb": peak,
        "tokens": tokens,
    }


def plot_loss_growth(records: Sequence[dict[str, Any]], out: Path, *, title: str, seconds: str) -> None:
    """Plot time and memory against tokens, one line per vocabulary."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)
    lines = sorted({(record["maker"] == "naive", record["vocabulary"]) for record in records})
    for axis, key, label, scale in ((axes[0], "seconds", seconds, 1.0), (axes[1], "peak_mb", "peak memory, GB", 1e-3)):
        for number, (naive, vocabulary) in enumerate(lines):
            points = sorted(
                (record["tokens"], scale * record[key])
                for record in records
                if (record["maker"] == "naive", record["vocabulary"]) == (naive, vocabulary)
            )
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                linestyle="--" if naive else "-",
                color="tab:gray" if naive else f"C{number}",
                label=f"{'naive' if naive else 'ours'}, {vocabulary:,} words",
            )
        axis.set(xlabel="tokens", ylabel=label, title=f"{label.split(',')[0]} of the loss, forward and backward")
        _from_zero(axis)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.legend()
    figure.suptitle(title)
    figure.savefig(out, dpi=120)


def plot_preparation_growth(records: Sequence[dict[str, Any]], out: Path, *, title: str) -> None:
    """Plot time and memory of the preparation against the size of the corpus."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)
    sizes = [record["megabytes"] for record in records]
    axes[0].plot(sizes, [record["seconds"] for record in records], marker="o", label="seconds")
    axes[0].plot(sizes, [record["core_seconds"] for record in records], marker="o", label="core-seconds")
    axes[0].legend()
    axes[0].set(xlabel="corpus, MB of text", ylabel="seconds", title="time of the preparation")
    axes[1].plot(sizes, [record["peak_mb"] for record in records], marker="o")
    axes[1].set(xlabel="corpus, MB of text", ylabel="MB", title="peak memory of the preparation")
    for axis in axes:
        _from_zero(axis)
    figure.suptitle(title)
    figure.savefig(out, dpi=120)


def _from_zero(axis: Axes) -> None:
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
