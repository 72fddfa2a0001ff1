"""Which scores count: of several settings the best on held-out rows, of several seeds the median, and their averages."""

import dataclasses
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distilkit.records import Result
from distilkit.report.published import GLUE_TASKS

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

    @property
    def published_task(self) -> str:
        """What the published figures call the task: a perplexity is that of WikiText-103 on the whole of its test split."""
        settings = self.results[0].settings
        text = settings.get("text")
        hub = text.get("hub", {}) if isinstance(text, Mapping) else {}
        whole = hub.get("split") == "test" and settings.get("max_tokens") is None
        found = whole and str(hub.get("name")).startswith("wikitext-103") and self.task == "perplexity"
        return "wikitext103" if found else self.task

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
    """Name the row of each result; where two models have one name, the beginning of the weights' hash tells them apart."""
    hashes: dict[str, set[str]] = {}
    for result in results:
        hashes.setdefault(result.name, set()).add(result.sha256)
    ambiguous = {name for name, found in hashes.items() if len(found) > 1}
    return [
        result.name
        + (f" @{result.sha256[:7]}" if result.name in ambiguous else "")
        + (SECOND if result.teacher is not None else "")
        for result in results
    ]


def name_alike(results: Sequence[Result]) -> list[Result]:
    """Give timings the name under which the same weights were scored."""
    names = {result.sha256: result.name for result in reversed(results) if result.kind != "speed"}
    renamed = {each.name: names[each.sha256] for each in results if each.kind == "speed" and each.sha256 in names}
    return [
        dataclasses.replace(
            result,
            name=names.get(result.sha256, result.name),
            details=result.details
            | {"against": {renamed.get(other, other): x for other, x in result.details.get("against", {}).items()}},
        )
        if result.kind == "speed"
        else result
        for result in results
    ]


def _settings(result: Result) -> dict[str, Any]:
    """What may differ between two fine-tunings of one row: all but the seed, which the teacher's folder names too."""
    teacher = {f"teacher {name}": value for name, value in (result.teacher or {}).items()}
    if "teacher name" in teacher:
        teacher["teacher name"] = re.sub(r"/seed\d[^/]*", "", str(teacher["teacher name"]))
    return {name: value for name, value in (result.settings | teacher).items() if name != "seed"}


def _counting(groups: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return the settings that count: the best of those with scores on held-out rows first, then those without."""
    without = sorted(key for key, group in groups.items() if any(result.held_out is None for result in group))
    chosen_among = sorted(set(groups) - set(without))
    if not chosen_among:
        return without

    def merit(key: str) -> float:
        middle = spread([result.held_out for result in groups[key] if result.held_out is not None]).median
        return -math.inf if math.isnan(middle) else middle if groups[key][0].higher_is_better else -middle

    return [max(chosen_among, key=merit), *without]


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

    Of several settings it is the one with the best median on held-out rows, never by the score itself; those without such
    scores are rows of their own. Of two results with the same seed and settings the later counts.
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
        labels = _differences(counting) if len(counting) > 1 else {}
        if all(result.held_out is not None for result in groups[counting[0]]):
            labels.pop(counting[0], None)  # it was chosen, and has the row's own name
        for key in counting:
            name = f"{row} ({labels[key]})" if key in labels else row
            plain = key not in labels and groups[key][0].teacher is None
            scores.append(Score(row=name, task=task, results=tuple(groups[key]), plain=plain))
    return scores


class Average(NamedTuple):
    """A mean over tasks: how it is called, and which they are."""

    label: str
    tasks: tuple[str, ...]


def averages(scores: Sequence[Score], *anchors: str | None) -> list[Average]:
    """Return the means that rows can be compared by, those that more than one row has first: GLUE's, then the widest.

    GLUE's macro average, the plain mean of nine tasks as the paper takes it, where a row has them all; and for each row
    the mean of the tasks that it shares with all of ``anchors``, which are the teacher and the baseline, or else with the
    first row. Second distillations and rows of settings do not narrow what is shared.
    """
    tasks: dict[str, list[str]] = {}
    for score in scores:
        if score.plain and score.averaged:
            tasks.setdefault(score.row, []).append(score.task)
    fixed = [row for row in anchors if row in tasks] or list(tasks)[:1]
    first = tasks[fixed[0]] if fixed else []
    shared = {tuple(task for task in first if all(task in tasks[each] for each in (*fixed, row))) for row in tasks}
    shared = {names for names in shared if set(names) != set(GLUE_TASKS)} | {GLUE_TASKS}
    having = {names: sum(set(names) <= set(mine) for mine in tasks.values()) for names in shared if names}
    least = min(2, len(tasks))
    kept = [names for names, rows in having.items() if rows >= (1 if names == GLUE_TASKS else least)]
    sizes = Counter(map(len, kept))
    return [
        Average(_average_label(names, told_apart=sizes[len(names)] == 1), names)
        for names in sorted(kept, key=lambda names: (having[names] < least, names != GLUE_TASKS, -len(names), names))
    ]


def _average_label(tasks: tuple[str, ...], *, told_apart: bool) -> str:
    if tasks == GLUE_TASKS:
        return "GLUE average"
    if len(tasks) == 1:
        return tasks[0]
    return f"average of {len(tasks)} tasks" if told_apart else f"average of {', '.join(tasks)}"


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


TOKENIZER = {"vocabulary", "text_tokens"}  # what tells tokenizers apart


def unlike(mine: Score, theirs: Score) -> dict[str, tuple[Any, Any]]:
    """Return what was not the same when a language model was scored as the other one was, with both values.

    Of the ``TOKENIZER`` only where all else was: it leaves the perplexity per word comparable.
    """
    (one, *_), (other, *_) = mine.results, theirs.results
    if one.kind != "language_model":
        return {}
    names = sorted(one.settings.keys() | other.settings.keys())
    both = {name: (one.settings.get(name), other.settings.get(name)) for name in names}
    both |= {name: (one.details.get(name), other.details.get(name)) for name in ("words", "text_tokens")}
    differing = {
        name: values for name, values in both.items() if len({json.dumps(value, default=str) for value in values}) > 1
    }
    return {name: values for name, values in differing.items() if name not in TOKENIZER} or differing


def retention(scores: Sequence[Score], row: str, teacher: str, task: str) -> float | None:
    """Return the percentage of the teacher's median on a task that a row keeps.

    None where language models were scored in different ways; with different tokenizers it is that of perplexities a word.
    """
    mine, theirs = cell(scores, row, task), cell(scores, teacher, task)
    if mine is None or theirs is None:
        return None
    differing = unlike(mine, theirs)
    values: list[float | None] = [mine.median, theirs.median]
    if differing:
        values = [each.metric("word_perplexity") if differing.keys() <= TOKENIZER else None for each in (mine, theirs)]
    return share_kept(*values, higher_is_better=mine.higher_is_better)


def mean_retention(scores: Sequence[Score], row: str, teacher: str, tasks: Sequence[str]) -> float | None:
    """Return the row's mean over tasks as a percentage of the teacher's: a ratio of averages, as in the paper."""
    return share_kept(mean(scores, row, tasks), mean(scores, teacher, tasks), higher_is_better=True)


_ABLATION = re.compile(r"(?:^|.*[^a-z0-9])(full|no_ce|no_mlm|no_cos|random_init)$", re.IGNORECASE | re.DOTALL)


def ablation_row(name: str) -> tuple[str, str] | None:
    """Split a name that ends with a row of the ablation into what stands before and the row; None for any other."""
    found = _ABLATION.match(name)
    return (name[: found.start(1)], found[1].lower()) if found else None
