"""Draw the pictures of README: ``python docs/draw.py [comparison.json]``.

Writes ``pipeline.png`` and ``demo.png`` next to this file. The figures of the demo are those of results.md's table, or those of
the ``comparison.json`` that ``make demo`` leaves in ``outputs/demo/<time>/``.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from distilkit.student import choose_layers

DOCS = Path(__file__).parent
INK, TEACHER, STUDENT, PLAIN, LOSS = "#1f2933", "#b8c2cc", "#2f7ed8", "#f1f4f7", "#fdf1d8"
TEXT = 20  # points; the pictures are about 1,600 pixels wide and shown at half the size


class Run(NamedTuple):
    """One row of the demo's comparison."""

    name: str
    parameters: int
    cross_entropy: float
    accuracy: float


def box(axis: Axes, x: float, y: float, width: float, height: float, text: str, color: str = PLAIN) -> None:
    """Draw a rounded box whose lower left corner is at (x, y), with its text in the middle."""
    style = "round,pad=0,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=1.5))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=TEXT, color=INK)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], *, color: str = INK) -> None:
    """Draw an arrow between two points."""
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "mutation_scale": 18, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=style)


def layers(axis: Axes, x: float, y: float, width: float, height: float, colors: list[str]) -> list[float]:
    """Draw a model as a row of layers; return the horizontal centre of each."""
    pitch = width / len(colors)
    for number, color in enumerate(colors):
        patch = Rectangle((x + number * pitch, y), 0.8 * pitch, height, facecolor=color, edgecolor=INK, linewidth=1)
        axis.add_patch(patch)
    return [x + (number + 0.4) * pitch for number in range(len(colors))]


def draw_pipeline(out: Path) -> None:
    """Draw the way from text to a student."""
    figure = Figure(figsize=(16.75, 5.2), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 16.75), ylim=(0.15, 5.35))
    axis.axis("off")

    box(axis, 0.15, 2.3, 1.1, 1.0, "text")
    box(axis, 1.7, 2.3, 1.35, 1.0, "tokens")
    box(axis, 3.5, 2.3, 1.5, 1.0, "masked\nblocks")
    arrow(axis, (1.25, 2.8), (1.7, 2.8))
    arrow(axis, (3.05, 2.8), (3.5, 2.8))

    kept = choose_layers(12, 6)
    theirs = layers(axis, 5.75, 3.75, 3.7, 1.0, [STUDENT if number in kept else TEACHER for number in range(12)])
    ours = layers(axis, 6.65, 0.85, 1.85, 1.0, [STUDENT] * 6)
    for number, end in zip(kept, ours, strict=True):
        arrow(axis, (theirs[number], 3.7), (end, 1.9), color=STUDENT)
    axis.text(7.55, 5.1, "teacher, frozen", ha="center", va="center", fontsize=TEXT, color=INK)
    axis.text(7.55, 0.4, "student: every second layer", ha="center", va="center", fontsize=TEXT, color=INK)
    arrow(axis, (5.0, 3.0), (5.7, 4.2))
    arrow(axis, (5.0, 2.6), (6.6, 1.35))

    for y, text, weight, place in (
        (4.0, "KL at\ntemperature 2", "5", (13.15, 4.0)),
        (2.275, "cosine of\nhidden states", "1", (12.98, 3.05)),
        (0.55, "masked LM", "2", (13.25, 1.6)),
    ):
        box(axis, 10.4, y, 2.2, 1.05, text, LOSS)
        arrow(axis, (12.6, y + 0.525), (13.42, 2.8 + 0.2 * (y - 2.275)))
        axis.text(*place, weight, fontsize=TEXT, fontweight="bold", color=INK, ha="center", va="center")
    arrow(axis, (9.5, 4.35), (10.4, 4.6))
    arrow(axis, (9.5, 4.15), (10.4, 3.1))
    for height in (4.25, 2.6, 1.1):
        arrow(axis, (8.5, 1.35), (10.4, height))

    box(axis, 13.45, 2.2, 1.4, 1.2, "weighted\nsum", LOSS)
    arrow(axis, (14.85, 2.8), (15.3, 2.8))
    box(axis, 15.3, 2.2, 1.3, 1.2, "student\nfolder", "#dcebfb")
    figure.savefig(out, dpi=100)


def read_table(page: Path) -> list[Run]:
    """Read the figures of the demo from the table of a page that has a column for the cross-entropy."""
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text("utf-8").splitlines()]
    start = next(number for number, cells in enumerate(table) if {"run", "cross-entropy"} <= set(cells))
    runs = []
    for cells in itertools.takewhile(bool, table[start + 2 :]):
        row = dict(zip(table[start], cells, strict=True))
        parameters = int(row["parameters"].replace(",", ""))
        runs.append(Run(row["run"], parameters, float(row["cross-entropy"]), float(row["accuracy"])))
    return runs


def read_comparison(file: Path) -> list[Run]:
    """Read the figures of a demo from its ``comparison.json``."""
    return [
        Run(run["label"], run["student_parameters"], run["after"]["val/nll"], run["after"]["val/accuracy"])
        for run in json.loads(file.read_text("utf-8"))["runs"]
    ]


def draw_demo(runs: list[Run], out: Path) -> None:
    """Draw cross-entropy, accuracy and parameters of the demo's runs as bars."""
    figure = Figure(figsize=(16, 1 + 0.78 * len(runs)), facecolor="white", layout="constrained")
    names = [run.name.replace(", ", "\n", 1) for run in runs]
    colors = [TEACHER if name.startswith("teacher") else STUDENT for name in names]
    for axis, title, values, form in zip(
        figure.subplots(1, 3, sharey=True),
        ("cross-entropy (nats)\nlower is better", "accuracy\nhigher is better", "parameters\nin millions"),
        ([run.cross_entropy for run in runs], [run.accuracy for run in runs], [run.parameters / 1e6 for run in runs]),
        ("{:.3f}", "{:.3f}", "{:.2f}"),
        strict=True,
    ):
        bars = axis.barh(names, values, color=colors, height=0.65)
        axis.bar_label(bars, [form.format(value) for value in values], padding=5, fontsize=TEXT, color=INK)
        axis.set_title(title, fontsize=TEXT, color=INK, loc="left")
        axis.set_xlim(0, 1.35 * max(values))
        axis.xaxis.set_visible(False)
        axis.tick_params(axis="y", length=0, labelsize=TEXT - 2, labelcolor=INK)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    draw_pipeline(DOCS / "pipeline.png")
    draw_demo(
        read_comparison(Path(sys.argv[1])) if sys.argv[1:] else read_table(DOCS / "results.md"),
        DOCS / "demo.png",
    )
