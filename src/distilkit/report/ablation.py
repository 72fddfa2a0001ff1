"""The ablation: the change without each term of the objective and without the teacher's weights, next to table 4."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from distilkit.report.frame import Scores, task_label
from distilkit.report.page import Table, formatted
from distilkit.report.published import ABLATION

Run = Mapping[str, Any]  # a summary.json with its ``label`` and ``folder``
_ROW = re.compile(r"(?:^|.*[^a-z0-9])(full|no_ce|no_mlm|no_cos|random_init)$", re.IGNORECASE | re.DOTALL)


def ablation_row(name: str) -> tuple[str, str] | None:
    """Split a name that ends with a row of the ablation into its prefix and the row; None for any other name."""
    found = _ROW.match(name)
    return (name[: found.start(1)], found[1].lower()) if found else None


def _ablations(scores: Scores, runs: Sequence[Run]) -> Iterator[tuple[dict[str, str], dict[str, Run]]]:
    """Group ablations that have a full row: rows of scores by their prefix, runs by their sweep's folder.

    One group of rows and one group of runs belong together. Of several groups it is not known which do.
    """
    by_prefix: dict[str, dict[str, str]] = {}
    for row in scores.frame.loc[scores.frame["plain"].astype(bool), "row"].unique():
        if found := ablation_row(row):
            by_prefix.setdefault(found[0], {})[found[1]] = row
    by_sweep: dict[str, dict[str, Run]] = {}
    for run in runs:
        if found := ablation_row(str(run["label"])):
            by_sweep.setdefault(str(PurePath(run["folder"]).parent), {})[found[1]] = run
    scored = [rows for rows in by_prefix.values() if "full" in rows and len(rows) > 1]
    trained = [rows for rows in by_sweep.values() if "full" in rows and len(rows) > 1]
    if len(scored) == len(trained) == 1:
        yield scored[0], trained[0]
    else:
        yield from ((rows, {}) for rows in scored)
        yield from (({}, rows) for rows in trained)


def _minus(value: float | None, full: float | None) -> float | None:
    return None if value is None or full is None else value - full


def _records(scores: Scores, rows: Mapping[str, str], runs: Mapping[str, Run]) -> Iterator[dict[str, Any]]:
    averaged = set(scores.frame.loc[scores.frame["averaged"].astype(bool), "task"])
    tasks = [task for task in scores.tasks if task in averaged and all(scores.line(row, task) for row in rows.values())]
    means = {name: scores.mean(row, tasks) for name, row in rows.items()}
    average = {name: None if mean is None else 100 * mean for name, mean in means.items()}
    entropy = {name: run["after"].get("val/nll") for name, run in runs.items()}
    for name in ("full", *ABLATION):
        if name not in rows and name not in runs:
            continue
        record = {"row": name, "model": rows.get(name) or runs[name]["label"], "tasks": ", ".join(tasks)}
        change, more = (
            _minus(values.get(name), values.get("full")) if name != "full" else None for values in (average, entropy)
        )
        record |= {"average": average.get(name), "change": change, "cross_entropy": entropy.get(name)}
        record |= {"cross_entropy_change": more, "published_change": ABLATION.get(name), "signs_agree": "-"}
        better = _minus(0.0, more) if change is None else change  # a higher cross-entropy is worse
        if name in ABLATION and better is not None and not math.isnan(better):
            record["signs_agree"] = "yes" if better * ABLATION[name] > 0 else "no"
        yield record


def ablation_table(scores: Scores, runs: Sequence[Run]) -> Table | None:
    """Build the table of changes against the full objective next to those of the paper's table 4."""
    records = [record for rows, own in _ablations(scores, runs) for record in _records(scores, rows, own)]
    tasks = dict.fromkeys(task for record in records for task in record["tasks"].split(", ") if task)
    compared = [record["signs_agree"] for record in records if record["signs_agree"] != "-"]
    over = f"over {', '.join(map(task_label, tasks))}" if tasks else "(there is none: no task was scored for all rows)"
    columns = {"row": "{}", "average": "{:.1f}", "change": "{:+.2f}", "cross_entropy": "{:.3f}"}
    columns |= {"cross_entropy_change": "{:+.3f}", "published_change": "{:+.2f}", "signs_agree": "{}"}
    note = (
        f"Changes against the full objective at equal tokens: of the average score {over}, in points, and of the held-out "
        "cross-entropy in nats per token, where more is worse. Published: the paper's table 4, of the GLUE average. The "
        "sign is that of the average, or else of the cross-entropy, reversed; "
        f"{compared.count('yes')} of {len(compared)} agree with the paper's."
    )
    header = ["row", "average", "change", "cross-entropy", "its change", "published change", "signs agree"]
    rows = formatted(records, columns)
    return (
        Table(name="ablation", title="Ablation", header=header, rows=rows, records=records, notes=[note])
        if rows
        else None
    )
