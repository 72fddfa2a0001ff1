"""The quality of each model: its score on each task, each metric, and its average against its size."""

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from distilkit.records import Result, read_results
from distilkit.report.drawing import Point, png, scatter
from distilkit.report.frame import GLUE_TASKS, Scores, gather, task_label
from distilkit.report.intervals import Interval, ends, interval
from distilkit.report.page import Plot, Table, figure, markdown_table, print_table, shown, tabulate

_PROTOCOL = ("epochs", "lr", "batch_size", "max_length", "precision")  # columns of a table; all settings are compared
_NO_SHARE = re.compile(r"perplexity|nll|loss|entropy|bits|seconds|tokens", re.IGNORECASE)


def task_header(scores: Scores, task: str) -> str:
    """Return the heading of a task's column; it tells if lower scores are better."""
    shares = scores.frame.loc[scores.frame["task"] == task, "share"]
    return task_label(task) + ("" if shares.iloc[0] or "perplexity" in task_label(task) else " perplexity")


def plus_minus(value: float | None, range_: Interval | None, *, share: bool = True, form: str | None = None) -> str:
    """Format a value with half the width of its interval: by ``form``, or shares in percent."""
    both = [value, *([range_.half] if range_ else [])]
    return " ± ".join(figure(each, form) if form else shown(each, share=share) for each in both)


def _texts(scores: Scores, line: Any) -> list[str]:
    """Format the median of a score or a metric with its interval, and the number of seeds: shares in percent."""
    share = not _NO_SHARE.search(line.metric) if line.metric else line.share
    sample = scores.samples(line.task).of(line.row, line.metric)
    return [plus_minus(line.median, interval(lambda x: x, sample) if sample else None, share=share), str(line.seeds)]


def interval_notes(scores: Scores) -> list[str]:
    """Explain what stands behind ±, which cells have none, and which have the spread of rows alone."""
    whys: dict[str, list[str]] = {}
    for row, task in itertools.product(scores.rows, scores.tasks):
        if scores.line(row, task):
            found = scores.samples(task).found[row, ""]
            of_seed = "with 1 seed, so that ± is over rows alone"
            why = found if isinstance(found, str) else of_seed if found.seeds == 1 else ""
            whys.setdefault(why, []).append(f"{row} on {task_label(task)}")
    notes = ["±: half the width of the 95 % interval, over rows and seeds."] if whys.pop("", []) else []
    more = {why: f" and {len(names) - 1} more" if len(names) > 1 else "" for why, names in whys.items()}
    return notes + [f"{names[0]}{more[why]} {why}." for why, names in whys.items()]


def limit_notes(scores: Scores) -> list[str]:
    """Describe which scores are of models that were trained or scored on a part of the rows."""
    lines = [line for row in scores.rows for line in scores.of(row).values()]
    part = [line for line in lines if line.settings.keys() & {"max_train_rows", "max_scored_rows"}]
    said: dict[str, list[str]] = {}
    for line in part:
        said.setdefault(f"{task_label(line.task)} ({_rows(line)})", []).append(line.row)
    whose = {what: "" if len(rows) == len(scores.rows) else f"{', '.join(rows)} on " for what, rows in said.items()}
    return [f"On a part of the rows: {'; '.join(whose[what] + what for what in said)}."] if said else []


def _rows(line: Any) -> str:
    """Return how many rows a model was trained and scored on."""
    trained = line.settings.get("train_rows", line.details.get("train_rows"))
    scored = ", ".join(f"{number:,} of {split}" for split, number in line.details.get("rows", {}).items())
    return f"trained on {trained or 0:,}, scored on {scored or 'all'}"


def _best(values: Sequence[Sequence[float | None]], higher: Sequence[bool]) -> set[tuple[int, int]]:
    """Return the row and column of the best value of each column; equal ones are all best."""
    best = set()
    for column, cells in enumerate(zip(*values, strict=True)):
        found = [value for value in cells if value is not None and math.isfinite(value)]
        top = (max if higher[column] else min)(found, default=None)
        best |= {(row, column) for row, value in enumerate(cells) if len(found) > 1 and value == top}
    return best


def quality_table(scores: Scores) -> Table | None:
    """Build the table of each row's median on each task, with averages, parameters, and the score of chance."""
    narrow = {label: tasks for label, tasks in scores.columns.items() if tasks != GLUE_TASKS}
    first = "Medians over seeds. Shares and correlations: percent, higher is better. Perplexities: lower is better."
    first += "".join(f" {label}: {', '.join(map(task_label, tasks))}." for label, tasks in narrow.items())
    columns = {**scores.columns, **{task: (task,) for task in scores.tasks}}
    shares = [bool(scores.frame.loc[scores.frame["task"] == tasks[0], "share"].iloc[0]) for tasks in columns.values()]
    rows, values, records = [], [], []
    for row in scores.rows:
        about, mine = {"model": row, "parameters": scores.parameters(row)}, scores.of(row)
        found = [(scores.mean(row, tasks), scores.interval(row, tasks)) for tasks in columns.values()]
        texts = [plus_minus(*each, share=share) for each, share in zip(found, shares, strict=True)]
        rows.append([scores.label(row), f"{about['parameters']:,}", *texts])
        values.append([mean for mean, _ in found])
        for name, (mean, range_) in zip(columns, found, strict=True):
            record = about | {"task": name, "score": mean, **ends(range_)}
            if line := mine.get(name):
                record |= {"seeds": line.seeds, "lowest": line.lowest, "highest": line.highest}
                record["settings"] = ", ".join(f"{name}={value}" for name, value in line.settings.items())
            records += [record] if mean is not None else []
    chances = [scores.chance(tasks) for tasks in columns.values()]
    if set(chances) - {None}:
        texts = [shown(chance, share=share) for chance, share in zip(chances, shares, strict=True)]
        rows.append(["majority class or no correlation", "-", *texts])
        records += [{"model": "chance", "task": each, "score": x} for each, x in zip(columns, chances, strict=True)]
    best = {(row, 2 + column) for row, column in _best(values, shares)}
    header = ["model", "parameters", *scores.columns, *(task_header(scores, task) for task in scores.tasks)]
    notes = [first, *interval_notes(scores), *limit_notes(scores)]
    shared: Any = {"name": "quality", "title": "Quality", "header": header, "notes": notes, "best": best}
    return Table(rows=rows, records=records, **shared) if rows else None


def metrics_table(scores: Scores) -> Table | None:
    """Build the table of each metric of each task: accuracy and F1, exact match, matched and mismatched, languages."""
    lines = [line for row in scores.rows for task in scores.tasks for line in scores.metrics(row, task)]
    cells = [(line, *_texts(scores, line)) for line in lines]
    rows = [[line.row, task_label(line.task), line.metric, *texts] for line, *texts in cells]
    names = ("task", "metric", "median", "lowest", "highest", "seeds")
    records = [{"model": line.row} | {name: getattr(line, name) for name in names} for line in lines]
    shared: Any = {"name": "each_metric", "title": "Each metric", "records": records, "text": (0, 1, 2), "folded": True}
    return Table(header=["model", "task", "metric", "median", "seeds"], rows=rows, **shared) if rows else None


def results_markdown(results: Sequence[Result]) -> str:
    """Write the scores of one model as a markdown table for its card; empty if there is no score."""
    scores, lines = gather(results), []
    for row in scores.frame["row"].unique():
        mine = scores.only(row)
        for task, line in mine.of(row).items():
            metrics = ", ".join(f"{each.metric} {_texts(scores, each)[0]}" for each in mine.metrics(row, task))
            lines.append([row, task_header(mine, task), *_texts(scores, line), metrics])
        for label, tasks in mine.columns.items():
            average = plus_minus(mine.mean(row, tasks), mine.interval(row, tasks), share=True)
            lines.append([row, label, average, "-", "-"])
    header = ["model", "task", "score", "seeds", "metrics"]
    first = 0 if len(scores.rows) > 1 else 1  # one row needs no name
    text = {0, 1, 4} if first == 0 else {0, 3}
    table = [markdown_table(header[first:], [line[first:] for line in lines], text=text)] if lines else []
    return "\n".join([*table, *(f"{note}\n" for note in interval_notes(scores))])


def medians(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Return the median of each metric of each task for one model, without its second distillations."""
    frame = gather([result for result in results if result.teacher is None]).frame
    lines = frame[(frame["metric"] != "") & frame["median"].notna()].drop_duplicates(["task", "metric"])
    return {str(task): dict(zip(own.metric, own["median"], strict=True)) for task, own in lines.groupby("task")}


def finetuning_table(scores: Scores) -> Table | None:
    """Build the table of how rows were fine-tuned: one line for all rows and tasks with the same settings."""
    lines = [line for row in scores.rows for line in scores.of(row).values() if line.kind == "finetuned"]
    if not lines:
        return None
    records: list[dict[str, Any]] = []
    for line in lines:
        chosen = {name: line.settings.get(name) for name in _PROTOCOL}
        chosen |= {
            "seeds": ", ".join(str(each.seed) for each in line.results),
            "settings_tried": line.settings.get("settings_tried", len(line.tried)),
        }
        records.append({"model": line.row, "task": line.task, **chosen, "rows": _rows(line)})
    frame, keys = pd.DataFrame(records).astype(str), [*chosen]
    same, numbers = (
        frame.groupby("task")["rows"].transform("nunique") == 1,
        dict(zip(frame["task"], frame["rows"], strict=True)),
    )
    frame["rows"] = np.where(same, "", frame["rows"])  # numbers count where they differ between models
    alike = frame.groupby([*keys, "rows", "model"], sort=False)["task"].agg(tuple).reset_index()
    alike = alike.groupby([*keys, "rows", "task"], sort=False)["model"].agg(tuple).reset_index()
    rest = [numbers[own[0]] if len(own) == 1 else "the same for all models" for own in alike["task"]]
    alike["rows"] = alike["rows"].where(alike["rows"] != "", rest)
    for name in ("task", "model"):
        every = frame[name].nunique()
        alike[name] = ["all" if len(own) == every > 1 else ", ".join(map(task_label, own)) for own in alike[name]]
    cells = alike.to_dict("records")
    columns = {"model": "{}", "task": "{}", **dict.fromkeys([*keys, "rows"], "{}")}
    note = "Of several settings tried, the line shows the one chosen on held-out rows."
    return tabulate("finetuning", "How it was fine-tuned", records, columns, note, cells=cells, folded=True)


def first_average(scores: Scores) -> tuple[str, tuple[str, ...]]:
    """Return the first average, as label and tasks, that at least two rows have; empty if there is none."""
    for label, tasks in scores.averages().items():
        means = [scores.mean(row, tasks) for row in scores.rows]
        if sum(mean is not None and math.isfinite(mean) for mean in means) > 1:
            return label, tasks
    return "", ()


def score_axis(scores: Scores) -> tuple[str, dict[str, Point]]:
    """Return an axis label and the points of rows, without their x: the first average, in percent, with intervals."""
    label, tasks = first_average(scores)
    means = {row: scores.mean(row, tasks) for row in scores.rows}
    points = {}
    for row, mean in means.items():
        if mean is not None and math.isfinite(mean):
            range_ = scores.interval(row, tasks)
            sides = {"bottom": 100 * range_.low, "top": 100 * range_.high} if range_ else {}
            points[row] = Point(row, math.nan, 100 * mean, **sides)
    return f"{task_label(label)} (%{', 9 tasks' if tasks == GLUE_TASKS else ''})", points


def roles_caption(scores: Scores) -> str:
    """Return the markers of the teacher and the baseline for a caption."""
    marks = {"star": scores.teacher, "square": scores.baseline}
    named = [f"{mark}: {name}" for mark, name in marks.items() if name is not None]
    return f" ({', '.join(named)})" if named else ""


def size_plot(scores: Scores) -> Plot | None:
    """Plot the average score against the number of parameters."""
    y, points = score_axis(scores)
    if not points:
        return None
    sizes = {row: scores.parameters(row) for row in points}
    unit, x = (1e6, "parameters (millions)") if max(sizes.values()) >= 1e6 else (1e3, "parameters (thousands)")
    panels = {"score against size": [point._replace(x=sizes[row] / unit) for row, point in points.items()]}
    caption = f"{y} against parameters, with 95 % intervals{roles_caption(scores)}."
    return Plot(name="quality_parameters", caption=caption, png=png(scatter(panels, scores, x=x, y=y)))


class SweepScores(Callback):
    """Hydra callback: print all scores below the output folder when a sweep of evaluations has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the quality table."""
        out = Path(config.output_dir).expanduser()
        if out.is_dir() and (table := quality_table(gather(read_results([out])))):
            print_table(f"{table.title}, below {out}", table.header, table.rows)
