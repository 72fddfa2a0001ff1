"""What the plots of a report share: colours, names that are safe to draw, and scatter plots of models."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from distilkit.report.frame import Scores

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
WIDTH = 6.5  # inches: the text stays readable on a phone


class Point(NamedTuple):
    """A model in a plot: its place, and the ranges of its x and y."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    bottom: float | None = None
    top: float | None = None


def plain(text: str, *, width: int = 40) -> str:
    """Make a name safe for matplotlib, which reads dollars as formulas and hides what begins with an underscore."""
    short = (text if len(text) <= width else text[: width - 1] + "…").replace("$", r"\$")
    return f" {short}" if short.startswith("_") else short


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def finish(axis: Axes) -> None:
    """Draw the grid behind the data, and no frame above and to the right."""
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def scatter(panels: Mapping[str, Sequence[Point]], scores: Scores, *, x: str, y: str) -> Figure:
    """Draw models as points, one panel below the other; the legend lists them from the highest point to the lowest."""
    heights = {point.name: point.y for points in panels.values() for point in points}
    names = sorted(heights, key=lambda name: -heights[name])
    looks = {scores.teacher: ("*", COLOURS[5], 15), scores.baseline: ("s", COLOURS[7], 8)}  # marker, hue and size
    others = itertools.cycle((marker, hue, 8) for marker in "oDv^P" for hue in (*COLOURS[:5], COLOURS[6]))
    ordered = dict.fromkeys([*(row for row in scores.rows if row in heights), *names])  # colours as in other plots
    looks |= {name: next(others) for name in ordered if name not in looks}
    figure = Figure(figsize=(WIDTH, 4.2 * len(panels) + 0.11 * len(names)))
    figure.set_layout_engine("constrained", h_pad=0.12)
    for axis, (title, points) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        places: list[tuple[float, float]] = []
        for point in sorted(points, key=lambda point: names.index(point.name)):
            marker, colour, size = looks[point.name]
            beside = 9 * places.count(place := (point.x, point.y))  # equal places stand side by side
            places.append(place)
            moved = {"transform": offset_copy(axis.transData, figure, x=beside, units="points")} if beside else {}
            label = plain(scores.label(point.name))
            axis.plot(*place, marker, color=colour, markersize=size, alpha=0.8, label=label, **moved)
            if point.low is not None and point.high is not None:
                axis.hlines(point.y, point.low, point.high, color=colour, linewidth=1)
            if point.bottom is not None and point.top is not None:
                axis.vlines(point.x, point.bottom, point.top, color=colour, linewidth=1, **moved)
        finish(axis)
        axis.margins(x=0.1, y=0.1)
        axis.set(xlabel=x, ylabel=y, title=plain(title))
        axis.set_xlim(left=max(0.0, axis.get_xlim()[0]))
    handles = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
    labels = [plain(scores.label(name)) for name in names]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=2, frameon=False)
    return figure
