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
    shares = scores.frame.loc[scores.frame["task"] == task, "share"]
    return task_label(task) + ("" if shares.iloc[0] or "perplexity" in task_label(task) else " perplexity")


def _texts(line: Any) -> list[str]:
    """Format the median of a score or a metric, the number of seeds, and their range: shares in percent."""
    share = not _NO_SHARE.search(line.metric) if line.metric else line.share
    median, lowest, highest = (shown(value, share=share) for value in (line.median, line.lowest, line.highest))
    return [median, str(line.seeds), f"{lowest} to {highest}" if line.seeds > 1 else "-"]


def limit_notes(scores: Scores, tasks: Sequence[str]) -> list[str]:
    """Describe for each task with limited rows on which of them models were trained and scored."""
    notes = []
    for task in tasks:
        lines = [line for row in scores.frame["row"].unique() if (line := scores.line(row, task))]
        if not any(line.settings.keys() & {"max_train_rows", "max_scored_rows"} for line in lines):
            continue
        names = [name for name in ("epochs", "lr") if len({str(line.settings.get(name)) for line in lines}) > 1]
        found: dict[str, list[str]] = {}
        for line in lines:
            scored = ", ".join(f"{number:,} of {split}" for split, number in line.details.get("rows", {}).items())
            text = f"trained on {line.details.get('train_rows', 0):,} rows, scored on {scored or 'some'}"
            text += "".join(f", {name}={line.settings.get(name)}" for name in names)
            found.setdefault(text, []).append(line.row)
        parts = "; ".join(f"{text} ({', '.join(rows)})" for text, rows in found.items())
        notes.append(f"{task_label(task)} on a part of its rows: {parts}.")
    return notes


def quality_table(scores: Scores) -> Table | None:
    """Build the table of each row's median on each task, with averages and parameters."""
    narrow = {label: tasks for label, tasks in scores.columns.items() if tasks != GLUE_TASKS}
    first = "Medians over seeds. Shares and correlations: percent, higher is better. Perplexities: lower is better."
    first += "".join(f" {label}: {', '.join(map(task_label, tasks))}." for label, tasks in narrow.items())
    notes, rows = [first, *limit_notes(scores, scores.tasks)], []
    records: list[dict[str, Any]] = []
    for row in scores.rows:
        mine, about = scores.of(row), {"model": row, "parameters": scores.parameters(row)}
        texts = {task: _texts(line) for task, line in mine.items()}
        means = {label: scores.mean(row, tasks) for label, tasks in scores.columns.items()}
        rows.append([scores.label(row), f"{about['parameters']:,}"])
        rows[-1] += [shown(value, share=True) for value in means.values()]
        rows[-1] += [texts[task][0] if task in texts else "-" for task in scores.tasks]
        ranges = [f"{task_label(e.task)} {texts[e.task][2]} ({e.seeds} seeds)" for e in mine.values() if e.seeds > 1]
        notes += [f"{row}, lowest to highest: {', '.join(ranges)}."] if ranges else []
        for task, line in mine.items():
            record = {"model": row, "task": task, "score": line.median, "seeds": line.seeds, "lowest": line.lowest}
            settings = ", ".join(f"{name}={value}" for name, value in line.settings.items())
            records.append(record | {"highest": line.highest} | about | {"settings": settings})
        records += [about | {"task": label, "score": value} for label, value in means.items() if value is not None]
    header = ["model", "parameters", *scores.columns, *(task_header(scores, task) for task in scores.tasks)]
    table = Table(name="quality", title="Quality", header=header, rows=rows, records=records, notes=notes)
    return table if rows else None


def metrics_table(scores: Scores) -> Table | None:
    """Build the table of each metric of each task: accuracy and F1, exact match, matched and mismatched, languages."""
    lines = [line for row in scores.rows for task in scores.tasks for line in scores.metrics(row, task)]
    rows = [[line.row, task_label(line.task), line.metric, *_texts(line)] for line in lines]
    names = ("task", "metric", "median", "lowest", "highest", "seeds")
    records = [{"model": line.row} | {name: getattr(line, name) for name in names} for line in lines]
    header = ["model", "task", "metric", "median", "seeds", "lowest to highest"]
    return Table(name="each_metric", title="Each metric", header=header, rows=rows, records=records) if rows else None


def results_markdown(results: Sequence[Result]) -> str:
    """Write the scores of one model as a markdown table for its card; empty if there is no score."""
    scores, lines = gather(results), []
    for row in scores.frame["row"].unique():
        mine = scores.only(row)
        for task, line in mine.of(row).items():
            metrics = ", ".join(f"{each.metric} {_texts(each)[0]}" for each in mine.metrics(row, task))
            lines.append([row, task_header(mine, task), *_texts(line), metrics])
        for label, tasks in mine.columns.items():
            lines.append([row, label, shown(mine.mean(row, tasks), share=True), "-", "-", "-"])
    header = ["model", "task", "score", "seeds", "lowest to highest", "metrics"]
    first = 0 if len(scores.rows) > 1 else 1  # one row needs no name
    return markdown_table(header[first:], [line[first:] for line in lines]) if lines else ""


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
            return f"{task_label(label)} (%{', 9 tasks' if tasks == GLUE_TASKS else ''})", finite
    return "", {}


def roles_caption(scores: Scores) -> str:
    """Return the markers of the teacher and the baseline for a caption."""
    marks = {"star": scores.teacher, "square": scores.baseline}
    named = [f"{mark}: {name}" for mark, name in marks.items() if name is not None]
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
        if out.is_dir() and (table := quality_table(gather(read_results([out])))):
            print_table(f"{table.title}, below {out}", table.header, table.rows)
