"""The plots of a report: score against size and latency, what is kept of the teacher, held-out loss over tokens."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox

from distilkit.report.medians import Score, ablation_row, averages, mean, mean_retention, retention
from distilkit.report.page import Plot
from distilkit.report.published import published_retention
from distilkit.report.run_tables import run_labels
from distilkit.report.tables import Roles, mean_columns, ordered_rows, ordered_tasks, row_parameters, task_label
from distilkit.summary import read_metrics

MAX_BARS = 7  # of one task: there are as many colours beside the baseline's
_LINE = 13  # points between the lines of names
_PUBLISHED = " (published)"  # behind the name of a published student
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
_GRAYS = ("#999999", "#c8c8c8", "#6a6a6a")  # of published students: one for each kind of task


class Point(NamedTuple):
    """A model in a plot: its place, and how far the value to the right may go."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def plain(text: str, *, width: int = 40) -> str:
    """Make a name safe for matplotlib, which reads dollars as formulas and hides what begins with an underscore."""
    short = text if len(text) <= width else text[: width - 1] + "…"
    short = short.replace("$", r"\$")
    return f" {short}" if short.startswith("_") else short


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def place_names(axis: Axes, points: Sequence[Point]) -> list[Bbox]:
    """Write each point's name beside it, where it covers no point, no range and no other name; return where they stand.

    Places nearer to the point come first, of the upper points those above it; from a farther one a line leads to it. The
    figure's layout must be final.
    """
    figure = axis.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame, taken = axis.get_window_extent(renderer), [box for point in points for box in _covered(axis, point)]
    placed: list[Bbox] = []
    middle, falling = (len(points) - 1) / 2, sorted(points, key=lambda point: -point.y)
    for rank, point in sorted(enumerate(falling), key=lambda item: abs(item[0] - middle)):  # lines do not cross so much
        note = axis.annotate(
            plain(point.name), (point.x, point.y), textcoords="offset points", xytext=(0, 0), fontsize=9, va="center"
        )
        best: tuple[float, tuple[int, int]] | None = None
        for offset in _offsets(upwards=rank <= middle):
            note.set(position=offset, horizontalalignment="left" if offset[0] > 0 else "right")
            box = note.get_window_extent(renderer)
            outside = max(0.0, frame.x0 - box.x0, box.x1 - frame.x1, frame.y0 - box.y0, box.y1 - frame.y1)
            covered = sum(_overlap(box, other) for other in (*taken, *placed)) + 100 * outside
            if best is None or covered < best[0]:
                best = covered, offset
            if covered == 0:
                break
        assert best is not None
        (right, up), line = best[1], {"arrowstyle": "-", "lw": 0.6, "color": "gray"}
        note.set(position=(right, up), horizontalalignment="left" if right > 0 else "right")
        placed.append(note.get_window_extent(renderer))
        if abs(up) > _LINE:
            axis.annotate("", (point.x, point.y), textcoords="offset points", xytext=(right, up), arrowprops=line)
    return placed


def _offsets(*, upwards: bool) -> Iterator[tuple[int, int]]:
    """Go through the places of a name, in points from its point: right and left of it, then line by line away."""
    for step in range(24):
        for way in ((1, -1) if upwards else (-1, 1)) if step else (0,):
            for side in (1, -1):
                yield side * (16 if step else 10), _LINE * step * way


def _covered(axis: Axes, point: Point) -> list[Bbox]:
    """Return what a point and its range cover, in pixels."""
    x, y = axis.transData.transform((point.x, point.y))
    boxes = [Bbox.from_bounds(x - 9, y - 9, 18, 18)]
    if point.low is not None and point.high is not None:
        (left, _), (right, _) = (axis.transData.transform((end, point.y)) for end in (point.low, point.high))
        boxes.append(Bbox.from_extents(left, y - 2, right, y + 2))
    return boxes


def _overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)


def draw_points(axis: Axes, points: Sequence[Point], roles: Roles) -> None:
    """Draw models as points, the teacher as a star, the baseline as a square, with bars where a range is known."""
    for point in points:
        marker = "*" if point.name == roles.teacher else "s" if point.name == roles.baseline else "o"
        colour = _COLOURS[{"*": 5, "s": 7, "o": 0}[marker]]
        axis.plot(point.x, point.y, marker, color=colour, markersize=15 if marker == "*" else 8)
        if point.low is not None and point.high is not None:
            axis.hlines(point.y, point.low, point.high, color=colour, linewidth=1)
    _finish(axis)
    axis.margins(x=0.2, y=0.2)


def _scatter(panels: Mapping[str, Sequence[Point]], roles: Roles, *, x: str, y: str) -> bytes:
    figure = Figure(figsize=(8 * min(len(panels), 2), 5 * math.ceil(len(panels) / 2)), layout="constrained")
    axes = figure.subplots(math.ceil(len(panels) / 2), min(len(panels), 2), squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, points) in zip(axes, panels.items(), strict=False):
        draw_points(axis, points, roles)
        axis.set(xlabel=x, ylabel=y, title=plain(title))
        axis.set_xlim(left=max(0.0, axis.get_xlim()[0]))
    figure.draw_without_rendering()  # names are placed where the points have come to lie
    figure.set_layout_engine("none")
    for axis, points in zip(axes, panels.values(), strict=False):
        place_names(axis, [point._replace(name=roles.label(point.name)) for point in points])
    return _png(figure)


def _score_axis(scores: Sequence[Score], roles: Roles) -> tuple[str, dict[str, float]]:
    """Return the label of the axis of scores, and each row's value: the first average that two rows have."""
    for average in averages(scores, *roles.anchors):
        values = {row: mean(scores, row, average.tasks) for row in ordered_rows(scores, roles)}
        finite = {row: 100 * value for row, value in values.items() if value is not None and math.isfinite(value)}
        if len(finite) > 1:
            label = task_label(average.label)
            unit = "%" if len(average.tasks) == 1 else f"%, {len(average.tasks)} tasks" if "GLUE" in label else "%"
            return f"{label} ({unit})", finite
    return "", {}


def _legend(roles: Roles) -> str:
    marks = [("star", roles.teacher), ("square", roles.baseline)]
    named = [f"{mark}: {name}" for mark, name in marks if name is not None]
    return f" ({', '.join(named)})" if named else ""


def quality_parameters(scores: Sequence[Score], roles: Roles) -> Plot | None:
    """Draw the average score against the number of parameters."""
    label, values = _score_axis(scores, roles)
    points = [Point(row, row_parameters(scores, row), value) for row, value in values.items()]
    if not points:
        return None
    largest = max(point.x for point in points)
    unit, name = (1e6, "parameters (millions)") if largest >= 1e6 else (1e3, "parameters (thousands)")
    panels = {"score against size": [point._replace(x=point.x / unit) for point in points]}
    caption = f"Average score against parameters{_legend(roles)}."
    return Plot(name="quality_parameters", caption=caption, png=_scatter(panels, roles, x=name, y=label))


def quality_latency(scores: Sequence[Score], timings: Sequence[Mapping[str, Any]], roles: Roles) -> Plot | None:
    """Draw the average score against the latency, one panel for each device and backend that was scored: int8 was not."""
    label, values = _score_axis(scores, roles)
    panels: dict[str, list[Point]] = {}
    for record in timings:
        if record["model"] in values and "latency_ms" in record and not record["backend"].endswith("int8"):
            ends = record.get("latency_ms_p10"), record.get("latency_ms_p90")
            point = Point(record["model"], record["latency_ms"], values[record["model"]], *ends)
            panels.setdefault(f"score against latency: {record['backend']}", []).append(point)
    panels = {title: points for title, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    x = "latency of one batch (ms), median, 10th to 90th percentile"
    sizes = " or ".join(dict.fromkeys(record["batch_sizes"].partition(" ")[0] for record in timings))
    caption = f"Average score against latency{f' at batch {sizes}' if sizes else ''}{_legend(roles)}."
    return Plot(name="quality_latency", caption=caption, png=_scatter(panels, roles, x=x, y=label))


def _kept_series(scores: Sequence[Score], roles: Roles, teacher: str) -> tuple[list[str], dict[str, list[float]]]:
    """Return the groups of bars, and for each row its bars, NaN where it has none."""
    theirs = {score.task for score in scores if score.row == teacher}
    tasks = [task for task in ordered_tasks(scores) if task in theirs]
    rows = [row for row in ordered_rows(scores, roles) if row != teacher]
    means = mean_columns(scores, *roles.anchors)[:1]
    series = {
        row: [retention(scores, row, teacher, task) for task in tasks]
        + [mean_retention(scores, row, teacher, average.tasks) for average in means]
        for row in rows
    }
    named = {score.task: score.published_task for score in scores if score.row == teacher}
    asked = [named[task] for task in tasks] + ["glue" if "GLUE" in average.label else "" for average in means]
    found = [published_retention(task) for task in asked]
    for name in dict.fromkeys(each[0] for each in found if each):
        series[name + _PUBLISHED] = [each[1] if each and each[0] == name else None for each in found]
    numbers = {
        row: [math.nan if value is None else value for value in values]
        for row, values in series.items()
        if any(value is not None for value in values)
    }
    return [task_label(task) for task in tasks] + [average.label for average in means], numbers


def drawn_rows(rows: Sequence[str], roles: Roles) -> list[str]:
    """Return the rows that have room, the baseline always among them."""
    without = [row for row in rows if row != roles.baseline]
    return [*without[: MAX_BARS - (roles.baseline in rows)], *(row for row in rows if row == roles.baseline)]


def retention_bars(scores: Sequence[Score], roles: Roles) -> Plot | None:
    """Draw what each row keeps of the teacher as a group of bars for each task, the published figures last.

    The rows of an ablation, which have a table of their own, are left out where there are others.
    """
    if roles.teacher is None:
        return None
    groups, series = _kept_series(scores, roles, roles.teacher)
    theirs = [row for row in series if row.endswith(_PUBLISHED)]
    ours = [row for row in series if row not in theirs]
    ours = [row for row in ours if ablation_row(row) is None] or ours
    if not ours:
        return None
    drawn = drawn_rows(ours, roles) + theirs
    bars: dict[str, list[tuple[float, float]]] = {row: [] for row in drawn}  # places from the top, and values
    ticks, place = [], 0.0
    for index in range(len(groups)):
        present = [row for row in drawn if not math.isnan(series[row][index])]
        for row in present:
            bars[row].append((place, series[row][index]))
            place += 1
        ticks.append(place - (len(present) + 1) / 2)
        place += 0.8
    figure = Figure(figsize=(10, 1.8 + 0.19 * place), layout="constrained")
    axis = figure.subplots()
    for index, row in enumerate(drawn):
        colour = _COLOURS[7 if row == roles.baseline else index] if row not in theirs else _GRAYS[theirs.index(row)]
        places, values = zip(*bars[row], strict=True) if bars[row] else ((), ())
        filled = axis.barh(places, values, height=0.85, color=colour, label=plain(row))
        for mark in axis.bar_label(filled, fmt="%.1f", padding=3, fontsize=8):
            mark.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # over the line at 100 %
    axis.axvline(100, color="black", linestyle="--", linewidth=1, label=plain(f"{roles.teacher} (teacher)"), zorder=0)
    axis.set_yticks(ticks, [plain(group) for group in groups])
    axis.set_ylim(place - 0.8, -0.8)
    highest = max((value for row in drawn for _, value in bars[row]), default=100.0)
    axis.set(xlabel="share of the teacher's score (%)", xlim=(0, max(115, 1.1 * highest)))
    _finish(axis)
    axis.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    left_out = f" {MAX_BARS} of {len(ours)} rows." if len(ours) > MAX_BARS else ""
    caption = (
        f"What is kept of {roles.teacher} on each task; published students keep it of their own teachers.{left_out}"
    )
    return Plot(name="retention", caption=caption, png=_png(figure))


def _curves(run: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Read a run's held-out cross-entropy and its teacher's over tokens."""
    file = Path(run["folder"]) / "metrics.csv"
    if not file.is_file():
        return {}
    per_step = run["tokens_seen"] / max(1, run.get("optimizer_steps") or 1)
    metrics = read_metrics(file)
    return {
        name: [(step * per_step, value) for step, value in metrics[name]]
        for name in ("val/nll", "val/teacher_nll")
        if name in metrics
    }


def loss_curves(runs: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Draw the held-out cross-entropy of all runs over the tokens that they were trained on, their teachers' dashed."""
    curves = {label: _curves(run) for label, run in zip(run_labels(runs), runs, strict=True)}
    curves = {label: found for label, found in curves.items() if "val/nll" in found}
    if not curves:
        return None
    figure = Figure(figsize=(11, 4 + 0.12 * len(curves)), layout="constrained")
    axis = figure.subplots()
    teachers: set[float] = set()
    for index, (label, found) in enumerate(curves.items()):
        colour, style = _COLOURS[index % len(_COLOURS)], ("-", "--", "-.", ":")[index // len(_COLOURS) % 4]
        axis.plot(
            *zip(*found["val/nll"], strict=True), style, color=colour, marker="o", markersize=4, label=plain(label)
        )
        level = round(found["val/teacher_nll"][-1][1], 3) if "val/teacher_nll" in found else None
        if level is not None:
            teachers.add(level)
    for index, level in enumerate(sorted(teachers)):
        axis.axhline(level, color="gray", linestyle="--", linewidth=1, label=None if index else "a teacher")
    axis.set(xlabel="tokens trained on", ylabel="held-out cross-entropy (nats per labelled token)")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(axis)
    figure.legend(loc="outside right upper", frameon=False)
    caption = "Held-out cross-entropy of each training run over tokens."
    return Plot(name="held_out_loss", caption=caption, png=_png(figure))
