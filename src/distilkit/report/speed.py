"""The size and speed of each model: parameters, latency and throughput on each device and backend."""

from collections.abc import Mapping
from typing import Any

from distilkit.report.drawing import Point, png, scatter
from distilkit.report.frame import Scores
from distilkit.report.page import Plot, Table, figure, tabulate
from distilkit.report.quality import roles_caption, score_axis


def _against(details: Mapping[str, Any], backend: str) -> str:
    """Describe how many times as fast this is as the models that were timed in turn with it."""
    metrics = {"latency": f"{backend}/latency_ms", "throughput": f"{backend}/sentences_per_second"}
    return "; ".join(
        f"{label} {ratios[metric]:.2f} x {other}"
        for other, ratios in details.get("against", {}).items()
        for label, metric in metrics.items()
        if metric in ratios
    )


def _sorted_timings(scores: Scores) -> list[Any]:
    """Sort timings by date, and put the teacher's that were taken in a student's run behind all others."""
    found: list[tuple[bool, str, Any]] = []
    expected: set[str] = set()  # models that the current run has timed in turn, without a result so far
    for timing in scores.results[scores.results["kind"] == "speed"].itertuples(index=False):
        in_turn = timing.name in expected  # a run's results follow that of its model, which names the others
        expected = expected - {timing.name} if in_turn else set(timing.details.get("against", ()))
        found.append((in_turn and timing.row == scores.teacher, str(timing.cost.get("date", "")), timing))
    return [timing for *_, timing in sorted(found, key=lambda each: each[:2])]


def speeds(scores: Scores) -> list[dict[str, Any]]:
    """List one record for each model, device and backend (``cpu``, ``cpu/onnx``): of two timings the last as sorted."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for timing in _sorted_timings(scores):
        backends: dict[str, dict[str, float]] = {"": {}}  # the sizes of files have no backend
        for name, value in timing.scores.items():
            backend, _, metric = name.rpartition("/")
            backends.setdefault(backend, {})[metric] = value
        files = backends.pop("")
        about = {"parameters": timing.parameters, "parameters_without_embeddings": timing.parameters_without_embeddings}
        conditions = {"batch_sizes": " and ".join(map(str, timing.settings.get("batch_sizes", ())))}
        conditions |= {"threads": timing.details.get("threads"), "sentences": timing.details.get("num_sentences")}
        for backend, values in backends.items():
            device, _, runtime = backend.partition("/")  # cpu, cpu/onnx or cpu/onnx-int8
            size = files.get(f"{runtime.replace('-', '_')}_mb" if runtime else "file_mb")
            record = {"model": timing.row, "backend": backend, **about, "file_mb": size}
            record |= {name: value for name, value in values.items() if not name.endswith("_mb")}
            machine = timing.details.get("processors", {}).get(device) or timing.cost.get("machine", "")
            record |= {"against": _against(timing.details, backend), "machine": machine, **conditions}
            records[timing.row, backend] = record
    order = list(scores.results.loc[scores.results["kind"] == "speed", "row"])
    return sorted(records.values(), key=lambda record: order.index(record["model"]))


def speed_table(scores: Scores) -> Table | None:
    """Build the table of sizes, latencies and throughputs for each device and backend."""
    records = sorted(speeds(scores), key=lambda record: (record["backend"], record["model"] != scores.teacher))
    cells = []
    for one in records:
        latency = figure(one.get("latency_ms"), "{:,.1f}")
        if "latency_ms_p10" in one and "latency_ms_p90" in one:
            latency += f" ({one['latency_ms_p10']:,.1f} to {one['latency_ms_p90']:,.1f})"
        cells.append({**one, "model": scores.label(one["model"]), "latency": latency, "against": one["against"] or "-"})
    columns = {"model": "{}", "backend": "device and backend {}", "parameters": "{:,}"}
    columns |= {"parameters_without_embeddings": "without embeddings {:,}", "file_mb": "file MB {:,.1f}"}
    columns |= {"latency": "latency ms {}", "sentences_per_second": "sentences/s {:,.1f}"}
    columns |= {"against": "times as fast, timed in turn {}"}
    labels = {"batch_sizes": "batches of", "sentences": "sentences:"}
    labels |= {"threads": "CPU threads:", "machine": "measured on"}
    used = {name: dict.fromkeys(str(each[name]) for each in records if each[name]) for name in labels}
    timed = ", ".join(f"{labels[name]} {' or '.join(values)}" for name, values in used.items() if values)
    note = (
        "Latency of one batch of the first size: median (10th to 90th percentile) over batches. Sentences per second "
    )
    note += "at the second size." + (f" {timed[0].upper()}{timed[1:]}." if timed else "")
    return tabulate("speed", "Size and speed", records, columns, note, cells=cells)


def latency_plot(scores: Scores) -> Plot | None:
    """Plot the average score against the latency, one panel for each device and backend. The scores are not of int8."""
    label, values = score_axis(scores)
    timings = speeds(scores)
    panels: dict[str, list[Point]] = {}
    for one in timings:
        name, backend = one["model"], one["backend"]
        if name in values and "latency_ms" in one and not backend.endswith("int8"):
            place = name, one["latency_ms"], values[name], one.get("latency_ms_p10"), one.get("latency_ms_p90")
            panels.setdefault(f"score against latency: {backend}", []).append(Point(*place))
    panels = {title: points for title, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    x = "latency of one batch (ms), median, 10th to 90th percentile"
    sizes = " or ".join(dict.fromkeys(record["batch_sizes"].partition(" ")[0] for record in timings))
    caption = f"Average score against latency{f' at batch {sizes}' if sizes else ''}{roles_caption(scores)}."
    return Plot(name="quality_latency", caption=caption, png=png(scatter(panels, scores, x=x, y=label)))
