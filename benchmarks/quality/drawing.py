"""The two plots: what each row keeps, and what is kept after so many tokens."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from distilkit.report.drawing import COLOURS, WIDTH, finish, plain, png
from distilkit.report.frame import task_label

_WITHOUT = ("cut", "lm", "lm_30")  # rows without a teacher
_PLAIN, _TAUGHT = COLOURS[7], COLOURS[0]


def draw_rows(records: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> bytes:
    """Draw each row's held-out cross-entropy and what it keeps of the teacher, with intervals; the best stands above."""
    panels = [("masked_cross_entropy", "held-out cross-entropy\n(nats)")]
    names = ", ".join(map(task_label, tasks))
    panels += [
        ("kept", f"mean of {names}\n(% of the teacher's)"),
        ("kept_cosine", "STS-B by cosine\n(% of the teacher's)"),
    ]
    teacher = next((each for each in records if each["row"] == "teacher"), {})
    rows = [
        each for each in records if each["row"] != "teacher" and any(each.get(key) is not None for key, _ in panels)
    ]
    rows.sort(key=lambda each: -each["masked_cross_entropy"] if each["masked_cross_entropy"] is not None else -1e9)
    panels = [panel for panel in panels if any(each.get(panel[0]) is not None for each in rows)]
    figure = Figure(figsize=(1.3 * WIDTH, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axis, (key, label) in zip(axes, panels, strict=False):
        limit = (
            _limit([row[key] for row in rows if row.get(key) is not None]) if key == "masked_cross_entropy" else None
        )
        for place, row in enumerate(rows):
            colour, marker = (_PLAIN, "s") if row["row"] in _WITHOUT else (_TAUGHT, "o")
            if (value := row.get(key)) is None:
                continue
            if limit is not None and value > limit:
                axis.plot(limit, place, ">", color=colour, markersize=6)
                axis.annotate(
                    f"{value:.1f}", (limit, place), (-7, 0), textcoords="offset points", ha="right", va="center"
                )
                continue
            axis.plot(value, place, marker, color=colour, markersize=6)
            if range_ := row.get(f"{key}_interval"):
                axis.hlines(place, range_[0], range_[1], color=colour, linewidth=1.5)
        whole = teacher.get(key) if key == "masked_cross_entropy" else 100
        if whole is not None:
            axis.axvline(whole, color=COLOURS[5], linestyle="--", linewidth=1.2, zorder=0)
        axis.set_xlabel(label)
        axis.margins(x=0.08)
        finish(axis)
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(rows)), [plain(str(row["row"])) for row in rows])
    axes[0].set_ylim(-0.6, len(rows) - 0.4)
    looks: Any = [({"marker": "o", "color": _TAUGHT}, "with a teacher"), ({"marker": "s", "color": _PLAIN}, "without")]
    handles = [axes[0].plot([], [], linestyle="none", **look, label=label)[0] for look, label in looks]
    handles += axes[0].plot([], [], color=COLOURS[5], linestyle="--", label="the teacher")
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return png(figure)


def _limit(values: Sequence[float]) -> float | None:
    """Return where the axis ends, so that a few far values do not hide the differences of the others."""
    usual = 2.5 * (statistics.median(values) - min(values))
    return min(values) + usual if 0 < usual < (max(values) - min(values)) / 1.5 else None


def draw_curve(points: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw held-out cross-entropy, masked accuracy and STS-B by cosine over tokens; ``records`` give teacher and cut."""
    panels = [("masked_cross_entropy", "nll_interval", "held-out cross-entropy (nats)")]
    panels += [("kept_accuracy", "", "accuracy on held-out text\n(% of the teacher's)")]
    panels += [("kept_cosine", "kept_cosine_interval", "STS-B by cosine\n(% of the teacher's)")]
    panels = [panel for panel in panels if any(point[panel[0]] is not None for point in points)]
    teacher, cut = (next((each for each in records if each["row"] == name), {}) for name in ("teacher", "cut"))
    figure = Figure(figsize=(1.3 * WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, ends, label) in zip(axes, panels, strict=True):
        for index, name in enumerate(sorted({point["row"] for point in points}, key=lambda name: name in _WITHOUT)):
            own = [point for point in points if point["row"] == name and point[key] is not None]
            colour, marker = (_PLAIN, "s") if name in _WITHOUT else (COLOURS[index], "o")
            x, y = [point["tokens"] / 1e6 for point in own], [point[key] for point in own]
            axis.plot(x, y, f"{marker}-", color=colour, markersize=5, label=plain(str(name)))
            for place, point in zip(x, own, strict=True):
                if ends and point[ends]:
                    axis.vlines(place, *point[ends], color=colour, linewidth=1.2)
        level = teacher.get(key) if key == "masked_cross_entropy" else 100
        if level is not None:
            axis.axhline(level, color=COLOURS[5], linestyle="--", linewidth=1.2, label="the teacher", zorder=0)
        if cut.get(key) is not None:
            axis.axhline(cut[key], color="0.5", linestyle=":", linewidth=1.2, label="cut, not trained", zorder=0)
        axis.set_xscale("log")
        ticks = sorted({round(point["tokens"] / 1e6, 1) for point in points})
        axis.set_xticks(ticks)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set(xlabel="million tokens", title=label)
        axis.title.set_fontsize(10)
        finish(axis)
    handles = {str(line.get_label()): line for axis in axes for line in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return png(figure)
