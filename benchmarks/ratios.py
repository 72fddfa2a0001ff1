"""Ratios of distilkit to the naive variants of the same run."""

from collections.abc import Mapping
from typing import Any

from benchmarks.data_path import MAPPED, OURS

Record = Mapping[str, Any]


def ratios(results: Mapping[str, Any]) -> dict[str, float]:
    """Return by what factor distilkit is faster, and which share of the memory it takes.

    Speed is compared with malloc thresholds raised on both sides, memory with the default ones; both settings favour the
    naive variants. A ratio whose records are missing is left out, and so is the speed of an emulated precision.
    """
    fast = results["fast_precision"]
    timed = {record["variant"]: record for record in results["steps"] if record["malloc"] == "raised"}
    weighed = {record["variant"]: record for record in results["steps"] if record["malloc"] == "default"}
    losses = {record["variant"]: record for record in results["losses"]}
    data = {record["variant"]: record for record in results["data"]}
    rate, peak = "tokens_per_core_second", "peak_mb"
    naive = ("fp32",) if fast == "fp32" else ("bf16", "fp32")  # without bf16 units, bf16 is emulated

    found = {}
    for rows in ("all", "masked"):
        ours = f"ours {fast}, {rows} rows"
        for precision in naive:
            what = f"step, {rows} rows: times the speed of naive {precision}"
            found[what] = _ratio(timed, ours, f"naive {precision}, {rows} rows", rate)
        what = f"step, {rows} rows: share of the memory of naive bf16"
        found[what] = _ratio(weighed, ours, f"naive bf16, {rows} rows", peak)
    for precision in naive:
        what = f"loss alone: times the speed of naive {precision}"
        found[what] = _ratio(losses, f"ours {fast}", f"naive {precision}", rate)
    compiled = f"full logits, compiled {fast}"
    found["loss alone: times the speed of compiled full logits"] = _ratio(losses, f"ours {fast}", compiled, rate)
    hard = f"torch, hard targets {fast}"
    found["hard targets: times the speed of torch's"] = _ratio(losses, f"ours, hard targets {fast}", hard, rate)
    found["hard targets: share of the memory of torch's"] = _ratio(losses, f"ours, hard targets {fast}", hard, peak)
    found["loss alone: times the speed of Liger"] = _ratio(losses, f"ours {fast}", f"Liger, chunked {fast}", rate)
    found["loss alone: share of the memory of naive bf16"] = _ratio(losses, f"ours {fast}", "naive bf16", peak)
    found["data path: times the speed of transformers' collator"] = _ratio(data, OURS, MAPPED, rate)
    return {what: ratio for what, ratio in found.items() if ratio is not None}


def _ratio(records: Mapping[str, Record], ours: str, other: str, key: str) -> float | None:
    figure, base = (records.get(name, {}).get(key) for name in (ours, other))
    return None if figure is None or not base else float(figure / base)
