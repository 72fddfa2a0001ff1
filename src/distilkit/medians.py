"""Which scores count: of several settings the best on held-out rows, of several seeds the median, and their averages."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distilkit.published import GLUE_TASKS
from distilkit.results import Result

SECOND = " + 2nd distillation"


class Spread(NamedTuple):
    """The middle, the lowest and the highest of some values, and how many they are, one a seed."""

    median: float
    lowest: float
    highest: float
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Summarize values; a NaN among them makes NaN of all, for a seed that failed must not vanish."""
    if any(math.isnan(value) for value in values):
        return Spread(math.nan, math.nan, math.nan, len(values))
    return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of a table on one task: the results of its seeds at one setting.

    ``plain`` tells that the row is a model as it came, and neither a second distillation nor one of several settings.
    """

    row: str
    task: str
    results: tuple[Result, ...]
    plain: bool

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is a better one; it is then a share or a correlation."""
        return self.results[0].higher_is_better

    @property
    def averaged(self) -> bool:
        """Whether the score is one that goes into averages over tasks."""
        return self.results[0].kind == "finetuned" and self.higher_is_better

    @property
    def spread(self) -> Spread:
        """The task's one number over the seeds."""
        return spread([result.score for result in self.results if result.score is not None])

    @property
    def median(self) -> float:
        """The middle of the seeds' scores."""
        return self.spread.median

    def metrics(self) -> dict[str, Spread]:
        """Each metric over the seeds that have it."""
        names = dict.fromkeys(name for result in self.results for name in result.scores)
        return {
            name: spread([result.scores[name] for result in self.results if name in result.scores]) for name in names
        }

    def metric(self, *names: str) -> float | None:
        """Return the median of the metric with one of these names, whatever split stands before or metric behind."""
        for name, each in self.metrics().items():
            if any(name == one or name.startswith(f"{one}/") or name.endswith(f"/{one}") for one in names):
                return each.median
        return None


def row_names(results: Sequence[Result]) -> list[str]:
    """Name the row of each result; where two models have one name, the beginning of the weights' hash tells them apart.

    Each kind of score has its own way of hashing, so that only hashes of one kind are compared.
    """
    hashes: dict[tuple[str, str], set[str]] = {}
    for result in results:
        hashes.setdefault((result.name, result.kind), set()).add(result.sha256)
    ambiguous = {name for (name, _), found in hashes.items() if len(found) > 1}
    return [
        result.name
        + (f" @{result.sha256[:7]}" if result.name in ambiguous else "")
        + (SECOND if result.teacher is not None else "")
        for result in results
    ]


def _settings(result: Result) -> dict[str, Any]:
    """What may differ between two fine-tunings of one row: all but the seed."""
    teacher = {f"teacher {name}": value for name, value in (result.teacher or {}).items()}
    return {name: value for name, value in (result.settings | teacher).items() if name != "seed"}


def _counting(groups: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return the settings that count: the best on held-out rows, or each of them where some have no such score."""
    if len(groups) == 1 or any(result.held_out is None for group in groups.values() for result in group):
        return sorted(groups)

    def merit(key: str) -> float:
        middle = spread([result.held_out for result in groups[key] if result.held_out is not None]).median
        return -math.inf if math.isnan(middle) else middle if groups[key][0].higher_is_better else -middle

    return [max(sorted(groups), key=merit)]


def _differences(keys: Iterable[str]) -> dict[str, str]:
    """Label settings by what not all of them share."""
    settings = {key: json.loads(key) for key in keys}
    names = sorted({name for each in settings.values() for name in each})
    differing = [name for name in names if len({json.dumps(each.get(name)) for each in settings.values()}) > 1]
    for width in (40, None):  # a corpus may have a long name
        labels = {
            key: ", ".join(f"{name}={str(each[name])[:width]}" for name in differing if name in each)
            for key, each in settings.items()
        }
        if len(set(labels.values())) == len(labels):
            break
    return labels


def choose(results: Sequence[Result]) -> list[Score]:
    """Return what counts of each row and task, in the order in which rows first appear; speed is left out.

    Of several settings it is the one with the best median on held-out rows, never by the score itself; where there is no
    such score, each is a row of its own. Of two results with the same seed and settings the later counts.
    """
    named = [(row, each) for row, each in zip(row_names(results), results, strict=True) if each.score is not None]
    cells: dict[tuple[str, str], dict[str, dict[int | None, Result]]] = {(row, each.task): {} for row, each in named}
    for row, result in sorted(named, key=lambda item: str(item[1].cost.get("date", ""))):
        key = json.dumps(_settings(result), sort_keys=True, default=str)
        cells[row, result.task].setdefault(key, {})[result.seed] = result
    scores = []
    for (row, task), by_setting in cells.items():
        groups = {key: list(by_seed.values()) for key, by_seed in by_setting.items()}
        counting = _counting(groups)
        labels = _differences(groups) if len(counting) > 1 else {}
        for key in counting:
            name = f"{row} ({labels[key]})" if labels else row
            plain = not labels and groups[key][0].teacher is None
            scores.append(Score(row=name, task=task, results=tuple(groups[key]), plain=plain))
    return scores


class Average(NamedTuple):
    """A mean over tasks: how it is called, and which they are."""

    label: str
    tasks: tuple[str, ...]


def averages(scores: Sequence[Score]) -> list[Average]:
    """Return the means that rows can be compared by, the best one first.

    GLUE's macro average, the plain mean of nine tasks as the paper takes it, where a row has them all; and, unless all
    rows have, the mean of the tasks that all rows share. Second distillations and settings do not narrow what is shared.
    """
    tasks: dict[str, list[str]] = {}
    for score in scores:
        if score.plain and score.averaged:
            tasks.setdefault(score.row, []).append(score.task)
    whole = [row for row, names in tasks.items() if set(GLUE_TASKS) <= set(names)]
    glue = [Average("GLUE average", GLUE_TASKS)] if whole else []
    first = next(iter(tasks.values()), [])
    shared = tuple(task for task in first if all(task in names for names in tasks.values()))
    if not shared or (whole and len(whole) == len(tasks)):
        return glue
    common = [Average(f"average of {len(shared)} tasks" if len(shared) > 1 else shared[0], shared)]
    return glue + common if len(whole) > 1 else common + glue


def cell(scores: Sequence[Score], row: str, task: str) -> Score | None:
    """Find the score of a row on a task."""
    return next((score for score in scores if score.row == row and score.task == task), None)


def mean(scores: Sequence[Score], row: str, tasks: Iterable[str]) -> float | None:
    """Return the mean of a row's medians over tasks, or None where it lacks one."""
    found = [cell(scores, row, task) for task in tasks]
    values = [score.median for score in found if score is not None]
    return statistics.fmean(values) if values and len(values) == len(found) else None


def share_kept(value: float | None, teacher: float | None, *, higher_is_better: bool) -> float | None:
    """Return the percentage of the teacher's score that is kept, for a perplexity the teacher's over the student's.

    None where there is none: a score is missing, or one below zero is to be divided by.
    """
    if value is None or teacher is None:
        return None
    part, whole = (value, teacher) if higher_is_better else (teacher, value)
    return 100 * part / whole if whole > 0 else None


def retention(scores: Sequence[Score], row: str, teacher: str, task: str) -> float | None:
    """Return the percentage of the teacher's median on a task that a row keeps."""
    mine, theirs = cell(scores, row, task), cell(scores, teacher, task)
    if mine is None or theirs is None:
        return None
    return share_kept(mine.median, theirs.median, higher_is_better=mine.higher_is_better)


def mean_retention(scores: Sequence[Score], row: str, teacher: str, tasks: Sequence[str]) -> float | None:
    """Return the row's mean over tasks as a percentage of the teacher's: a ratio of averages, as in the paper."""
    return share_kept(mean(scores, row, tasks), mean(scores, teacher, tasks), higher_is_better=True)


_ABLATION = re.compile(r"(?:^|.*[^a-z0-9])(full|no_ce|no_mlm|no_cos|random_init)$", re.IGNORECASE | re.DOTALL)


def ablation_row(name: str) -> tuple[str, str] | None:
    """Split a name that ends with a row of the ablation into what stands before and the row; None for any other."""
    found = _ABLATION.match(name)
    return (name[: found.start(1)], found[1].lower()) if found else None
