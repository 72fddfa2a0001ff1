"""What the figures are held against, and by how much they reach it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure with its aim; ``most`` turns the aim from a least into a most. Without an aim it is for information.

    ``incomparable`` says why the figure proves nothing on this machine.
    """

    what: str
    figure: float | None
    aim: float | None = None
    most: bool = False
    incomparable: str = ""

    @property
    def verdict(self) -> str:
        """Say reached, missed, not measured, why it cannot be judged, or nothing."""
        if self.figure is None:
            return "not measured"
        if self.aim is None:
            return ""
        if self.incomparable:
            return f"no comparison: {self.incomparable}"
        return "reached" if (self.figure <= self.aim if self.most else self.figure >= self.aim) else "missed"


def targets(results: Mapping[str, Any]) -> list[Target]:
    """Compare ours with naive, by the cautious setting: time with malloc thresholds raised on both sides, memory without.

    Raised thresholds spare naive more time than ours, and cost it more memory.
    """
    weights = {record["variant"]: record for record in results["steps"] if record["malloc"] == "default"}
    steps = {record["variant"]: record for record in results["steps"] if record["malloc"] == "raised"}
    losses = {record["variant"]: record for record in results["losses"]}
    data = {record["variant"]: record for record in results["data"]}
    fast = results["fast_precision"]
    incomparable = "bf16 is emulated here" if fast == "fp32" else ""
    rate = "tokens_per_core_second"
    ours, masked, loss = f"ours {fast}, all rows", f"ours {fast}, masked rows", f"ours {fast}"
    data_rate = _ratio(data, "ours", None, rate)
    return [
        Target(
            "step, all rows: times naive bf16",
            _ratio(steps, ours, "naive bf16, all rows", rate),
            1.8,
            incomparable=incomparable,
        ),
        Target("step, all rows: times naive fp32", _ratio(steps, ours, "naive fp32, all rows", rate), 3.6),
        Target("step, all rows: times the faster of the two", _against_faster(steps, ours, ", all rows", rate)),
        Target(
            "step, masked rows: times naive bf16",
            _ratio(steps, masked, "naive bf16, masked rows", rate),
            2.1,
            incomparable=incomparable,
        ),
        Target("step, masked rows: times the faster naive", _against_faster(steps, masked, ", masked rows", rate)),
        Target(
            "step, all rows: share of naive bf16's memory",
            _ratio(weights, ours, "naive bf16, all rows", "peak_mb"),
            0.4,
            most=True,
        ),
        Target(
            "loss alone: times naive bf16", _ratio(losses, loss, "naive bf16", rate), 3.0, incomparable=incomparable
        ),
        Target("loss alone: times the faster naive", _against_faster(losses, loss, "", rate)),
        Target(
            "loss alone: times the compiled full logits", _ratio(losses, loss, f"full logits, compiled {fast}", rate)
        ),
        Target(
            "loss alone: share of naive bf16's memory", _ratio(losses, loss, "naive bf16", "peak_mb"), 1 / 6, most=True
        ),
        Target("data path: million tokens per core-second", data_rate and 1e-6 * data_rate, 20.0),
    ]


def _ratio(records: Mapping[str, Record], ours: str, other: str | None, key: str) -> float | None:
    figure = records.get(ours, {}).get(key)
    if figure is None or other is None:
        return figure
    base = records.get(other, {}).get(key)
    return float(figure / base) if base else None


def _against_faster(records: Mapping[str, Record], ours: str, suffix: str, key: str) -> float | None:
    rivals: Sequence[str] = [name for name in ("naive fp32" + suffix, "naive bf16" + suffix) if name in records]
    return min((ratio for name in rivals if (ratio := _ratio(records, ours, name, key))), default=None)
