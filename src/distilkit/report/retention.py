"""What each model keeps of its teacher: percent of the teacher's score on each task and on average."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from distilkit.report.ablation import ablation_row
from distilkit.report.drawing import COLOURS, WIDTH, finish, plain, png
from distilkit.report.frame import Scores, task_label
from distilkit.report.page import Plot, Table, figure
from distilkit.report.published import published_retention, published_task
from distilkit.report.quality import task_header

MAX_BARS = 7  # of one task: COLOURS has as many colours and the baseline's
_PUBLISHED = " (published)"  # behind the name of a published student
_GRAYS = ("#999999", "#c8c8c8", "#6a6a6a")  # of published students: one for each kind of task


def _kept(scores: Scores, averages: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float | None]]:
    """Return the percentages that rows keep: of the averages, then of the teacher's tasks; empty rows are left out."""
    shares = {**averages, **{task: (task,) for task in scores.of(scores.teacher)}}
    kept = {row: {name: scores.kept(row, *tasks) for name, tasks in shares.items()} for row in scores.rows}
    return {row: each for row, each in kept.items() if row != scores.teacher and set(each.values()) - {None}}


def retention_table(scores: Scores) -> Table | None:
    """Build the table of what each row keeps of the teacher on each task and on average, in percent."""
    kept = _kept(scores, scores.columns)
    rows = [[scores.label(row), *map(figure, values.values())] for row, values in kept.items()]
    found = [(row, task, value) for row, values in kept.items() for task, value in values.items() if value is not None]
    records = [{"model": row, "teacher": scores.teacher, "task": task, "percent": value} for row, task, value in found]
    if not rows:
        return None
    first = f"Percent of the score of {scores.teacher}; for a perplexity the teacher's divided by the student's."
    first += " On average: the ratio of the averages, as in the paper." if scores.columns else ""
    header = ["model", *scores.columns, *(task_header(scores, task) for task in scores.of(scores.teacher))]
    notes, title = [first, *_uncompared(scores), *verdicts(scores)], "What is kept of the teacher"
    return Table(name="retention", title=title, header=header, rows=rows, records=records, notes=notes)


def verdicts(scores: Scores) -> list[str]:
    """Describe whether each student keeps more than the baseline, over the first average or task that both have."""
    teacher, baseline, lines = scores.teacher, scores.baseline, []
    if teacher is None or baseline is None:
        return []
    for row in [row for row in scores.rows if row not in (teacher, baseline)]:
        three = scores.only(teacher, row, baseline)
        percents = _kept(three, three.averages(row))
        both = zip(percents.get(row, {}).items(), percents.get(baseline, {}).values(), strict=False)
        found = [(name, kept, base) for (name, kept), base in both if kept is not None and base is not None]
        if not found or np.isnan(found[0][1] + found[0][2]):
            continue
        name, kept, base = found[0]
        over = "the GLUE average" if name == "GLUE average" else task_label(name)
        more = f"{row if kept > base else baseline} keeps more, by {abs(kept - base):.1f} points"
        theirs = f"{baseline}, which was trained without a teacher, keeps {base:.1f} %"
        more = more if kept != base else "both keep the same"
        lines.append(f"On {over} {row} keeps {kept:.1f} % of {teacher}. {theirs}: {more}.")
    return lines


def _uncompared(scores: Scores) -> list[str]:
    """Describe which rows cannot be compared with the teacher on a task, and why."""
    notes, teacher = [], scores.teacher
    for score in scores.frame[scores.frame["metric"] == ""].itertuples(index=False):
        differing, where = scores.unlike(score.row, score.task), f"{score.row} on {task_label(score.task)}"
        pairs = (f"{name} ({str(one)[:60]}, not {str(other)[:60]})" for name, (one, other) in differing.items())
        if differing and scores.kept(score.row, score.task) is not None:
            notes.append(f"{where}: by the perplexity per word, because its tokenizer is not that of {teacher}.")
        elif differing:
            notes.append(f"{where} is not compared, because it differs from {teacher} in {', '.join(pairs)}.")
        elif score.row.startswith(f"{teacher} (") and scores.line(teacher, score.task) is None:
            why = f"Without held-out scores none of them is chosen; set teacher={score.row!r} or remove the others."
            notes.append(f"{score.row} is one of several settings of {teacher} on {task_label(score.task)}. {why}")
    return notes


def nothing_kept(scores: Scores) -> str | None:
    """Describe why there is no table although the teacher and other rows are known."""
    if scores.teacher is None or all(row == scores.teacher for row in scores.rows):
        return None
    why = _uncompared(scores) or ["No other row has a score on a task on which the teacher has one above zero."]
    return " ".join([f"What is kept of {scores.teacher} is left out.", *why])


def _bars(scores: Scores) -> pd.DataFrame:
    """Return the bars: a line for each task and the first average, a column for each row. Published rows come last."""
    tasks, means = scores.of(scores.teacher), list(scores.columns)[:1]
    bars = pd.DataFrame(_kept(scores, scores.columns), index=[*tasks, *means], dtype=float)
    keys = {task: published_task(line) for task, line in tasks.items()}
    for name, key in (keys | {label: "glue" for label in means if "GLUE" in label}).items():
        if found := published_retention(key):
            bars.loc[name, found[0] + _PUBLISHED] = found[1]
    return bars


def retention_plot(scores: Scores) -> Plot | None:
    """Plot what each row keeps as bars for each task, published rows last, an ablation's only without others."""
    kept = _bars(scores)
    theirs = [row for row in kept if row.endswith(_PUBLISHED)]
    ours = [row for row in kept if row not in theirs]
    ours = [row for row in ours if ablation_row(row) is None] or ours
    if not ours:
        return None
    last = [row for row in ours if row == scores.baseline]  # always has room
    drawn = [*[row for row in ours if row not in last][: MAX_BARS - len(last)], *last, *theirs]
    values = kept[drawn].to_numpy().T  # (rows, groups)
    there = ~np.isnan(values)
    sizes = there.sum(axis=0)
    tops = sizes.cumsum() - sizes + 0.8 * np.arange(len(sizes))  # each bar is 1 high, each gap 0.8
    places, height = tops + there.cumsum(axis=0) - 1, sizes.sum() + 0.8 * len(sizes)
    picture = Figure(figsize=(WIDTH, 2 + 0.19 * height), layout="constrained")
    axis = picture.subplots()
    for index, row in enumerate(drawn):
        colour = COLOURS[7 if row == scores.baseline else index] if row not in theirs else _GRAYS[theirs.index(row)]
        place, width = places[index, there[index]], values[index, there[index]]
        bars = axis.barh(place, width, height=0.85, color=colour, label=plain(row))
        for mark in axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8):
            mark.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # over the line at 100 %
    axis.axvline(100, color="black", linestyle="--", linewidth=1, label=plain(f"{scores.teacher} (teacher)"), zorder=0)
    axis.set_yticks(tops + (sizes - 1) / 2, [plain(task_label(name)) for name in kept.index])
    right = max(115, 1.1 * np.nanmax(values, initial=100))
    axis.set(xlabel="share of the teacher's score (%)", xlim=(0, right), ylim=(height - 0.8, -0.8))
    finish(axis)
    axis.grid(visible=False, axis="y")
    picture.legend(loc="outside upper center", ncols=2, frameon=False)
    left_out = f" {MAX_BARS} of {len(ours)} rows." if len(ours) > MAX_BARS else ""
    caption = f"What is kept of {scores.teacher} on each task; published students: of their own teachers.{left_out}"
    return Plot(name="retention", caption=caption, png=png(picture))
