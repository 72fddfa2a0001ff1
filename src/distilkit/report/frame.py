"""One frame of all scores: which results count, medians over seeds, averages, and shares of the teacher's scores."""

import dataclasses
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from distilkit.records import Result

GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
LABELS = dict(zip(GLUE_TASKS, ("CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI"), strict=True))
LABELS |= {"imdb": "IMDb", "squad": "SQuAD", "xnli": "XNLI", "perplexity": "perplexity"}
LABELS["pseudo_perplexity"] = "pseudo-perplexity"
SECOND = " + 2nd distillation"
TOKENIZER = {"vocabulary", "text_tokens"}  # what differs between tokenizers
_COLUMNS = ("row", "task", "metric", "median", "lowest", "highest", "seeds", "share", "averaged", "plain", "kind")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """All results, the scores that count, and the rows that the others are compared with.

    ``results`` has a line for each result, with its ``row`` in tables and its ``setting``. ``frame`` has a line for
    each row, task and metric that counts, with its median, lowest and highest value over seeds. The metric "" is the
    task's score. ``plain`` lines are neither second distillations nor one of several settings.
    """

    results: pd.DataFrame
    frame: pd.DataFrame
    teacher: str | None = None
    baseline: str | None = None

    @cached_property
    def _lines(self) -> dict[tuple[str | None, str, str], Any]:
        return {(line.row, line.task, line.metric): line for line in self.frame.itertuples(index=False)}

    @cached_property
    def rows(self) -> list[str]:
        """The rows of tables: the teacher first, the baseline last."""
        return sorted(self.frame["row"].unique(), key=lambda row: (row != self.teacher, row == self.baseline))

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks: those with a label in its order, then the others."""
        return sorted(self.frame["task"].unique(), key=lambda task: [*LABELS, task].index(task))

    def only(self, *rows: str) -> "Scores":
        """Return the scores of some rows."""
        return dataclasses.replace(self, frame=self.frame[self.frame["row"].isin(rows)])

    def label(self, row: str) -> str:
        """Return a row's name with its role, unless it is named by its role."""
        role = {self.baseline: "baseline", self.teacher: "teacher"}.get(row, row)
        return row if role == row else f"{row} ({role})"

    def line(self, row: str | None, task: str) -> Any:
        """Return the line of a row's score on a task, or None."""
        return self._lines.get((row, task, ""))

    def of(self, row: str | None) -> dict[str, Any]:
        """Return the lines of a row's scores by task."""
        return {task: line for task in self.tasks if (line := self.line(row, task))}

    def metrics(self, row: str | None, task: str) -> list[Any]:
        """Return the lines of a row's metrics on a task."""
        return [line for key, line in self._lines.items() if key[:2] == (row, task) and line.metric]

    def metric(self, row: str | None, task: str, name: str) -> float | None:
        """Return the median of a metric, which may stand behind a split (dev/f1) or before a metric (en/accuracy)."""
        parts = [(line.metric.split("/"), float(line.median)) for line in self.metrics(row, task)]
        return next((median for part, median in parts if name in (part[0], part[-1])), None)

    def parameters(self, row: str) -> int:
        """Return a row's number of parameters on its first task: heads differ from task to task."""
        return int(next(iter(self.only(row).of(row).values())).parameters)

    def mean(self, row: str | None, tasks: Iterable[str]) -> float | None:
        """Return the mean of a row's medians over tasks, or None if a task is missing."""
        lines = [self.line(row, task) for task in tasks]
        return statistics.fmean(line.median for line in lines) if lines and all(lines) else None

    def averages(self, *more: str) -> dict[str, tuple[str, ...]]:
        """Return the means that rows can be compared by, as labels with their tasks.

        GLUE's macro average is the plain mean of nine tasks, as in the paper, if a row has them all. Each row adds the
        mean of the tasks that it shares with the teacher, ``more`` and the baseline, or else with the first row. Second
        distillations and rows of settings narrow nothing. GLUE's mean is first, then the widest, then those of one row.
        """
        counting = self.frame[(self.frame["metric"] == "") & self.frame["plain"] & self.frame["averaged"]]
        tasks: dict[str, list[str]] = counting.groupby("row", sort=False)["task"].agg(list).to_dict()
        anchors = [row for row in (self.teacher, *more, self.baseline) if row in tasks] or list(tasks)[:1]
        common = [task for task in tasks[anchors[0]] if all(task in tasks[row] for row in anchors)] if anchors else []
        shared = {tuple(task for task in common if task in mine) for mine in tasks.values()}
        shared = {names for names in shared if names and set(names) != set(GLUE_TASKS)} | {GLUE_TASKS}
        having = {names: sum(set(names) <= set(mine) for mine in tasks.values()) for names in shared}
        kept = [names for names in having if having[names] >= (1 if names == GLUE_TASKS else min(2, len(tasks)))]
        kept.sort(key=lambda names: (having[names] < 2, names != GLUE_TASKS, -len(names), names))
        labels = {names: f"average of {len(names)} tasks" for names in kept if [*map(len, kept)].count(len(names)) == 1}
        labels |= {names: names[0] for names in kept if len(names) == 1} | {GLUE_TASKS: "GLUE average"}
        return {labels.get(names, f"average of {', '.join(names)}"): names for names in kept}

    @cached_property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The averages with a column in tables: those of one task are left out."""
        return {label: tasks for label, tasks in self.averages().items() if len(tasks) > 1}

    def unlike(self, row: str, task: str) -> dict[str, tuple[Any, Any]]:
        """Return how the row's language model was scored differently from the teacher: names with both values.

        Differences of ``TOKENIZER`` count only if there is no other: they leave the perplexity per word comparable.
        """
        mine, theirs = self.line(row, task), self.line(self.teacher, task)
        if theirs is None or mine.kind != "language_model":
            return {}
        one, other = mine.details | mine.settings, theirs.details | theirs.settings
        names = [*sorted(mine.settings | theirs.settings), "words", "text_tokens"]
        differing = {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}
        return {name: pair for name, pair in differing.items() if name not in TOKENIZER} or differing

    def kept(self, row: str, *tasks: str) -> float | None:
        """Return the percentage of the teacher's mean over tasks that a row keeps: the paper's ratio of averages.

        For a perplexity it is the teacher's divided by the row's: per word if tokenizers differ, None if more differs.
        """
        mine, theirs = self.mean(row, tasks), self.mean(self.teacher, tasks)
        if mine is not None and (differing := self.unlike(row, tasks[0])):
            words = [self.metric(each, tasks[0], "word_perplexity") for each in (row, self.teacher)]
            mine, theirs = words if differing.keys() <= TOKENIZER else (None, None)
        if mine is None or theirs is None:
            return None
        part, whole = (mine, theirs) if self.line(row, tasks[0]).share else (theirs, mine)
        return 100 * part / whole if whole > 0 else None  # None for a NaN too


def task_label(task: str) -> str:
    """Return a task's name as papers write it."""
    return LABELS.get(task, task)


def name_alike(results: Sequence[Result]) -> list[Result]:
    """Give timings the name under which the same weights were scored."""
    names = {each.sha256: each.name for each in reversed(results) if each.kind != "speed"}
    new = {each.name: names[each.sha256] for each in results if each.kind == "speed" and each.sha256 in names}

    def renamed(timing: Result) -> Result:
        against = {"against": {new.get(other, other): x for other, x in timing.details.get("against", {}).items()}}
        return dataclasses.replace(timing, name=names.get(timing.sha256, timing.name), details=timing.details | against)

    return [renamed(each) if each.kind == "speed" else each for each in results]


def _setting(result: Result) -> str:
    """Return what may differ between two fine-tunings of one row, as JSON: all but the seed."""
    settings = {name: value for name, value in result.settings.items() if name != "seed"}
    settings |= {f"teacher {name}": value for name, value in (result.teacher or {}).items()}
    if "teacher name" in settings:  # the folder of the teacher of a second distillation names the seed too
        settings["teacher name"] = re.sub(r"/seed\d[^/]*", "", str(settings["teacher name"]))
    return json.dumps(settings, sort_keys=True, default=str)


def gather(results: Sequence[Result]) -> Scores:
    """Put results into frames, and choose the scores that count. Models of one name are told apart by their hash."""
    lines = [{"setting": _setting(each), **vars(each)} for each in name_alike(results)]
    every = pd.DataFrame(lines, columns=["setting", *Result.__annotations__], dtype=object)  # keeps None and NaN apart
    ambiguous = every.groupby("name")["sha256"].transform("nunique") > 1
    every["row"] = every["name"] + np.where(ambiguous, " @" + every["sha256"].str[:7], "")
    every["row"] += np.where(every["teacher"].notna(), SECOND, "")
    counting = [summary for label, seeds in _counting(every) for summary in _summaries(label, seeds)]
    frame = pd.DataFrame(counting, columns=[*_COLUMNS, "parameters", "settings", "details"], dtype=object)
    return Scores(results=every, frame=frame.astype({"averaged": bool, "plain": bool}))


def _counting(every: pd.DataFrame) -> Iterator[tuple[str, list[Any]]]:
    """Go through what counts of each row and task: a label, and the results of its seeds.

    Of several settings it is the one with the best median on held-out rows, never by the score itself; settings without
    held-out scores are rows of their own. Of two results with the same seed and settings the later counts.
    """
    scored = every.loc[[score is not None for score in every["score"]]]
    for (row, _), cell in scored.groupby(["row", "task"], sort=False):
        by_date = sorted(cell.itertuples(index=False), key=lambda line: (line.setting, str(line.cost.get("date", ""))))
        latest = {(line.setting, line.seed): line for line in by_date}
        groups = {setting: [line for line in latest.values() if line.setting == setting] for setting, _ in latest}
        held_out = {setting: [line.held_out for line in lines] for setting, lines in groups.items()}
        sign = 1 if by_date[0].higher_is_better else -1
        merits = {setting: sign * np.median(values) for setting, values in held_out.items() if None not in values}
        chosen = [pd.Series(merits).fillna(-np.inf).idxmax()] if merits else []
        counting = chosen + [setting for setting in groups if setting not in merits]
        labels = _differences(counting)
        if chosen or len(counting) == 1:
            del labels[counting[0]]  # this setting has the row's own name
        for setting in counting:
            yield f"{row} ({labels[setting]})" if setting in labels else row, groups[setting]


def _differences(keys: Iterable[str]) -> dict[str, str]:
    """Label settings by what not all of them share."""
    settings = {key: json.loads(key) for key in keys}
    names = sorted({name for each in settings.values() for name in each})
    differing = [name for name in names if len({json.dumps(each.get(name)) for each in settings.values()}) > 1]
    for width in (40, None):  # a corpus may have a long name
        pairs = {key: [f"{n}={str(each[n])[:width]}" for n in differing if n in each] for key, each in settings.items()}
        labels = {key: ", ".join(each) for key, each in pairs.items()}
        if len(set(labels.values())) == len(labels):
            break
    return labels


def _summaries(label: str, lines: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Summarize the score and each metric over seeds; one NaN makes the result NaN, so that a failed seed shows."""
    first = lines[0]
    about = {name: getattr(first, name) for name in ("task", "kind", "parameters", "settings", "details")}
    about |= {"share": first.higher_is_better, "averaged": first.kind == "finetuned" and first.higher_is_better}
    about |= {"row": label, "plain": label == first.row and first.teacher is None}
    scores = [{"": line.score, **line.scores} for line in lines]
    for metric in dict.fromkeys(name for each in scores for name in each):
        found = [each[metric] for each in scores if metric in each]
        numbers = {"median": float(np.median(found)), "lowest": float(np.min(found)), "highest": float(np.max(found))}
        yield about | numbers | {"metric": metric, "seeds": len(found)}
