"""From scores to tables: quality, what is kept of the teacher, each metric."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distilkit.records import Result
from distilkit.report.medians import (
    TOKENIZER,
    Average,
    Score,
    Spread,
    averages,
    cell,
    choose,
    mean,
    mean_retention,
    retention,
    unlike,
)
from distilkit.report.page import Table, markdown_table
from distilkit.report.published import GLUE_TASKS

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
    "perplexity": "perplexity",
    "pseudo_perplexity": "pseudo-perplexity",
}
_PLAIN = re.compile(r"perplexity|nll|loss|entropy|bits|seconds|tokens", re.IGNORECASE)  # metrics that are no shares


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which row is the teacher, and which the student that was trained without one."""

    teacher: str | None
    baseline: str | None

    @property
    def anchors(self) -> tuple[str | None, str | None]:
        """The rows whose tasks averages are taken over."""
        return self.teacher, self.baseline

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


def mean_columns(scores: Sequence[Score], *anchors: str | None) -> list[Average]:
    """Return the averages that are worth a column: a task alone has its own."""
    return [average for average in averages(scores, *anchors) if len(average.tasks) > 1]


def row_parameters(scores: Sequence[Score], row: str) -> int:
    """Return a row's number of parameters, of its first task: heads differ from task to task."""
    mine = [score for score in scores if score.row == row]
    return next(score.results[0].parameters for task in ordered_tasks(mine) for score in mine if score.task == task)


def limit_notes(scores: Sequence[Score]) -> list[str]:
    """Say of each task on which of its rows models were trained and scored, where these were limited."""
    notes = []
    for task in ordered_tasks(scores):
        mine = [score for score in scores if score.task == task]
        first = {score.row: score.results[0] for score in mine}
        if not any(name in each.settings for each in first.values() for name in ("max_train_rows", "max_scored_rows")):
            continue
        names = [
            name for name in ("epochs", "lr") if len({str(each.settings.get(name)) for each in first.values()}) > 1
        ]
        said: dict[str, list[str]] = {}
        for row, each in first.items():
            scored = ", ".join(f"{number:,} of {split}" for split, number in each.details.get("rows", {}).items())
            text = f"trained on {each.details.get('train_rows', 0):,} rows, scored on {scored or 'some'}"
            said.setdefault(text + "".join(f", {name}={each.settings.get(name)}" for name in names), []).append(row)
        parts = "; ".join(f"{text} ({', '.join(rows)})" for text, rows in said.items())
        notes.append(f"{task_label(task)} on a part of its rows: {parts}.")
    return notes


def _range(each: Spread, *, share: bool) -> str:
    return f"{shown(each.lowest, share=share)} to {shown(each.highest, share=share)}"


def quality(scores: Sequence[Score], roles: Roles) -> Table | None:
    """Lay out each row's median on each task, in percent, perplexities as they are, with averages and parameters."""
    if not scores:
        return None
    tasks, means, rows, records, notes = ordered_tasks(scores), mean_columns(scores, *roles.anchors), [], [], []
    for row in ordered_rows(scores, roles):
        mine = {task: score for task in tasks if (score := cell(scores, row, task))}
        parameters = row_parameters(scores, row)
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
        notes=[first, *limit_notes(scores), *notes],
    )


def _kept_by(scores: Sequence[Score], rows: Sequence[str], teacher: str) -> tuple[str, list[float]] | None:
    """Return what each row keeps, and over what: the first average that all have, or else the first task."""
    mine = [score for score in scores if score.row in (teacher, *rows)]
    for average in averages(mine, teacher, *rows):
        kept = [mean_retention(mine, row, teacher, average.tasks) for row in rows]
        if None not in kept:
            over = task_label(average.label) if len(average.tasks) == 1 else f"the {average.label}"
            return over.replace("the average", "average"), [each for each in kept if each is not None]
    for task in ordered_tasks(mine):
        kept = [retention(mine, row, teacher, task) for row in rows]
        if None not in kept:
            return task_label(task), [each for each in kept if each is not None]
    return None


def verdicts(scores: Sequence[Score], roles: Roles) -> list[str]:
    """Say of each student whether it keeps more of the teacher than the baseline does."""
    if roles.teacher is None or roles.baseline is None:
        return []
    lines = []
    for row in ordered_rows(scores, roles):
        if row in (roles.teacher, roles.baseline):
            continue
        found = _kept_by(scores, [row, roles.baseline], roles.teacher)
        if found is None or math.isnan(sum(found[1])):
            continue
        over, (kept, base) = found
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
        mean_columns(scores, *roles.anchors),
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
        notes=[first, *uncompared(scores, teacher), *verdicts(scores, roles)],
    )


def uncompared(scores: Sequence[Score], teacher: str) -> list[str]:
    """Say which rows cannot be compared with the teacher on a task, and why."""
    notes = []
    for score in scores:
        theirs = cell(scores, teacher, score.task)
        differing = unlike(score, theirs) if theirs is not None else {}
        line = f"{score.row} on {task_label(score.task)}"
        if (
            differing
            and differing.keys() <= TOKENIZER
            and retention(scores, score.row, teacher, score.task) is not None
        ):
            notes.append(f"{line}: by the perplexity per word, for its tokenizer is not that of {teacher}.")
        elif differing:
            pairs = (f"{name} ({str(one)[:60]}, not {str(other)[:60]})" for name, (one, other) in differing.items())
            notes.append(f"{line} is not compared, for it differs from {teacher} in {', '.join(pairs)}.")
        elif score.row.startswith(f"{teacher} (") and theirs is None:
            notes.append(
                f"{score.row} is one of several settings of {teacher} on {task_label(score.task)}, and which counts is not "
                f"known without held-out scores; set teacher={score.row!r} or remove the others."
            )
    return notes


def nothing_kept(scores: Sequence[Score], roles: Roles) -> str | None:
    """Say why there is no table of what is kept, where the teacher is known and other rows are."""
    if roles.teacher is None or all(score.row == roles.teacher for score in scores):
        return None
    why = uncompared(scores, roles.teacher) or ["No other row has a score on a task on which it has one above zero."]
    return " ".join([f"What is kept of {roles.teacher} is left out.", *why])


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
    return Table(name="each_metric", title="Each metric", header=header, rows=rows, records=records) if rows else None


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
        for average in mean_columns(mine):
            value = shown(mean(mine, row, average.tasks), share=True)
            lines.append([*([row] if several else []), average.label, value, "-", "-", "-"])
    header = [*(["model"] if several else []), "task", "score", "seeds", "lowest to highest", "metrics"]
    return markdown_table(header, lines)
