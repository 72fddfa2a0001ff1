"""Tables and charts of the results."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from distilkit.report.page import print_table

Record = Mapping[str, Any]


def wide_console() -> Console:
    """Return a console of at least 120 columns, so that tables are not cut."""
    return Console(width=max(120, Console().width))


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """Print all figures of a run, then the ratios."""
    machine, peaks = results["machine"], results["peaks"]
    peak_text = ", ".join(f"{name} {peak:,.0f} GFLOP/s" for name, peak in peaks.items())
    console.print(
        f"{machine['processor']}, torch {machine['torch']}, {machine['date']}; fastest matrix product on one core: "
        f"{peak_text}",
        soft_wrap=True,
    )
    for note in results["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    for malloc in ("default", "raised"):
        records = [record for record in results["steps"] if record["malloc"] == malloc]
        print_table(
            f"one optimizer step, {results['length']} tokens a block, malloc thresholds {malloc}",
            ["variant", "tokens", "core-s", "tokens/core-s", "tokens/s", "of peak", "peak MB", "at tokens"],
            [
                [
                    record["variant"],
                    f"{record['tokens']:,}",
                    f"{record['core_seconds']:.3g}",
                    f"{record['tokens_per_core_second']:,.0f}",
                    f"{record['tokens_per_second']:,.0f}",
                    f"{record['peak_share']:.0%}",
                    memory_cell(record),
                    f"{record['memory_tokens']:,}",
                ]
                for record in records
            ],
            console=console,
        )
    print_table(
        f"the loss alone with both heads, {results['loss_tokens']} tokens, {results['vocabulary']:,} words",
        ["variant", "tokens", "core-s", "tokens/core-s", "of peak", "peak MB"],
        [
            [
                record["variant"],
                f"{record['tokens']}",
                f"{record['core_seconds']:.3g}",
                f"{record['tokens_per_core_second']:,.0f}",
                f"{record['peak_share']:.0%}",
                memory_cell(record),
            ]
            for record in results["losses"]
        ],
        console=console,
    )
    print_table(
        "our step on all rows: shares of its time",
        ["operation", "share"],
        [[name, f"{share:.0%}"] for name, share in results["profile"].items()],
        console=console,
    )
    print_table(
        "the data path: masked batches from tokens on disk",
        ["variant", "Mtokens/core-s"],
        [[record["variant"], f"{1e-6 * record['tokens_per_core_second']:.2f}"] for record in results["data"]],
        console=console,
    )
    print_table(
        "ratios of ours to naive; above 1 is faster, below 1 is less memory",
        ["ratio", ""],
        [[what, f"{ratio:.2f}"] for what, ratio in results["ratios"].items()],
        console=console,
    )


def memory_cell(record: Record) -> str:
    """Format a peak; a star marks one that was measured without matrix products."""
    if record.get("peak_mb") is None:
        return "-"
    return f"{record['peak_mb']:,.0f}{'' if record['products'] else '*'}"


def caption(results: Mapping[str, Any]) -> str:
    """Return the machine, the version of torch and the date."""
    machine = results["machine"]
    return f"{machine['processor']}, torch {machine['torch']}, {machine['date']}"


def plot_results(results: Mapping[str, Any], out: Path) -> None:
    """Plot bars: speed and memory of the step and of the loss, and speed of the data path."""
    steps = [record for record in results["steps"] if record["malloc"] == "raised"]
    defaults = {record["variant"]: record for record in results["steps"] if record["malloc"] == "default"}
    rows = (len(steps) + 1, len(results["losses"]) + 1, len(results["data"]) + 1)
    figure = Figure(figsize=(13, 2.2 + 0.55 * sum(rows)), layout="constrained")
    axes = figure.subplots(3, 2, height_ratios=rows, squeeze=False)
    rate, memory = "tokens_per_core_second", "peak_mb"

    step = f"optimizer step, {results['family']}, size {results['size']}, {results['length']} tokens a block"
    loss = f"loss alone, {results['loss_tokens']:,} tokens, {results['vocabulary']:,} words"
    _bars(axes[0, 0], steps, rate, f"{step}\ntokens per core-second, higher is better", before=defaults)
    tokens = steps[0]["memory_tokens"] if steps else 0
    heavy = f"optimizer step, {tokens:,} tokens, default malloc thresholds\npeak memory in MB, lower is better"
    _bars(axes[0, 1], list(defaults.values()), memory, heavy)
    _bars(axes[1, 0], results["losses"], rate, f"{loss}\ntokens per core-second, higher is better")
    _bars(axes[1, 1], results["losses"], memory, "loss alone\npeak memory in MB, lower is better")
    millions = [{**record, rate: 1e-6 * record[rate]} for record in results["data"]]
    _bars(axes[2, 0], millions, rate, "data path, masking included\nmillion tokens per core-second, higher is better")
    footnotes = ["Speed of the step: bars with glibc's malloc thresholds raised, dots with the defaults."]
    footnotes.append("Peak memory: without weights and optimizer state, each variant in its own process.")
    if _starred(results):
        footnotes.append("*: measured without computing matrix products.")
    axes[2, 1].axis("off")
    axes[2, 1].text(
        0.0,
        0.9,
        "\n".join(_wrapped([*footnotes, *results["notes"]])),
        va="top",
        fontsize=9,
        transform=axes[2, 1].transAxes,
    )
    figure.suptitle(f"distilkit and a naive step\n{caption(results)}", fontsize=11)
    figure.savefig(out, dpi=120)


def gpu_tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Build the tables of the loss, of the best batch sizes and of all batch sizes: titles, headers and rows."""
    losses = [
        [record["variant"], f"{record['tokens_per_second']:,.0f}", f"{record['peak_share']:.0%}", memory_cell(record)]
        for record in results["losses"]
    ]
    best, every = (
        [
            [
                f"{record['family']} at {record['length']}",
                record["variant"],
                f"{record['blocks']}",
                f"{record['tokens_per_second']:,.0f}",
                f"{record['peak_share']:.0%}",
                f"{record['peak_mb']:,.0f}",
                *("-" if record[key] is None else f"{record[key]:.2f}" for key in ratios),
            ]
            for record in records
        ]
        for records, ratios in ((results["best"], ("times_naive", "memory_share")), (results["steps"], ()))
    )
    header = ["models", "variant", "blocks", "tokens/s", "of peak", "peak MB"]
    alone = f"the loss alone with both heads, {results['loss_tokens']:,} tokens, {results['vocabulary']:,} words"
    return [
        (alone, ["variant", "tokens/s", "of peak", "peak MB"], losses),
        (
            "optimizer steps at each variant's fastest batch size; memory at the largest that fits for both",
            [*header, "times naive bf16", "of its memory"],
            best,
        ),
        ("optimizer steps at all batch sizes", header, every),
    ]


def plot_batch_sizes(records: Sequence[Record], out: Path, *, title: str) -> None:
    """Plot speed and memory against batch size, one row of axes per workload and one line per variant."""
    works = list(dict.fromkeys((record["family"], record["length"]) for record in records))
    figure = Figure(figsize=(13, 1.2 + 3.2 * len(works)), layout="constrained")
    axes = figure.subplots(max(1, len(works)), 2, squeeze=False)
    for row, (family, length) in enumerate(works):
        mine = [record for record in records if (record["family"], record["length"]) == (family, length)]
        for axis, key, scale, label in (
            (axes[row, 0], "tokens_per_second", 1e-3, "thousand tokens/s"),
            (axes[row, 1], "peak_mb", 1e-3, "peak memory, GB"),
        ):
            for number, variant in enumerate(dict.fromkeys(record["variant"] for record in mine)):
                points = [(record["blocks"], scale * record[key]) for record in mine if record["variant"] == variant]
                dashed = variant.startswith("naive")
                axis.plot(
                    *zip(*points, strict=True), f"C{number}", ls="--" if dashed else "-", marker="o", label=variant
                )
            axis.set(xscale="log", xlabel=f"blocks of {length} tokens", ylabel=label, title=f"{family} at {length}")
            axis.set_xticks(sorted({record["blocks"] for record in mine}))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[row, 0].legend(fontsize=8)
    figure.suptitle(
        f"optimizer steps at rising batch sizes; memory without weights and optimizer state\n{title}", fontsize=11
    )
    figure.savefig(out, dpi=120)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2g}"


def _starred(results: Mapping[str, Any]) -> bool:
    return any(not record.get("products", True) for record in (*results["steps"], *results["losses"]))


def _wrapped(notes: Sequence[str], width: int = 68) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, width)]


def _bars(
    axis: Axes, records: Sequence[Record], key: str, title: str, *, before: Mapping[str, Record] | None = None
) -> None:
    names = [record["variant"] for record in records]
    values = [record.get(key) or 0.0 for record in records]
    colors = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
    axis.barh(names, values, color=colors)
    texts = [
        "not measured" if not record.get(key) else memory_cell(record) if key == "peak_mb" else _short(value)
        for record, value in zip(records, values, strict=True)
    ]
    dots = [float((before or {}).get(name, {}).get(key) or 0.0) for name in names]
    for name, value, dot, text in zip(names, values, dots, texts, strict=True):
        if dot:
            axis.scatter([dot], [name], color="black", s=22, zorder=3)
        axis.annotate(text, (max(value, dot), name), (7, 0), textcoords="offset points", va="center")
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10, loc="left")
    axis.margins(x=0.18)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
