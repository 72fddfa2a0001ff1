"""From timings to tables: size, latency and throughput of each model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distilkit.records import Result
from distilkit.report.medians import row_names
from distilkit.report.page import Table
from distilkit.report.tables import Roles, figure


def _against(details: Mapping[str, Any], backend: str) -> Iterator[str]:
    """Say how many times as fast this is as the models that were timed in turn with it."""
    for other, ratios in details.get("against", {}).items():
        for label, metric in (("latency", "latency_ms"), ("throughput", "sentences_per_second")):
            if f"{backend}/{metric}" in ratios:
                yield f"{label} {ratios[f'{backend}/{metric}']:.2f} x {other}"


def _later_last(results: Sequence[Result], teacher: str | None) -> list[tuple[str, Result]]:
    """Sort timings with their rows by date, the teacher's that were taken in a student's own run behind all others."""
    found: list[tuple[bool, str, str, Result]] = []
    beside: set[str] = set()  # whom the run that is being read has timed in turn, and are yet to come
    for row, result in zip(row_names(results), results, strict=True):
        if result.kind == "speed":
            in_turn = result.name in beside  # a run's results follow that of its model, which names the others
            beside = beside - {result.name} if in_turn else set(result.details.get("against", ()))
            found.append((in_turn and row == teacher, str(result.cost.get("date", "")), row, result))
    return [(row, result) for *_, row, result in sorted(found, key=lambda each: each[:2])]


def speeds(results: Sequence[Result], *, teacher: str | None) -> list[dict[str, Any]]:
    """List the timings: one record for each model, device and backend (``cpu``, ``cpu/onnx``), the later of two.

    Of the teacher's it is the one in turn with a student, where there is one.
    """
    rows = dict.fromkeys(row for row, result in zip(row_names(results), results, strict=True) if result.kind == "speed")
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for row, result in _later_last(results, teacher):
        for backend in dict.fromkeys(name.rpartition("/")[0] for name in result.scores if "/" in name):
            get = {name.rpartition("/")[2]: name for name in result.scores if name.rpartition("/")[0] == backend}
            values = {name: result.scores[full] for name, full in get.items()}
            device, _, runtime = backend.partition("/")  # cpu, cpu/onnx or cpu/onnx-int8
            size = f"{runtime.replace('-', '_')}_mb" if runtime else "file_mb"
            records[row, backend] = {
                "model": row,
                "backend": backend,
                "parameters": result.parameters,
                "parameters_without_embeddings": result.parameters_without_embeddings,
                "file_mb": result.scores.get(size),
                **{name: value for name, value in values.items() if not name.endswith("_mb")},
                "against": "; ".join(_against(result.details, backend)),
                "machine": result.details.get("processors", {}).get(device) or result.cost.get("machine", ""),
                "batch_sizes": " and ".join(map(str, result.settings.get("batch_sizes", ()))),
                "threads": result.details.get("threads"),
                "sentences": result.details.get("num_sentences"),
            }
    order = list(rows)
    return sorted(records.values(), key=lambda record: order.index(record["model"]))


def _conditions(records: Sequence[Mapping[str, Any]]) -> str:
    """Say how it was timed; where that differs, each of the values."""
    labels = {
        "batch_sizes": "batches of",
        "sentences": "sentences:",
        "threads": "CPU threads:",
        "machine": "measured on",
    }
    found = {name: dict.fromkeys(str(each[name]) for each in records if each[name]) for name in labels}
    said = ", ".join(f"{labels[name]} {' or '.join(values)}" for name, values in found.items() if values)
    return f" {said[0].upper()}{said[1:]}." if said else ""


def speed(results: Sequence[Result], roles: Roles) -> Table | None:
    """Lay out sizes, latencies and throughputs for each device and backend."""
    records = speeds(results, teacher=roles.teacher)
    records.sort(key=lambda record: (record["backend"], record["model"] != roles.teacher))
    rows = []
    for record in records:
        latency = figure(record.get("latency_ms"), "{:,.1f}")
        if "latency_ms_p10" in record and "latency_ms_p90" in record:
            latency += f" ({record['latency_ms_p10']:,.1f} to {record['latency_ms_p90']:,.1f})"
        sizes = (f"{record[name]:,}" for name in ("parameters", "parameters_without_embeddings"))
        rate = figure(record.get("sentences_per_second"), "{:,.1f}")
        rows.append([roles.label(record["model"]), record["backend"], *sizes, figure(record["file_mb"], "{:,.1f}")])
        rows[-1] += [latency, rate, record["against"] or "-"]
    if not rows:
        return None
    return Table(
        name="speed",
        title="Size and speed",
        header=[
            "model",
            "device and backend",
            "parameters",
            "without embeddings",
            "file MB",
            "latency ms",
            "sentences/s",
            "times as fast, timed in turn",
        ],
        rows=rows,
        records=records,
        notes=[
            "Latency of one batch of the first size: median (10th to 90th percentile) over batches. Sentences per second at "
            "the second size." + _conditions(records)
        ],
    )
