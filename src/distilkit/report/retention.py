"""What each model keeps of its teacher: percent of the teacher's score on each task and on average."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from distilkit.report.ablation import ablation_row
from distilkit.report.drawing import COLOURS, WIDTH, finish, plain, png
from distilkit.report.frame import TOKENIZER, Scores, task_label
from distilkit.report.page import Plot, Table, figure
from distilkit.report.published import published_retention, published_task
from distilkit.report.quality import task_header

MAX_BARS = 7  # of one task: COLOURS has as many colours and the baseline's
_PUBLISHED = " (published)"  # behind the name of a published student
_GRAYS = ("#999999", "#c8c8c8", "#6a6a6a")  # of published students: one for each kind of task


def _teacher_tasks(scores: Scores) -> list[str]:
    return [task for task in scores.tasks if scores.line(scores.teacher, task)]


def retention_table(scores: Scores) -> Table | None:
    """Build the table of what each row keeps of the teacher on each task and on average, in percent."""
    tasks, rows = _teacher_tasks(scores), []
    records: list[dict[str, Any]] = []
    for row in scores.rows:
        values = {label: scores.mean_kept(row, own) for label, own in scores.columns.items()}
        values |= {task: scores.kept(row, task) for task in tasks}
        about = {"model": row, "teacher": scores.teacher}
        found = [about | {"task": task, "percent": value} for task, value in values.items() if value is not None]
        if row != scores.teacher and found:
            rows.append([scores.label(row), *map(figure, values.values())])
            records += found
    if not rows:
        return None
    first = f"Percent of the score of {scores.teacher}; for a perplexity the teacher's divided by the student's."
    first += " On average: the ratio of the averages, as in the paper." if scores.columns else ""
    header = ["model", *scores.columns, *(task_header(scores, task) for task in tasks)]
    notes, title = [first, *_uncompared(scores), *verdicts(scores)], "What is kept of the teacher"
    return Table(name="retention", title=title, header=header, rows=rows, records=records, notes=notes)


def _compared(scores: Scores, row: str, baseline: str) -> tuple[str, float, float] | None:
    """Return what both rows keep, and over what: the first average that both have, or else the first task."""
    mine = scores.only(str(scores.teacher), row, baseline)
    for label, tasks in mine.averages(row).items():
        kept, base = mine.mean_kept(row, tasks), mine.mean_kept(baseline, tasks)
        if kept is not None and base is not None:
            return "the GLUE average" if label == "GLUE average" else task_label(label), kept, base
    for task in mine.tasks:
        kept, base = mine.kept(row, task), mine.kept(baseline, task)
        if kept is not None and base is not None:
            return task_label(task), kept, base
    return None


def verdicts(scores: Scores) -> list[str]:
    """Describe for each student whether it keeps more of the teacher than the baseline does."""
    teacher, baseline, lines = scores.teacher, scores.baseline, []
    if teacher is None or baseline is None:
        return []
    for row in scores.rows:
        found = _compared(scores, row, baseline) if row not in (teacher, baseline) else None
        if found is None or math.isnan(found[1] + found[2]):
            continue
        over, kept, base = found
        more = f"{row if kept > base else baseline} keeps more, by {abs(kept - base):.1f} points"
        lines.append(
            f"On {over} {row} keeps {kept:.1f} % of {teacher}. {baseline}, which was trained without a teacher, keeps "
            f"{base:.1f} %: {more if kept != base else 'both keep the same'}."
        )
    return lines


def _uncompared(scores: Scores) -> list[str]:
    """Describe which rows cannot be compared with the teacher on a task, and why."""
    notes, teacher = [], str(scores.teacher)
    for score in scores.frame[scores.frame["metric"] == ""].itertuples(index=False):
        differing, known = scores.unlike(score.row, score.task), scores.line(teacher, score.task)
        line = f"{score.row} on {task_label(score.task)}"
        if differing and differing.keys() <= TOKENIZER and scores.kept(score.row, score.task) is not None:
            notes.append(f"{line}: by the perplexity per word, because its tokenizer is not that of {teacher}.")
        elif differing:
            pairs = (f"{name} ({str(one)[:60]}, not {str(other)[:60]})" for name, (one, other) in differing.items())
            notes.append(f"{line} is not compared, because it differs from {teacher} in {', '.join(pairs)}.")
        elif score.row.startswith(f"{teacher} (") and known is None:
            notes.append(
                f"{score.row} is one of several settings of {teacher} on {task_label(score.task)}. Without held-out scores "
                f"it is not known which one counts; set teacher={score.row!r} or remove the others."
            )
    return notes


def nothing_kept(scores: Scores) -> str | None:
    """Describe why there is no table although the teacher and other rows are known."""
    if scores.teacher is None or all(row == scores.teacher for row in scores.rows):
        return None
    why = _uncompared(scores) or ["No other row has a score on a task on which the teacher has one above zero."]
    return " ".join([f"What is kept of {scores.teacher} is left out.", *why])


def drawn_rows(rows: Sequence[str], baseline: str | None) -> list[str]:
    """Return the rows that have room in the plot, always with the baseline."""
    without = [row for row in rows if row != baseline]
    return [*without[: MAX_BARS - (baseline in rows)], *(row for row in rows if row == baseline)]


def _series(scores: Scores) -> tuple[list[str], dict[str, list[float]]]:
    """Return the groups of bars, and for each row its bars: NaN for a missing one. Published rows come last."""
    tasks, means = _teacher_tasks(scores), dict(list(scores.columns.items())[:1])
    series = {
        row: [scores.kept(row, task) for task in tasks] + [scores.mean_kept(row, own) for own in means.values()]
        for row in scores.rows
        if row != scores.teacher
    }
    keys = [published_task(scores.line(scores.teacher, task)) for task in tasks]
    found = [published_retention(key) for key in [*keys, *("glue" if "GLUE" in label else "" for label in means)]]
    for name in dict.fromkeys(each[0] for each in found if each):
        series[name + _PUBLISHED] = [each[1] if each and each[0] == name else None for each in found]
    given = {row: values for row, values in series.items() if any(value is not None for value in values)}
    numbers = {row: [math.nan if each is None else each for each in values] for row, values in given.items()}
    return [*map(task_label, tasks), *means], numbers


def retention_plot(scores: Scores) -> Plot | None:
    """Plot what each row keeps of the teacher as a group of bars for each task, the published figures last.

    The rows of an ablation have a table of their own, and are left out if there are others.
    """
    groups, series = _series(scores) if scores.teacher is not None else ([], {})
    theirs = [row for row in series if row.endswith(_PUBLISHED)]
    ours = [row for row in series if row not in theirs]
    ours = [row for row in ours if ablation_row(row) is None] or ours
    if not ours:
        return None
    drawn = drawn_rows(ours, scores.baseline) + theirs
    number = sum(not math.isnan(value) for row in drawn for value in series[row])
    picture = Figure(figsize=(WIDTH, 2 + 0.19 * (number + 0.8 * len(groups))), layout="constrained")
    axis = picture.subplots()
    present = [[row for row in drawn if not math.isnan(series[row][index])] for index in range(len(groups))]
    tops = [sum(map(len, present[:index])) + 0.8 * index for index in range(len(groups))]  # each bar is 1 high
    for index, row in enumerate(drawn):
        colour = COLOURS[7 if row == scores.baseline else index] if row not in theirs else _GRAYS[theirs.index(row)]
        mine = [group for group in range(len(groups)) if row in present[group]]
        places, values = (
            [tops[group] + present[group].index(row) for group in mine],
            [series[row][group] for group in mine],
        )
        bars = axis.barh(places, values, height=0.85, color=colour, label=plain(row))
        for mark in axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8):
            mark.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # over the line at 100 %
    axis.axvline(100, color="black", linestyle="--", linewidth=1, label=plain(f"{scores.teacher} (teacher)"), zorder=0)
    middles = [top + (len(rows) - 1) / 2 for top, rows in zip(tops, present, strict=True)]
    axis.set_yticks(middles, [plain(group) for group in groups])
    highest = max((value for row in drawn for value in series[row] if not math.isnan(value)), default=100.0)
    axis.set(xlabel="share of the teacher's score (%)", xlim=(0, max(115, 1.1 * highest)))
    axis.set_ylim(number + 0.8 * len(groups) - 0.8, -0.8)
    finish(axis)
    axis.grid(visible=False, axis="y")
    picture.legend(loc="outside upper center", ncols=2, frameon=False)
    left_out = f" {MAX_BARS} of {len(ours)} rows." if len(ours) > MAX_BARS else ""
    caption = f"What is kept of {scores.teacher} on each task; published students: of their own teachers.{left_out}"
    return Plot(name="retention", caption=caption, png=png(picture))
