"""The size and speed of each model: parameters, latency and throughput on each device and backend."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distilkit.report.drawing import Point, png, scatter
from distilkit.report.frame import Scores
from distilkit.report.page import Plot, Table, figure
from distilkit.report.quality import roles_caption, score_axis


def _against(details: Mapping[str, Any], backend: str) -> Iterator[str]:
    """Describe how many times as fast this is as the models that were timed in turn with it."""
    for other, ratios in details.get("against", {}).items():
        for label, metric in (("latency", "latency_ms"), ("throughput", "sentences_per_second")):
            if f"{backend}/{metric}" in ratios:
                yield f"{label} {ratios[f'{backend}/{metric}']:.2f} x {other}"


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
    """List the timings: one record for each model, device and backend (``cpu``, ``cpu/onnx``), the later of two.

    For the teacher it is the one in turn with a student, if there is one.
    """
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for timing in _sorted_timings(scores):
        backends: dict[str, dict[str, float]] = {}
        for name, value in timing.scores.items():
            backend, _, metric = name.rpartition("/")
            backends.setdefault(backend, {})[metric] = value
        files = backends.pop("", {})
        for backend, values in backends.items():
            device, _, runtime = backend.partition("/")  # cpu, cpu/onnx or cpu/onnx-int8
            records[timing.row, backend] = {
                "model": timing.row,
                "backend": backend,
                "parameters": timing.parameters,
                "parameters_without_embeddings": timing.parameters_without_embeddings,
                "file_mb": files.get(f"{runtime.replace('-', '_')}_mb" if runtime else "file_mb"),
                **{name: value for name, value in values.items() if not name.endswith("_mb")},
                "against": "; ".join(_against(timing.details, backend)),
                "machine": timing.details.get("processors", {}).get(device) or timing.cost.get("machine", ""),
                "batch_sizes": " and ".join(map(str, timing.settings.get("batch_sizes", ()))),
                "threads": timing.details.get("threads"),
                "sentences": timing.details.get("num_sentences"),
            }
    order = list(scores.results.loc[scores.results["kind"] == "speed", "row"])
    return sorted(records.values(), key=lambda record: order.index(record["model"]))


def _conditions(records: Sequence[Mapping[str, Any]]) -> str:
    """Describe how models were timed, with all values if these differ."""
    labels = {
        "batch_sizes": "batches of",
        "sentences": "sentences:",
        "threads": "CPU threads:",
        "machine": "measured on",
    }
    found = {name: dict.fromkeys(str(each[name]) for each in records if each[name]) for name in labels}
    text = ", ".join(f"{labels[name]} {' or '.join(values)}" for name, values in found.items() if values)
    return f" {text[0].upper()}{text[1:]}." if text else ""


def speed_table(scores: Scores) -> Table | None:
    """Build the table of sizes, latencies and throughputs for each device and backend."""
    records = sorted(speeds(scores), key=lambda record: (record["backend"], record["model"] != scores.teacher))
    rows = []
    for record in records:
        latency = figure(record.get("latency_ms"), "{:,.1f}")
        if "latency_ms_p10" in record and "latency_ms_p90" in record:
            latency += f" ({record['latency_ms_p10']:,.1f} to {record['latency_ms_p90']:,.1f})"
        sizes = (f"{record[name]:,}" for name in ("parameters", "parameters_without_embeddings"))
        rows.append([scores.label(record["model"]), record["backend"], *sizes, figure(record["file_mb"], "{:,.1f}")])
        rows[-1] += [latency, figure(record.get("sentences_per_second"), "{:,.1f}"), record["against"] or "-"]
    header = ["model", "device and backend", "parameters", "without embeddings", "file MB", "latency ms", "sentences/s"]
    header.append("times as fast, timed in turn")
    note = (
        "Latency of one batch of the first size: median (10th to 90th percentile) over batches. Sentences per second at the "
        "second size." + _conditions(records)
    )
    title = "Size and speed"
    return Table(name="speed", title=title, header=header, rows=rows, records=records, notes=[note]) if rows else None


def latency_plot(scores: Scores) -> Plot | None:
    """Plot the average score against the latency, one panel for each device and backend. The scores are not of int8."""
    label, values = score_axis(scores)
    timings = speeds(scores)
    panels: dict[str, list[Point]] = {}
    for record in timings:
        if record["model"] in values and "latency_ms" in record and not record["backend"].endswith("int8"):
            ends = record.get("latency_ms_p10"), record.get("latency_ms_p90")
            point = Point(record["model"], record["latency_ms"], values[record["model"]], *ends)
            panels.setdefault(f"score against latency: {record['backend']}", []).append(point)
    panels = {title: points for title, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    x = "latency of one batch (ms), median, 10th to 90th percentile"
    sizes = " or ".join(dict.fromkeys(record["batch_sizes"].partition(" ")[0] for record in timings))
    caption = f"Average score against latency{f' at batch {sizes}' if sizes else ''}{roles_caption(scores)}."
    return Plot(name="quality_latency", caption=caption, png=png(scatter(panels, scores, x=x, y=label)))
