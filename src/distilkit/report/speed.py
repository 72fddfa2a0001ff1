"""The size and speed of each model: parameters, latency and throughput on each device and backend."""

from collections.abc import Mapping
from typing import Any

from distilkit.report.drawing import Point, png, scatter
from distilkit.report.frame import Scores
from distilkit.report.page import Plot, Table, figure, tabulate
from distilkit.report.quality import roles_caption, score_axis


def speeds(scores: Scores) -> list[dict[str, Any]]:
    """List one record for each model, device and backend (``cpu``, ``cpu/onnx``) of each run that timed models in turn.

    Runs are in the order of their dates. A run whose models were all timed again in the same way in a later one is left
    out. ``faster`` and ``more`` are the teacher's latency and the own throughput, as multiples, in the same run.
    """
    runs: dict[tuple[Any, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    timings = scores.results[scores.results["kind"] == "speed"].itertuples(index=False)
    for timing in sorted(timings, key=lambda each: str(each.cost.get("date", ""))):
        backends: dict[str, dict[str, float]] = {"": {}}  # the sizes of files have no backend
        for name, value in timing.scores.items():
            backend, _, metric = name.rpartition("/")
            backends.setdefault(backend, {})[metric] = value
        files = backends.pop("")
        about = {"parameters": timing.parameters, "parameters_without_embeddings": timing.parameters_without_embeddings}
        how = {"batch_sizes": " and ".join(map(str, timing.settings.get("batch_sizes", ())))}
        how |= {"threads": timing.details.get("threads"), "sentences": timing.details.get("num_sentences")}
        for backend, values in backends.items():
            device, _, runtime = backend.partition("/")  # cpu, cpu/onnx or cpu/onnx-int8
            size = files.get(f"{runtime.replace('-', '_')}_mb" if runtime else "file_mb")
            record = {"model": timing.row, "backend": backend, **about, "file_mb": size}
            record |= {name: value for name, value in values.items() if not name.endswith("_mb")}
            machine = timing.details.get("processors", {}).get(device) or timing.cost.get("machine", "")
            record["pass_sentences"] = timing.details.get("pass_sentences", 0)
            record |= {"machine": machine, **how, "date": str(timing.cost.get("date", ""))[:10]}
            runs.setdefault((machine, *how.values(), timing.folder), {})[timing.row, backend] = record
    kept: list[tuple[Any, dict[tuple[str, str], dict[str, Any]]]] = []
    for (*conditions, _), run in reversed(runs.items()):
        if not any(conditions == other and run.keys() <= again.keys() for other, again in kept):
            kept.insert(0, (conditions, run))
    for number, (_, run) in enumerate(kept, 1):
        for (_, backend), record in run.items():
            teacher = run.get((scores.teacher or "", backend), record)
            for key, name, power in (("faster", "latency_ms", -1), ("more", "sentences_per_second", 1)):
                if teacher is not record and name in record and name in teacher:
                    record[key] = (record[name] / teacher[name]) ** power
            record["run"] = number
    return [record for _, run in kept for record in run.values()]


def _conditions(record: Mapping[str, Any]) -> str:
    """Return where and how a run was timed."""
    labels = {"batch_sizes": "batches of", "sentences": "sentences:", "threads": "CPU threads:"}
    said = [f"{label} {record[name]}" for name, label in labels.items() if record[name]]
    return ", ".join(part for part in (record["machine"], *said, record["date"]) if part)


def speed_tables(scores: Scores) -> list[Table]:
    """Build a table of sizes, latencies and throughputs for each run and machine, for each device and backend."""
    tables, runs = [], dict[int, list[dict[str, Any]]]()
    for record in speeds(scores):
        runs.setdefault(record["run"], []).append(record)
    for number, found in runs.items():
        records = sorted(found, key=lambda record: (record["backend"], record["model"] != scores.teacher))
        cells = []
        for one in records:
            latency = figure(one.get("latency_ms"), "{:,.1f}")
            if "latency_ms_p10" in one and "latency_ms_p90" in one:
                latency += f" ({one['latency_ms_p10']:,.1f} to {one['latency_ms_p90']:,.1f})"
            cells.append({**one, "model": scores.label(one["model"]), "latency": latency})
        columns = {"model": "{}", "backend": "device and backend {}", "parameters": "{:,}"}
        columns |= {"parameters_without_embeddings": "without embeddings {:,}", "file_mb": "file MB {:,.1f}"}
        columns |= {"latency": "latency ms {}", "faster": "times the teacher's speed {:.2f}"}
        columns |= {"sentences_per_second": "sentences/s {:,.1f}", "more": "times the teacher's sentences/s {:.2f}"}
        note = "Latency of one batch of the first size: median (10th to 90th percentile) over batches. Sentences per second "
        note += f"at the second size. Measured on {_conditions(records[0])}."
        title = "Size and speed" + (f", run {number} of {len(runs)}" if len(runs) > 1 else "")
        name = "speed" if number == 1 else f"speed_{number}"
        tables += [table] if (table := tabulate(name, title, records, columns, note, cells=cells)) else []
    if len(runs) > 1:
        tables[0].notes.append("Latencies of different runs do not compare: time the models in one, with task.against.")
    return tables


def latency_plot(scores: Scores) -> Plot | None:
    """Plot the average score against the latency, a panel for each run, device and backend, below each other.

    The scores are not of int8.
    """
    label, values = score_axis(scores)
    panels: dict[str, list[Point]] = {}
    timings = speeds(scores)
    several = len({record["run"] for record in timings}) > 1
    for one in timings:
        name, backend = one["model"], one["backend"]
        if name in values and "latency_ms" in one and not backend.endswith("int8"):
            at = {"x": one["latency_ms"], "low": one.get("latency_ms_p10"), "high": one.get("latency_ms_p90")}
            title = f"{backend}, {one['machine']}" + (f", run {one['run']}" if several else "")
            panels.setdefault(title, []).append(values[name]._replace(**at))
    panels = {title: points for title, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    x = "latency of one batch (ms), median, 10th to 90th percentile"
    sizes = " or ".join(dict.fromkeys(record["batch_sizes"].partition(" ")[0] for record in timings))
    caption = f"{label} against latency{f' at batch {sizes}' if sizes else ''}{roles_caption(scores)}."
    return Plot(name="quality_latency", caption=caption, png=png(scatter(panels, scores, x=x, y=label)))
