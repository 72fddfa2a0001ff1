"""What the rows files say of scores: their draws, the score of chance, and how near a student is to its teacher."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distilkit import metrics
from distilkit.errors import UserError
from distilkit.records import Array, Rows, read_rows
from distilkit.report.intervals import Sample, resample, rows_id, sample

_TOLERANCE = 1e-4  # between a recorded score and that of its rows


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of one task by row and metric, "" for its score, or why there is none; and the score of chance."""

    found: Mapping[tuple[str, str], Sample | str]
    chance: float | None

    def of(self, row: str | None, metric: str = "") -> Sample | None:
        """Return the sample of a row's score or metric, if there is one."""
        found = self.found.get((str(row), metric))
        return found if isinstance(found, Sample) else None


def metric_rows(result: Any) -> dict[str, Rows]:
    """Read the rows of each metric of a result, in the order of their ids; a metric that none has is left out."""
    read: dict[str, Rows | None] = {}
    for metric in result.scores if result.folder else ():
        split = metric.rpartition("/")[0] or next(iter(result.details.get("rows", ())), "")
        rows = read[split] if split in read else read_rows(result.folder, split)
        read[split] = read[metric] = rows and rows.take(np.argsort(rows.ids, kind="stable"))
    return {metric: rows for metric in result.scores if (rows := read.get(metric)) and _score(metric, rows) is not None}


def read_samples(cells: Sequence[Any]) -> Samples:
    """Draw the scores of all rows of a report on one task; ``cells`` are the lines of their scores."""
    rows: dict[tuple[str, int, str], Rows] = {}  # by row of the report, place of the seed and metric
    for cell in cells:
        for place, result in enumerate(cell.results):
            rows |= {(cell.row, place, metric): own for metric, own in metric_rows(result).items()}
    keys = {name: (name[2].rpartition("/")[0], rows_id(own)) for name, own in rows.items()}
    draws: dict[tuple[str, int, str], Array] = {}
    for key in dict.fromkeys(keys.values()):  # what was scored on the same rows is drawn together
        alike = [name for name in rows if keys[name] == key]
        drawn = resample([(rows[name], name[2].rpartition("/")[2]) for name in alike])
        draws |= dict(zip(alike, drawn, strict=True))
    names = [(cell, metric) for cell in cells for metric in ("", *cell.results[0].scores)]
    found = {(cell.row, metric): _sample(cell, metric, rows, draws, keys) for cell, metric in names}
    return Samples(found=found, chance=_chance(cells, rows))


def _score(metric: str, rows: Rows) -> float | None:
    """Score rows, or return None for a metric that is none of rows."""
    try:
        return metrics.score(metric.rpartition("/")[2], rows)
    except (UserError, KeyError, AttributeError, ValueError, TypeError):
        return None


def _parts(result: Any, metric: str) -> list[str]:
    """Return the metrics whose mean is a metric: itself, or those of a task's score."""
    if metric:
        return [metric]
    one = next((name for name, value in result.scores.items() if value == result.score), None)
    mean = statistics.fmean(result.scores.values()) if result.scores else result.score
    return list(result.scores) if abs(mean - result.score) <= 1e-9 or one is None else [one]


def _sample(cell: Any, metric: str, rows: Mapping[Any, Rows], draws: Mapping[Any, Array], keys: Any) -> Sample | str:
    """Return the sample of a cell's score or metric, or why it is without interval."""
    results = {place: each for place, each in enumerate(cell.results) if not metric or metric in each.scores}
    parts = _parts(next(iter(results.values())), metric)
    names = [[(cell.row, place, part) for part in parts] for place in results]
    if not parts or not all(name in draws for each in names for name in each):
        return "without interval, because there are no rows files"
    scores = [each.scores[metric] if metric else each.score for each in results.values()]
    if not np.isfinite(scores).all():
        return "without interval, because a seed has no number"
    for _, place, part in itertools.chain(*names):
        given, value = _score(part, rows[cell.row, place, part]), results[place].scores[part]
        if given is None or not abs(given - value) <= _TOLERANCE * max(1, abs(value)):
            return f"without interval, because {part} of its rows is {given} and not {value}"
    if len(own := {tuple(keys[name] for name in each) for each in names}) > 1:
        return "without interval, because seeds were scored on different rows"
    drawn = np.array([np.mean([draws[name] for name in each], axis=0) for each in names])
    if not np.isfinite(drawn).all():
        return "without interval, because it is not defined on each draw of its rows"
    seeded = cell.results[0].seed is not None
    return sample(float(np.median(scores)), scores, drawn, rows=own.pop(), seeded=seeded)


def _chance(cells: Sequence[Any], rows: Mapping[tuple[str, int, str], Rows]) -> float | None:
    """Score what says the commonest class of each split, or the mean, of the first cell with gold."""
    for cell in [cell for cell in cells if cell.results[0].scores]:
        found = []
        for own in (rows.get((cell.row, 0, part)) for part in _parts(cell.results[0], "")):
            if own is None or own.gold is None or own.said is None or own.gold.dtype.kind not in "iuf":
                break
            values, counts = np.unique(own.gold, return_counts=True)
            said = own.gold.mean() if own.gold.dtype.kind == "f" else values[counts.argmax()]
            logits = None
            if own.logits is not None:  # of probabilities that are the shares of classes
                shares = np.bincount(own.gold, minlength=own.logits.shape[1]) / len(own)
                logits = np.tile(np.log(shares.clip(min=1e-9)), (len(own), 1))
            found.append(Rows(ids=own.ids, gold=own.gold, said=np.full_like(own.gold, said), logits=logits))
        else:
            scores = [_score(part, own) for part, own in zip(_parts(cell.results[0], ""), found, strict=True)]
            return None if None in scores else statistics.fmean(score for score in scores if score is not None)
    return None


def fidelity(mine: Any, theirs: Any) -> dict[str, float]:
    """Return the agreement and the KL divergence of a cell with that of its teacher, as medians over seeds.

    Seeds of the same number are compared, or else with the teacher's first. Several splits count with their mean.
    """
    teachers = {result.seed: result for result in reversed(theirs.results)}
    found: dict[str, list[float]] = {}
    for result in mine.results:
        own, other = metric_rows(result), metric_rows(teachers.get(result.seed, theirs.results[0]))
        pairs = {id(own[metric]): (own[metric], other[metric]) for metric in own if metric in other}
        for name, measure in (("agreement", metrics.agreement), ("kl", metrics.kl)):
            values = [value for pair in pairs.values() if (value := measure(*pair)) is not None]
            found.setdefault(name, []).extend([statistics.fmean(values)] if values else [])
    return {name: statistics.median(values) for name, values in found.items() if values}
