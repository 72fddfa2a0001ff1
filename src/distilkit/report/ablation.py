"""The ablation: the change without each term of the objective and without the teacher's weights, next to table 4."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from distilkit.report.frame import Scores, task_label
from distilkit.report.page import Table, figure, tabulate
from distilkit.report.published import ABLATION

Run = Mapping[str, Any]  # a summary.json with its ``label`` and ``folder``
_ROW = re.compile(r"(?:^|.*[^a-z0-9])(full|no_ce|no_mlm|no_cos|random_init)$", re.IGNORECASE | re.DOTALL)


def ablation_row(name: str) -> tuple[str, str] | None:
    """Split a name that ends with a row of the ablation into its prefix and the row; None for any other name."""
    found = _ROW.match(name)
    return (name[: found.start(1)], found[1].lower()) if found else None


def _groups(named: Iterable[tuple[str, str | None, Any]]) -> list[dict[str, Any]]:
    """Group rows of ablations by sweep, or else by the prefix of their name; a group needs a full row."""
    groups: dict[str, dict[str, Any]] = {}
    for name, sweep, value in named:
        if found := ablation_row(name):
            groups.setdefault(found[0] if sweep is None else sweep, {})[found[1]] = value
    return [group for group in groups.values() if "full" in group and len(group) > 1]


def _records(scores: Scores, rows: Mapping[str, str], runs: Mapping[str, Run]) -> Iterator[dict[str, Any]]:
    averaged = set(scores.frame.loc[scores.frame["averaged"], "task"])
    tasks = [task for task in scores.tasks if task in averaged and all(scores.line(row, task) for row in rows.values())]
    percents = {name: 100 * mean for name, row in rows.items() if (mean := scores.mean(row, tasks)) is not None}
    entropy = {name: run["after"].get("val/nll") for name, run in runs.items()}
    for name in [name for name in ("full", *ABLATION) if name in rows or name in runs]:
        both = [(values.get(name), values.get("full")) for values in (percents, entropy)]
        change, more = (None if name == "full" or a is None or b is None else a - b for a, b in both)
        record = {"row": name, "model": rows.get(name) or runs[name]["label"], "tasks": ", ".join(tasks)}
        record |= {"average": percents.get(name), "change": change, "cross_entropy": entropy.get(name)}
        record |= {"cross_entropy_change": more, "published_change": ABLATION.get(name), "verdict": "-"}
        if change is not None:
            own = rows[name], rows["full"]
            range_ = scores.difference(*own, tasks)
            record |= {"low": 100 * range_.low, "high": 100 * range_.high} if range_ else {}
            holds = "holds" if range_ and range_.holds(ABLATION[name] / 100) else "excludes"
            shown = "no difference shown" if range_ and range_.holds(0) else "a difference"
            shown = "1 seed" if scores.seeds(own, tasks) == 1 and shown == "a difference" else shown
            record["verdict"] = f"{shown}; {holds} the published" if range_ else "no interval"
            if scores.unlike(own[0], *tasks, other=own[1]):
                record["verdict"] = "fine-tuned differently"
        yield record


def ablation_table(scores: Scores, runs: Sequence[Run]) -> Table | None:
    """Build the table of changes against the full objective next to those of the paper's table 4."""
    scored = _groups((row, None, row) for row in scores.frame.loc[scores.frame["plain"], "row"].unique())
    trained = _groups((str(run["label"]), str(PurePath(run["folder"]).parent), run) for run in runs)
    pairs: list[tuple[Run, Run]] = [(rows, {}) for rows in scored] + [({}, rows) for rows in trained]
    if len(scored) == len(trained) == 1:  # they belong together; of several it is not known which do
        pairs = [(scored[0], trained[0])]
    records = [record for rows, own in pairs for record in _records(scores, rows, own)]
    tasks = dict.fromkeys(task for record in records for task in record["tasks"].split(", ") if task)
    over = f"over {', '.join(map(task_label, tasks))}" if tasks else "(there is none: no task was scored for all rows)"
    columns = {"row": "{}", "average": "{:.1f}", "change": "{}", "cross_entropy": "cross-entropy {:.3f}"}
    columns |= {"cross_entropy_change": "its change {:+.3f}", "published_change": "{:+.2f}"}
    columns |= {"verdict": "95 % interval of the change {}"}
    note = (
        f"Changes against the full objective at equal tokens: of the average score {over}, in points, and of the "
        "held-out cross-entropy in nats per token, where more is worse. Published: the paper's table 4, of the GLUE "
        "average. Seeds are of fine-tuning; each objective was distilled once."
    )
    half = [f" ± {(each['high'] - each['low']) / 2:.2f}" if "high" in each else "" for each in records]
    changes = [figure(each["change"], "{:+.2f}") + more for each, more in zip(records, half, strict=True)]
    cells = [{**each, "change": change} for each, change in zip(records, changes, strict=True)]
    return tabulate("ablation", "Ablation", records, columns, note, cells=cells)
