"""From timings to tables: size, latency and throughput of each model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distilkit.medians import row_names
from distilkit.pages import Table
from distilkit.results import Result
from distilkit.tables import Roles, figure


def _against(details: Mapping[str, Any], backend: str) -> Iterator[str]:
    """Say how many times as fast this is as the models that were timed in turn with it."""
    for other, ratios in details.get("against", {}).items():
        for label, metric in (("latency", "latency_ms"), ("throughput", "sentences_per_second")):
            if f"{backend}/{metric}" in ratios:
                yield f"{label} {ratios[f'{backend}/{metric}']:.2f} x {other}"


def speeds(results: Sequence[Result]) -> list[dict[str, Any]]:
    """List the timings: one record for each model, device and backend (``cpu``, ``cpu/onnx``), the later of two."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for row, result in zip(row_names(results), results, strict=True):
        if result.kind != "speed":
            continue
        backends = dict.fromkeys(name.rpartition("/")[0] for name in result.scores if "/" in name)
        for backend in backends or [""]:
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
            }
    return list(records.values())


def speed(results: Sequence[Result], roles: Roles) -> Table | None:
    """Lay out sizes, latencies at batch 1 and throughputs at batch 32 for each device and backend."""
    records = sorted(speeds(results), key=lambda record: (record["backend"], record["model"] != roles.teacher))
    rows = []
    for record in records:
        latency = figure(record.get("latency_ms"), "{:,.1f}")
        if "latency_ms_p10" in record and "latency_ms_p90" in record:
            latency += f" ({record['latency_ms_p10']:,.1f} to {record['latency_ms_p90']:,.1f})"
        sizes = (f"{record[name]:,}" for name in ("parameters", "parameters_without_embeddings"))
        rate = figure(record.get("sentences_per_second"), "{:,.1f}")
        rows.append([roles.label(record["model"]), record["backend"], *sizes, figure(record["file_mb"], "{:,.1f}")])
        rows[-1] += [latency, rate, record["against"] or "-"]
    machines = ", ".join(dict.fromkeys(record["machine"] for record in records if record["machine"]))
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
            "Latency of one sentence at batch 1: median (10th to 90th percentile). Sentences per second at batch 32."
            + (f" Measured on {machines}." if machines else "")
        ],
    )
