"""Equal rows: what the distilled student is worth against the LM loss alone, at equal time and at equal tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distilkit.metrics import nats_below
from distilkit.records import duration, read_rows
from distilkit.report.ablation import Run
from distilkit.report.frame import Scores, task_label
from distilkit.report.retention import verdicts

_UNLIKE = 0.1  # share by which two training times may differ and count as equal


def training_seconds(run: Run) -> float | None:
    """Return how long a run trained, without validation and compilation; older runs tell the former alone."""
    seconds: float | None = run.get("training_seconds", run.get("wall_seconds"))
    return seconds


def task_columns(scores: Scores, runs: Sequence[Run]) -> tuple[dict[str, str], list[dict[str, float]]]:
    """Return columns of tasks, and for each run its medians over seeds and what it keeps of the teacher's mean.

    Shares are in percent. There are none if labels of runs repeat, as over several sweeps: whose they are is not known.
    """
    labels = [str(run["label"]) for run in runs]
    found = [scores.of(label) if labels.count(label) == 1 else {} for label in labels]
    shares = {task: line.share for own in found for task, line in own.items()}
    columns = {task: f"{task_label(task)} {{:{',.2f' if not share else '.1f'}}}" for task, share in shares.items()}
    records = [{task: line.median * (100 if line.share else 1) for task, line in own.items()} for own in found]
    theirs = scores.of(scores.teacher)
    common = [task for task in theirs if theirs[task].averaged and all(task in own for own in found if own)]
    for label, own in zip(labels, records, strict=True):
        if common and own and (kept := scores.kept(label, *common)) is not None:
            own["kept"] = kept
            columns["kept"] = "kept, % {:.1f}"
    return columns, records


def with_teacher(runs: Sequence[Run]) -> list[Run]:
    """Put the teacher before the runs of a sweep, if all were scored beside the same one and it is not a run itself."""
    after = [run["after"] for run in runs]
    names = {str((run.get("teacher") or {}).get("name")) for run in runs}
    scored = {round(own["val/teacher_nll"], 4) for own in after if "val/teacher_nll" in own}
    if len(names) > 1 or len(scored) != 1 or any(run["label"] == "teacher" for run in runs):
        return [*runs]
    own = {f"val/{name}": after[0].get(f"val/teacher_{name}") for name in ("nll", "accuracy")}
    parameters = runs[0].get("teacher_parameters")
    return [{"label": "teacher", "student_parameters": parameters, "before": {}, "after": own}, *runs]


def equal_rows(runs: Sequence[Run], scores: Scores) -> list[str]:
    """Say which row is the better one at equal time and at equal tokens, by how much, and what the tasks show."""
    rows: dict[str, Any] = {str(run["label"]): run for run in runs if run["after"].get("val/nll") is not None}
    said = [_compare(rows, other) for other in ("baseline_time", "baseline") if {"distilled", other} <= rows.keys()]
    if not said:
        return []
    three = scores.only("teacher", "distilled", "baseline_time")
    tasks = verdicts(dataclasses.replace(three, teacher="teacher", baseline="baseline_time")) or [
        "they show nothing, for a row is missing or the teacher at chance."
        if scores.tasks
        else "none is scored; set versus.tasks=[rte]."
    ]
    return [*said, f"Held-out scores of the LM loss alone do not decide, tasks do: {' '.join(tasks)}"]


def _compare(rows: Mapping[str, Any], other: str) -> str:
    """Compare the distilled row with a baseline by held-out cross-entropy."""
    nll = {name: rows[name]["after"]["val/nll"] for name in ("distilled", other)}
    best, worst = sorted(nll, key=lambda name: nll[name])
    better, worse = (read_rows(rows[name]["folder"], "val") for name in (best, worst))
    same = better is not None and worse is not None and np.array_equal(better.ids, worse.ids)  # held-out blocks
    found = nats_below(worse, better) if same and better is not None else None
    gap, margin = nll[worst] - nll[best], None if found is None else found[1]
    interval = "" if margin is None else f" ± {margin:.3f}"
    by = f"{best} is better than {worst} by {gap:.3f}{interval} nats of held-out cross-entropy"
    by += " (no clear difference)" * (margin is not None and gap <= margin)
    ours, theirs = (training_seconds(rows[name]) for name in ("distilled", other))
    if ours is None or theirs is None:
        return f"{by[0].upper()}{by[1:]}."
    if other == "baseline":
        if len(seen := {rows[name]["tokens_seen"] for name in nll}) > 1:
            return f"There is no verdict at equal tokens: one row was trained on {min(seen):,}, the other on {max(seen):,}."
        return f"At equal tokens, {by}; distilled took {ours / max(theirs, 1e-9):.1f} times as long."
    if abs(ours - theirs) > _UNLIKE * ours:
        mine, its = duration(ours / 3600), duration(theirs / 3600)
        return f"There is no verdict at equal time: distilled trained for {mine}, {other} for {its}."
    return f"At equal time ({duration(ours / 3600)}), {by}."
