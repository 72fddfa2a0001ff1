"""The quality of each model: its score on each task, each metric, and its average against its size."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from distilkit.records import Result, read_results
from distilkit.report.drawing import Point, png, scatter
from distilkit.report.frame import GLUE_TASKS, Scores, gather, task_label
from distilkit.report.page import Plot, Table, markdown_table, print_table, shown

_NO_SHARE = re.compile(r"perplexity|nll|loss|entropy|bits|seconds|tokens", re.IGNORECASE)


def task_header(scores: Scores, task: str) -> str:
    """Return the heading of a task's column; it tells if lower scores are better."""
    share = next(line.share for row in scores.rows if (line := scores.line(row, task)))
    label = task_label(task)
    return label if share or "perplexity" in label else f"{label} perplexity"


def _shown(line: Any, *values: float) -> list[str]:
    """Format values of a score or a metric: shares in percent."""
    share = not _NO_SHARE.search(line.metric) if line.metric else line.share
    return [shown(value, share=share) for value in values]


def _median(line: Any) -> str:
    return _shown(line, line.median)[0]


def _range(line: Any) -> str:
    return " to ".join(_shown(line, line.lowest, line.highest)) if line.seeds > 1 else "-"


def limit_notes(scores: Scores, tasks: Sequence[str]) -> list[str]:
    """Describe for each task with limited rows on which of them models were trained and scored."""
    notes = []
    for task in tasks:
        first = {row: line for row in scores.frame["row"].unique() if (line := scores.line(row, task))}
        if not any(name in each.settings for each in first.values() for name in ("max_train_rows", "max_scored_rows")):
            continue
        names = [name for name in ("epochs", "lr") if len({str(e.settings.get(name)) for e in first.values()}) > 1]
        found: dict[str, list[str]] = {}
        for row, each in first.items():
            scored = ", ".join(f"{number:,} of {split}" for split, number in each.details.get("rows", {}).items())
            text = f"trained on {each.details.get('train_rows', 0):,} rows, scored on {scored or 'some'}"
            found.setdefault(text + "".join(f", {name}={each.settings.get(name)}" for name in names), []).append(row)
        parts = "; ".join(f"{text} ({', '.join(rows)})" for text, rows in found.items())
        notes.append(f"{task_label(task)} on a part of its rows: {parts}.")
    return notes


def quality_table(scores: Scores) -> Table | None:
    """Build the table of each row's median on each task, with averages and parameters."""
    rows, notes = [], []
    records: list[dict[str, Any]] = []
    for row in scores.rows:
        mine, parameters = scores.of(row), scores.parameters(row)
        means = {label: scores.mean(row, tasks) for label, tasks in scores.columns.items()}
        rows.append([scores.label(row), f"{parameters:,}", *(shown(value, share=True) for value in means.values())])
        rows[-1] += [_median(mine[task]) if task in mine else "-" for task in scores.tasks]
        several = [f"{task_label(e.task)} {_range(e)} ({e.seeds} seeds)" for e in mine.values() if e.seeds > 1]
        notes += [f"{row}, lowest to highest: {', '.join(several)}."] if several else []
        for task, line in mine.items():
            settings = ", ".join(f"{name}={value}" for name, value in line.settings.items())
            record = {"model": row, "task": task, "score": line.median, "seeds": line.seeds, "lowest": line.lowest}
            records.append(record | {"highest": line.highest, "parameters": parameters, "settings": settings})
        about = {"model": row, "parameters": parameters}
        records += [about | {"task": label, "score": value} for label, value in means.items() if value is not None]
    first = "Medians over seeds. Shares and correlations: percent, higher is better. Perplexities: lower is better."
    narrow = {label: tasks for label, tasks in scores.columns.items() if tasks != GLUE_TASKS}
    first += "".join(f" {label}: {', '.join(map(task_label, tasks))}." for label, tasks in narrow.items())
    header = ["model", "parameters", *scores.columns, *(task_header(scores, task) for task in scores.tasks)]
    notes = [first, *limit_notes(scores, scores.tasks), *notes]
    if not rows:
        return None
    return Table(name="quality", title="Quality", header=header, rows=rows, records=records, notes=notes)


def metrics_table(scores: Scores) -> Table | None:
    """Build the table of each metric of each task: accuracy and F1, exact match, matched and mismatched, languages."""
    lines = [line for row in scores.rows for task in scores.of(row) for line in scores.metrics(row, task).values()]
    rows = [[e.row, task_label(e.task), e.metric, _median(e), str(e.seeds), _range(e)] for e in lines]
    names = ("task", "metric", "median", "lowest", "highest", "seeds")
    records = [{"model": line.row} | {name: getattr(line, name) for name in names} for line in lines]
    header = ["model", "task", "metric", "median", "seeds", "lowest to highest"]
    return Table(name="each_metric", title="Each metric", header=header, rows=rows, records=records) if rows else None


def results_markdown(results: Sequence[Result]) -> str:
    """Write the scores of one model as a markdown table for its card; empty if there is no score."""
    scores = gather(results)
    several = len(scores.frame["row"].unique()) > 1
    lines = []
    for row in scores.frame["row"].unique():
        mine = scores.only(row)
        name = [row] if several else []
        for task, line in mine.of(row).items():
            metrics = ", ".join(f"{each} {_median(found)}" for each, found in mine.metrics(row, task).items())
            lines.append([*name, task_header(mine, task), _median(line), str(line.seeds), _range(line), metrics])
        for label, tasks in mine.columns.items():
            lines.append([*name, label, shown(mine.mean(row, tasks), share=True), "-", "-", "-"])
    header = [*(["model"] if several else []), "task", "score", "seeds", "lowest to highest", "metrics"]
    return markdown_table(header, lines) if lines else ""


def medians(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Return the median of each metric of each task for one model, without its second distillations."""
    frame = gather([result for result in results if result.teacher is None]).frame
    lines = frame[(frame["metric"] != "") & frame["median"].notna()].drop_duplicates(["task", "metric"])
    return {str(task): dict(zip(own.metric, own["median"], strict=True)) for task, own in lines.groupby("task")}


def score_axis(scores: Scores) -> tuple[str, dict[str, float]]:
    """Return an axis label and each row's value in percent: the first average that at least two rows have."""
    for label, tasks in scores.averages().items():
        values = {row: scores.mean(row, tasks) for row in scores.rows}
        finite = {row: 100 * value for row, value in values.items() if value is not None and math.isfinite(value)}
        if len(finite) > 1:
            number = f", {len(tasks)} tasks" if label == "GLUE average" else ""
            return f"{task_label(label)} (%{number})", finite
    return "", {}


def roles_caption(scores: Scores) -> str:
    """Return the markers of the teacher and the baseline for a caption."""
    marks = [("star", scores.teacher), ("square", scores.baseline)]
    named = [f"{mark}: {name}" for mark, name in marks if name is not None]
    return f" ({', '.join(named)})" if named else ""


def size_plot(scores: Scores) -> Plot | None:
    """Plot the average score against the number of parameters."""
    y, values = score_axis(scores)
    if not values:
        return None
    sizes = {row: scores.parameters(row) for row in values}
    unit, x = (1e6, "parameters (millions)") if max(sizes.values()) >= 1e6 else (1e3, "parameters (thousands)")
    panels = {"score against size": [Point(row, sizes[row] / unit, value) for row, value in values.items()]}
    caption = f"Average score against parameters{roles_caption(scores)}."
    return Plot(name="quality_parameters", caption=caption, png=png(scatter(panels, scores, x=x, y=y)))


class SweepScores(Callback):
    """Hydra callback: print all scores below the output folder when a sweep of evaluations has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the quality table."""
        out = Path(config.output_dir).expanduser()
        table = quality_table(gather(read_results([out]))) if out.is_dir() else None
        if table is not None:
            print_table(f"{table.title}, below {out}", table.header, table.rows)
