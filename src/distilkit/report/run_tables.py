"""From runs to tables: the ablation, the training runs, and what fine-tuning and scoring cost."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf

from distilkit.records import Result
from distilkit.report.medians import Score, ablation_row, mean, row_names
from distilkit.report.page import Table
from distilkit.report.published import ABLATION
from distilkit.report.tables import figure, ordered_tasks, task_label

Run = Mapping[str, Any]  # a summary.json with its ``label`` and ``folder``


def _ablations(scores: Sequence[Score], runs: Sequence[Run]) -> Iterator[tuple[dict[str, str], dict[str, Run]]]:
    """Gather ablations that have a full row: rows of scores by a common prefix, runs by their sweep's folder.

    Where there is one of each, they are one; otherwise nothing tells which belong together.
    """
    by_prefix: dict[str, dict[str, str]] = {}
    for score in scores:
        found = ablation_row(score.row)
        if found and score.plain:
            by_prefix.setdefault(found[0], {})[found[1]] = score.row
    by_sweep: dict[str, dict[str, Run]] = {}
    for run in runs:
        found = ablation_row(str(run["label"]))
        if found:
            by_sweep.setdefault(str(PurePath(run["folder"]).parent), {})[found[1]] = run
    scored = [rows for rows in by_prefix.values() if "full" in rows and len(rows) > 1]
    trained = [rows for rows in by_sweep.values() if "full" in rows and len(rows) > 1]
    if len(scored) == len(trained) == 1:
        yield scored[0], trained[0]
    else:
        yield from ((rows, {}) for rows in scored)
        yield from (({}, rows) for rows in trained)


def _signs(change: float | None, published: float) -> str:
    if change is None or math.isnan(change):
        return "-"
    return "yes" if change * published > 0 else "no"


def _ablation_records(
    scores: Sequence[Score], rows: Mapping[str, str], runs: Mapping[str, Run]
) -> list[dict[str, Any]]:
    tasks = [
        task
        for task in ordered_tasks(score for score in scores if score.averaged)
        if all(mean(scores, row, [task]) is not None for row in rows.values())
    ]
    average = {name: mean(scores, row, tasks) for name, row in rows.items()}
    entropy = {name: run["after"].get("val/nll") for name, run in runs.items()}
    records = []
    for name in ("full", *ABLATION):
        if name not in rows and name not in runs:
            continue
        mine, full = average.get(name), average.get("full")
        change = None if mine is None or full is None or name == "full" else 100 * (mine - full)
        nll, full_nll = entropy.get(name), entropy.get("full")
        record = {
            "row": name,
            "model": rows.get(name) or runs[name]["label"],
            "tasks": ", ".join(tasks),
            "average": None if mine is None else 100 * mine,
            "change": change,
            "cross_entropy": nll,
            "cross_entropy_change": None if nll is None or full_nll is None or name == "full" else nll - full_nll,
            "published_change": ABLATION.get(name),
        }
        worse = change
        if worse is None and nll is not None and full_nll is not None:
            worse = full_nll - nll  # a higher cross-entropy is a worse one
        record["signs_agree"] = _signs(worse, ABLATION[name]) if name in ABLATION else "-"
        records.append(record)
    return records


def ablation(scores: Sequence[Score], runs: Sequence[Run]) -> Table | None:
    """Lay out what is lost without each term of the objective and without the teacher's weights, beside table 4."""
    records = [record for rows, own in _ablations(scores, runs) for record in _ablation_records(scores, rows, own)]
    if not records:
        return None
    tasks = dict.fromkeys(task for record in records for task in record["tasks"].split(", ") if task)
    compared = [record["signs_agree"] for record in records if record["signs_agree"] != "-"]
    over = f"over {', '.join(map(task_label, tasks))}" if tasks else "of no task, for none was scored for all rows"
    return Table(
        name="ablation",
        title="Ablation",
        header=["row", "average", "change", "cross-entropy", "its change", "published change", "signs agree"],
        rows=[
            [
                record["row"],
                figure(record["average"]),
                figure(record["change"], "{:+.2f}"),
                figure(record["cross_entropy"], "{:.3f}"),
                figure(record["cross_entropy_change"], "{:+.3f}"),
                figure(record["published_change"], "{:+.2f}"),
                record["signs_agree"],
            ]
            for record in records
        ],
        records=records,
        notes=[
            f"Changes against the full objective at equal tokens: of the average score {over}, in points, and of the "
            "held-out cross-entropy in nats per token, where more is worse. Published: the paper's table 4, of the GLUE "
            "average. The sign is that of the average or, where there is none, of the cross-entropy turned; "
            f"{compared.count('yes')} of {len(compared)} agree with the paper's."
        ],
    )


def teacher_label(teacher: Mapping[str, Any] | None) -> str:
    """Name a run's teacher: the student of another run by that run's folder, any other by its name."""
    if not teacher:
        return "none"
    path = PurePath(str(teacher["name"]))
    return path.parent.name if path.name == "student" and path.parent.name else str(path)


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Name runs so that no two have one name: by their label, with several sweeps by the run's and the sweep's name too."""
    labels = [str(run["label"]) for run in runs]
    if len(set(labels)) < len(labels):
        labels = [f"{run.get('name')}: {label}" for run, label in zip(runs, labels, strict=True)]
    if len(set(labels)) < len(labels):
        folders = [PurePath(run["folder"]).parent.name for run in runs]
        labels = [f"{label} ({folder})" for label, folder in zip(labels, folders, strict=True)]
    return labels


def _origin(run: Run) -> str:
    """Tell whether a run began with fresh weights, as its config says: ``init`` is random, or the model a new one."""
    file = Path(run["folder"]) / ".hydra" / "config.yaml"
    student = OmegaConf.select(OmegaConf.load(file), "student", default={}) if file.is_file() else {}
    fresh = student.get("init") == "random" or str(student.get("_target_")).endswith(".new_student")
    return "random init" if fresh else "-"


def training(runs: Sequence[Run]) -> Table | None:
    """Lay out how each student was trained, at what cost, and its held-out cross-entropy before and after."""
    if not runs:
        return None
    records = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        seconds, layers, objective = run.get("wall_seconds"), run.get("layers"), run.get("objective") or {}
        records.append(
            {
                "run": label,
                "teacher": teacher_label(run.get("teacher")),
                "parameters": run["student_parameters"],
                "layers": _origin(run) if layers is None else " ".join(map(str, layers)),
                "objective": ", ".join(f"{name.removeprefix('alpha_')} {value}" for name, value in objective.items()),
                "tokens": run["tokens_seen"],
                "hours": None if seconds is None else seconds / 3600,
                "tokens_per_second": run.get("tokens_per_second"),
                "peak_memory_mb": max((run.get("peak_memory_mb") or {}).values(), default=None),
                "before": run["before"].get("val/nll"),
                "after": run["after"].get("val/nll"),
                "teacher_cross_entropy": run["after"].get("val/teacher_nll"),
                "agreement": run["after"].get("val/agreement"),
                "folder": run["folder"],
            }
        )
    forms = {
        "parameters": "{:,}",
        "tokens": "{:,}",
        "hours": "{:.2f}",
        "tokens_per_second": "{:,.0f}",
        "peak_memory_mb": "{:,.0f}",
        "before": "{:.3f}",
        "after": "{:.3f}",
        "teacher_cross_entropy": "{:.3f}",
        "agreement": "{:.3f}",
    }
    names = [name for name in records[0] if name != "folder"]
    return Table(
        name="training",
        title="Training runs",
        header=[
            name.replace("_", " ").replace("tokens per second", "tokens/s").replace(" mb", " MB") for name in names
        ],
        rows=[[figure(record[name], forms.get(name, "{}")) for name in names] for record in records],
        records=records,
        notes=[
            "Before, after and teacher: cross-entropy in nats per labelled token on held-out documents. Agreement: share of "
            "labelled tokens for which student and teacher predict the same. Hours of training, validation not counted."
        ],
    )


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def cost(results: Sequence[Result]) -> Table | None:
    """Lay out what fine-tuning and scoring took: each row's and task's tokens and hours over all seeds and settings."""
    records: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row, result in zip(row_names(results), results, strict=True):
        if not result.cost:
            continue
        machine = str(result.cost.get("machine", "-"))
        record = records.setdefault(
            (row, result.task, machine),
            {"model": row, "task": result.task, "results": 0, "tokens": 0, "hours": 0.0, "machine": machine}
            | {"dates": [], "versions": []},
        )
        record["results"] += 1
        record["tokens"] += result.cost.get("tokens") or 0
        record["hours"] += (result.cost.get("seconds") or 0) / 3600
        record["dates"].append(str(result.cost.get("date", "-"))[:10])  # the day
        record["versions"].append(_versions(result.cost.get("versions", {})))
    if not records:
        return None
    every = list(dict.fromkeys(version for record in records.values() for version in record["versions"]))
    rows = []
    for record in records.values():
        dates = sorted(set(record["dates"]))
        record["dates"] = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        numbers = ", ".join(str(1 + every.index(version)) for version in dict.fromkeys(record["versions"]))
        record["versions"] = "; ".join(dict.fromkeys(record["versions"]))
        amounts = [str(record["results"]), f"{record['tokens']:,}", f"{record['hours']:.2f}"]
        rows.append(
            [record["model"], task_label(record["task"]), *amounts, record["machine"], record["dates"], numbers]
        )
    total = _total(records.values())
    return Table(
        name="cost",
        title="Cost of fine-tuning and scoring",
        header=["model", "task", "results", "tokens", "hours", "machine", "date", "versions"],
        rows=rows,
        records=list(records.values()),
        notes=[total, *(f"Versions {number}: {version}." for number, version in enumerate(every, 1))],
    )


def _total(records: Iterable[Mapping[str, Any]]) -> str:
    tokens, hours = (sum(record[name] for record in records) for name in ("tokens", "hours"))
    return f"All seeds and settings together: {tokens:,} tokens in {hours:.2f} hours."
