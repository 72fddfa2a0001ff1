"""From scores to tables: quality, what is kept of the teacher, each metric."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distilkit.medians import (
    Average,
    Score,
    Spread,
    averages,
    cell,
    choose,
    mean,
    mean_retention,
    retention,
)
from distilkit.pages import Table, markdown_table
from distilkit.published import GLUE_TASKS
from distilkit.results import Result

LABELS = {
    "cola": "CoLA",
    "mnli": "MNLI",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "sst2": "SST-2",
    "stsb": "STS-B",
    "wnli": "WNLI",
    "imdb": "IMDb",
    "squad": "SQuAD",
    "xnli": "XNLI",
    "wikitext103": "WikiText-103",
    "perplexity": "perplexity",
    "pseudo_perplexity": "pseudo-perplexity",
}
_PLAIN = re.compile(r"perplexity|nll|loss|entropy|bits|seconds|tokens", re.IGNORECASE)  # metrics that are no shares


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which row is the teacher, and which the student that was trained without one."""

    teacher: str | None
    baseline: str | None

    def label(self, row: str) -> str:
        """Name a row with its role, unless its name says it."""
        role = "teacher" if row == self.teacher else "baseline" if row == self.baseline else row
        return row if role == row else f"{row} ({role})"


def figure(value: float | None, form: str = "{:.1f}") -> str:
    """Format a number, a dash where there is none."""
    return "-" if value is None else form.format(value)


def shown(value: float | None, *, share: bool) -> str:
    """Format a share or a correlation as a percentage with one decimal, anything else as it is with two."""
    return figure(100 * value if share and value is not None else value, "{:.1f}" if share else "{:,.2f}")


def task_label(task: str) -> str:
    """Name a task as the papers do."""
    return LABELS.get(task, task)


def ordered_rows(scores: Iterable[Score], roles: Roles) -> list[str]:
    """List the rows: the teacher first, then as they appear, the baseline last."""
    rows = dict.fromkeys(score.row for score in scores)
    return sorted(rows, key=lambda row: (row != roles.teacher, row == roles.baseline))


def ordered_tasks(scores: Iterable[Score]) -> list[str]:
    """List the tasks: those with known names in their usual order, then the others."""
    known = list(LABELS)
    tasks = dict.fromkeys(score.task for score in scores)
    return sorted(tasks, key=lambda task: known.index(task) if task in known else len(known))


def _task_header(scores: Sequence[Score], task: str) -> str:
    one = next(score for score in scores if score.task == task)
    label = task_label(task)
    return label if one.higher_is_better or "perplexity" in label else f"{label} perplexity"


def _mean_columns(scores: Sequence[Score]) -> list[Average]:
    """Return the averages that are worth a column: a task alone has its own."""
    return [average for average in averages(scores) if len(average.tasks) > 1]


def _range(each: Spread, *, share: bool) -> str:
    return f"{shown(each.lowest, share=share)} to {shown(each.highest, share=share)}"


def quality(scores: Sequence[Score], roles: Roles) -> Table | None:
    """Lay out each row's median on each task, in percent, perplexities as they are, with averages and parameters."""
    if not scores:
        return None
    tasks, means, rows, records, notes = ordered_tasks(scores), _mean_columns(scores), [], [], []
    for row in ordered_rows(scores, roles):
        mine = {task: score for task in tasks if (score := cell(scores, row, task))}
        parameters = next(iter(mine.values())).results[0].parameters
        rows.append(
            [roles.label(row), f"{parameters:,}"]
            + [shown(mean(scores, row, average.tasks), share=True) for average in means]
            + [shown(mine[task].median, share=mine[task].higher_is_better) if task in mine else "-" for task in tasks]
        )
        several = {task: score for task, score in mine.items() if score.spread.seeds > 1}
        if several:
            ranges = (
                f"{task_label(task)} {_range(score.spread, share=score.higher_is_better)} ({score.spread.seeds} seeds)"
                for task, score in several.items()
            )
            notes.append(f"{row}, lowest to highest: {', '.join(ranges)}.")
        for task, score in mine.items():
            settings = ", ".join(f"{name}={value}" for name, value in score.results[0].settings.items())
            record = {"model": row, "task": task, "score": score.median, "seeds": score.spread.seeds}
            record |= {"lowest": score.spread.lowest, "highest": score.spread.highest}
            records.append(record | {"parameters": parameters, "settings": settings})
        for average in means:
            value = mean(scores, row, average.tasks)
            if value is not None:
                records.append({"model": row, "task": average.label, "score": value, "parameters": parameters})
    header = ["model", "parameters", *(average.label for average in means)]
    first = "Medians over seeds. Shares and correlations are in percent, higher is better; of perplexities lower is."
    narrow = [average for average in means if average.tasks != GLUE_TASKS]
    first += "".join(f" {each.label}: {', '.join(map(task_label, each.tasks))}." for each in narrow)
    return Table(
        name="quality",
        title="Quality",
        header=header + [_task_header(scores, task) for task in tasks],
        rows=rows,
        records=records,
        notes=[first, *notes],
    )


def kept_by(scores: Sequence[Score], row: str, teacher: str) -> tuple[str, float] | None:
    """Return the one figure of what a row keeps, and over what: the average, or where there is none the first task."""
    for average in averages(scores):
        kept = mean_retention(scores, row, teacher, average.tasks)
        if kept is not None:
            over = task_label(average.label) if len(average.tasks) == 1 else f"the {average.label}"
            return over.replace("the average", "average"), kept
    for task in ordered_tasks(scores):
        kept = retention(scores, row, teacher, task)
        if kept is not None:
            return task_label(task), kept
    return None


def verdicts(scores: Sequence[Score], roles: Roles) -> list[str]:
    """Say of each student whether it keeps more of the teacher than the baseline does."""
    if roles.teacher is None or roles.baseline is None:
        return []
    lines = []
    for row in ordered_rows(scores, roles):
        if row in (roles.teacher, roles.baseline):
            continue
        mine, theirs = (kept_by(scores, each, roles.teacher) for each in (row, roles.baseline))
        if mine is None or theirs is None or mine[0] != theirs[0] or math.isnan(mine[1] - theirs[1]):
            continue
        (over, kept), (_, base) = mine, theirs
        by = f"by {abs(kept - base):.1f} points"
        which = f"{row} keeps more, {by}" if kept > base else f"{roles.baseline} keeps more, {by}"
        which = which if kept != base else "both keep the same"
        lines.append(
            f"On {over} {row} keeps {kept:.1f} % of {roles.teacher}, {roles.baseline}, which was trained without a "
            f"teacher, {base:.1f} %: {which}."
        )
    return lines


def kept(scores: Sequence[Score], roles: Roles) -> Table | None:
    """Lay out what each row keeps of the teacher on each task and on average, in percent."""
    teacher = roles.teacher
    if teacher is None:
        return None
    theirs = [score.task for score in scores if score.row == teacher]
    tasks, means, rows, records = (
        [task for task in ordered_tasks(scores) if task in theirs],
        _mean_columns(scores),
        [],
        [],
    )
    for row in ordered_rows(scores, roles):
        values = {average.label: mean_retention(scores, row, teacher, average.tasks) for average in means}
        values |= {task: retention(scores, row, teacher, task) for task in tasks}
        if row != teacher and any(value is not None for value in values.values()):
            rows.append([roles.label(row), *map(figure, values.values())])
            records += [
                {"model": row, "teacher": teacher, "task": task, "percent": value}
                for task, value in values.items()
                if value is not None
            ]
    if not rows:
        return None
    first = f"Percent of the score of {teacher}; for a perplexity the teacher's divided by the student's."
    first += " On average: the ratio of the averages, as the paper takes it." if means else ""
    return Table(
        name="retention",
        title="What is kept of the teacher",
        header=["model", *(average.label for average in means), *(_task_header(scores, task) for task in tasks)],
        rows=rows,
        records=records,
        notes=[first, *verdicts(scores, roles)],
    )


def metrics(scores: Sequence[Score], roles: Roles) -> Table | None:
    """Lay out each metric of each task: accuracy and F1, exact match, matched and mismatched, languages."""
    rows, records = [], []
    for row in ordered_rows(scores, roles):
        found = [cell(scores, row, task) for task in ordered_tasks(scores)]
        for score in (score for score in found if score is not None):
            for name, each in score.metrics().items():
                share = not _PLAIN.search(name)
                range_ = _range(each, share=share) if each.seeds > 1 else "-"
                first = [row, task_label(score.task), name]
                rows.append([*first, shown(each.median, share=share), str(each.seeds), range_])
                records.append({"model": row, "task": score.task, "metric": name} | each._asdict())
    header = ["model", "task", "metric", "median", "seeds", "lowest to highest"]
    return Table(name="metrics", title="Each metric", header=header, rows=rows, records=records) if rows else None


def results_markdown(results: Sequence[Result]) -> str:
    """Write the scores of one model as a markdown table, for its card; nothing where there is no score."""
    scores = choose(results)
    if not scores:
        return ""
    several = len({score.row for score in scores}) > 1
    lines = []
    for row in dict.fromkeys(score.row for score in scores):
        mine = [score for score in scores if score.row == row]
        for task in ordered_tasks(mine):
            score = next(each for each in mine if each.task == task)
            details = ", ".join(
                f"{name} {shown(each.median, share=not _PLAIN.search(name))}" for name, each in score.metrics().items()
            )
            range_ = _range(score.spread, share=score.higher_is_better) if score.spread.seeds > 1 else "-"
            value = shown(score.median, share=score.higher_is_better)
            lines.append(
                [*([row] if several else []), _task_header(mine, task), value, str(score.spread.seeds), range_, details]
            )
        for average in _mean_columns(mine):
            value = shown(mean(mine, row, average.tasks), share=True)
            lines.append([*([row] if several else []), average.label, value, "-", "-", "-"])
    header = [*(["model"] if several else []), "task", "score", "seeds", "lowest to highest", "metrics"]
    return markdown_table(header, lines)
