"""One frame of all scores: which results count, medians over seeds, averages, and shares of the teacher's scores."""

import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import pandas as pd

from distilkit.records import Result
from distilkit.report.intervals import Interval, interval
from distilkit.report.samples import Samples, read_samples

GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
LABELS = dict(zip(GLUE_TASKS, ("CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI"), strict=True))
LABELS |= {"imdb": "IMDb", "squad": "SQuAD", "xnli": "XNLI", "perplexity": "perplexity"}
LABELS |= {"pseudo_perplexity": "pseudo-perplexity", "wikitext103": "WikiText-103", "ner": "entities"}
LABELS |= {"boolq": "BoolQ", "cb": "CB", "wic": "WiC", "superglue_rte": "RTE (SuperGLUE)", "axb": "AX-b", "axg": "AX-g"}
LABELS |= {"similarity": "STS-B by cosine", "sick": "SICK by cosine"}
SECOND = " + 2nd distillation"
TOKENIZER = {"vocabulary", "text_tokens"}  # what differs between tokenizers
_DATA = ("scored_data", "train_data", "metrics", "labels")  # settings that tell one task from another
_OF_MODEL = {"vocabulary", "tokenizer", "seed"}  # settings that follow from the model, or are the seed
_COLUMNS = ("row", "task", "metric", "median", "lowest", "highest", "seeds", "share", "averaged", "plain", "kind")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """All results, the scores that count, and the rows that the others are compared with.

    ``results`` has a line for each result, with its ``row`` in tables and its ``setting``. ``frame`` has a line for
    each row, task and metric that counts, with its median, lowest and highest value over seeds. The metric "" is the
    task's score. ``plain`` lines are neither second distillations nor one of several settings. ``results`` of a line
    are those of its seeds, and ``tried`` the settings among which its own was chosen. ``samples`` draws those of a task.
    """

    results: pd.DataFrame
    frame: pd.DataFrame
    samples: Callable[[str], Samples]
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
        distillations and rows of settings narrow nothing. Tasks on which the teacher is at chance are left out, except in
        GLUE's mean, which is first. Then follow the widest, and then those of one row.
        """
        counting = self.frame[(self.frame["metric"] == "") & self.frame["plain"] & self.frame["averaged"]]
        tasks: dict[str, list[str]] = counting.groupby("row", sort=False)["task"].agg(list).to_dict()
        anchors = [row for row in (self.teacher, *more, self.baseline) if row in tasks] or list(tasks)[:1]
        common = [task for task in tasks[anchors[0]] if all(task in tasks[row] for row in anchors)] if anchors else []
        common = [task for task in common if not self.at_chance(self.teacher, [task])] or common
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

    def protocol(self, row: str | None, task: str) -> dict[str, list[Any]]:
        """Return how a row was scored on a task: for each setting the values among which its own was chosen."""
        if (line := self.line(row, task)) is None:
            return {}
        texts = line.kind == "language_model"
        more = {name: line.details.get(name) for name in ("words", "text_tokens") if texts}
        tried = [{name: each[name] for name in each if texts or name not in _OF_MODEL} | more for each in line.tried]
        names = sorted({name for each in tried for name in each})
        return {name: sorted({str(each.get(name)) for each in tried}) for name in names}

    def unlike(self, row: str | None, *tasks: str, other: str | None = None) -> dict[str, tuple[str, str]]:
        """Return how a row was scored differently from the teacher or another row: names with both values.

        Differences of ``TOKENIZER`` count only if there is no other: they leave the perplexity per word comparable.
        """
        found: dict[str, tuple[str, str]] = {}
        for task in tasks:
            one, two = self.protocol(row, task), self.protocol(other or self.teacher, task)
            names = [name for name in {**one, **two} if one and two and one.get(name) != two.get(name)]
            texts = {name: [", ".join(side.get(name, ["None"]))[:60] for side in (one, two)] for name in names}
            found |= {name: (mine, theirs) for name, (mine, theirs) in texts.items()}
        return {name: pair for name, pair in found.items() if name not in TOKENIZER} or found

    def _metric(self, rows: Iterable[str], task: str) -> str | None:
        """Return the metric by which rows compare with the teacher: per word if tokenizers differ, None if more does."""
        models = [row for row in rows if (line := self.line(row, task)) and line.kind == "language_model"]
        differing = {name for row in models for name in self.unlike(row, task)}
        return "" if not differing else "word_perplexity" if differing <= TOKENIZER else None

    def kept(self, row: str, *tasks: str) -> float | None:
        """Return the percentage of the teacher's mean over tasks that a row keeps: the paper's ratio of averages.

        For a perplexity it is the teacher's divided by the row's: per word if tokenizers differ, None if more differs.
        It is None where the teacher is at chance too.
        """
        mine, theirs = self.mean(row, tasks), self.mean(self.teacher, tasks)
        if mine is not None and (metric := self._metric([row], tasks[0])) != "":
            mine, theirs = (self.metric(each, tasks[0], metric) if metric else None for each in (row, self.teacher))
        if mine is None or theirs is None or self.at_chance(self.teacher, tasks):
            return None
        part, whole = (mine, theirs) if self.line(row, tasks[0]).share else (theirs, mine)
        return 100 * part / whole if whole > 0 else None  # None for a NaN too

    def _interval(
        self, statistic: Callable[..., Any], rows: Sequence[str | None], tasks: Sequence[str], metric: str = ""
    ) -> Interval | None:
        """Return the interval of a function of the means of rows over tasks.

        It is None if a sample is missing, or if those of a task are not of the same rows of data.
        """
        found = [[self.samples(task).of(row, metric) for task in tasks] for row in rows]
        samples, size = [each for own in found for each in own if each is not None], len(tasks)
        paired = all(len({each.rows for each in own if each}) == 1 for own in zip(*found, strict=True))
        if len(samples) < len(rows) * size or not size or not paired:
            return None

        def of_means(*each: Any) -> Any:
            return statistic(*(sum(each[at : at + size]) / size for at in range(0, len(each), size)))

        return interval(of_means, *samples)

    def interval(self, row: str | None, tasks: Sequence[str]) -> Interval | None:
        """Return the interval of a row's mean over tasks."""
        return self._interval(lambda mean: mean, [row], tasks)

    def difference(self, row: str, other: str | None, tasks: Sequence[str]) -> Interval | None:
        """Return the interval of the mean over tasks less that of another row."""
        return self._interval(lambda mine, theirs: mine - theirs, [row, other], tasks)

    def kept_interval(self, row: str, *tasks: str, less: str | None = None) -> Interval | None:
        """Return the interval of what a row keeps, or of what it keeps more than the row ``less``."""
        rows = [row, *([less] if less else [])]
        if any(self.kept(each, *tasks) is None for each in rows):
            return None
        share = self.line(row, tasks[0]).share

        def percent(teacher: Any, *each: Any) -> Any:
            own, *others = (100 * mine / teacher if share else 100 * teacher / mine for mine in each)
            return own - others[0] if others else own

        return self._interval(percent, [self.teacher, *rows], tasks, self._metric(rows, tasks[0]) or "")

    def chance(self, tasks: Sequence[str]) -> float | None:
        """Return the mean score over tasks of what says the commonest class, or no correlation."""
        found = [self.samples(task).chance for task in tasks]
        return statistics.fmean(each for each in found if each is not None) if found and None not in found else None

    def at_chance(self, row: str | None, tasks: Sequence[str]) -> bool:
        """Return whether a row's mean over tasks is not shown to be above chance."""
        chance = self.chance(tasks)
        own = None if chance is None else self.interval(row, tasks)
        return own is not None and chance is not None and own.low <= chance

    def seeds(self, rows: Iterable[str | None], tasks: Sequence[str]) -> int | None:
        """Return the least number of seeds that rows have on tasks; None where no score depends on a seed."""
        lines = [self.line(row, task) for row in rows for task in tasks]
        return min((line.seeds for line in lines if line and line.results[0].seed is not None), default=None)


def task_label(task: str) -> str:
    """Return a task's name as papers write it."""
    return LABELS.get(task, task)


def name_alike(results: Sequence[Result]) -> list[Result]:
    """Give timings the name under which the same weights were scored, unless their own name is one of these."""
    names = {each.sha256: each.name for each in reversed(results) if each.kind != "speed"}
    own = {(each.name, each.sha256) for each in results if each.kind != "speed"}
    timed = [each for each in results if each.kind == "speed" and (each.name, each.sha256) not in own]
    new = {each.name: names[each.sha256] for each in timed if each.sha256 in names}

    def renamed(timing: Result) -> Result:
        against = {"against": {new.get(other, other): x for other, x in timing.details.get("against", {}).items()}}
        return dataclasses.replace(timing, name=new.get(timing.name, timing.name), details=timing.details | against)

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
    ends = every["sha256"].str.replace(".*@", "", regex=True).str[:7]  # of a hub model without commit the revision
    every["row"] = every["name"] + np.where(ambiguous, " @" + ends, "")
    every["row"] += np.where(every["teacher"].notna(), SECOND, "")
    counting = [summary for cell in _counting(every) for summary in _summaries(*cell)]
    more = ("parameters", "settings", "details", "results", "tried")
    frame = pd.DataFrame(counting, columns=[*_COLUMNS, *more], dtype=object)
    scored = frame[frame["metric"] == ""]
    samples = cache(lambda task: read_samples(list(scored[scored["task"] == task].itertuples(index=False))))
    return Scores(results=every, frame=frame.astype({"averaged": bool, "plain": bool}), samples=samples)


def _counting(every: pd.DataFrame) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Go through what counts of each row and task: a label, the results of its seeds, and the settings tried.

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
        grids: dict[tuple[str, ...], dict[str, float]] = {}  # settings that differ in the data are not one grid
        for setting in sorted(merits, key=lambda each: "refit" not in each):  # a refit has the merit of what it took
            own = json.loads(setting)
            grids.setdefault(tuple(str(own.get(name)) for name in _DATA), {})[setting] = merits[setting]
        chosen = {pd.Series(grid).fillna(-np.inf).idxmax(): grid for grid in grids.values()}
        counting = [*chosen, *(setting for setting in groups if setting not in merits)]
        labels = _differences(counting)
        if len(chosen) == 1 or len(counting) == 1:
            del labels[counting[0]]  # this setting has the row's own name
        for setting in counting:
            tried = [groups[each][0].settings for each in chosen.get(setting, [setting])]
            yield f"{row} ({labels[setting]})" if setting in labels else row, groups[setting], tried


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


def _summaries(label: str, lines: Sequence[Any], tried: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Summarize the score and each metric over seeds; one NaN makes the result NaN, so that a failed seed shows."""
    first = lines[0]
    about = {name: getattr(first, name) for name in ("task", "kind", "parameters", "settings", "details")}
    about |= {"share": first.higher_is_better, "averaged": first.kind == "finetuned" and first.higher_is_better}
    about |= {"row": label, "plain": label == first.row and first.teacher is None, "results": lines, "tried": tried}
    scores = [{"": line.score, **line.scores} for line in lines]
    for metric in dict.fromkeys(name for each in scores for name in each):
        found = [each[metric] for each in scores if metric in each]
        numbers = {"median": float(np.median(found)), "lowest": float(np.min(found)), "highest": float(np.max(found))}
        yield about | numbers | {"metric": metric, "seeds": len(found)}
