"""The arithmetic of a forecast: from measured seconds, tokens and watts to hours, money and energy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distilkit.errors import UserError
from distilkit.records import duration
from distilkit.watch.memory import megabytes

_FASTER = 1.05  # times the tokens per second that are worth a word


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The node ``plan`` of the config; a wrong value raises a ``UserError`` that names its key."""

    steps: int
    seconds: float
    memory_share: float
    devices: list[int]
    scaling: float
    price_per_hour: float | None
    alternatives: list[str]
    examples: int
    file: str | None

    def __post_init__(self) -> None:
        """Check the values before a model is loaded."""
        for key, least in (("steps", 1), ("seconds", 1), ("examples", 0), ("price_per_hour", 0), ("devices", 1)):
            value = getattr(self, key)
            if value is not None and (min(value, default=1) if key == "devices" else value) < least:
                raise UserError(f"plan.{key}={value}, but it must be at least {least}")
        for key in ("memory_share", "scaling"):
            if not 0 < (value := getattr(self, key)) <= 1:
                raise UserError(f"plan.{key}={value}, but it must be above 0 and at most 1")
        if wrong := set(self.alternatives) - {"masked", "minilm", "bf16", "shorter"}:
            raise UserError(f"plan.alternatives has {wrong.pop()}, but it takes masked, minilm, bf16, shorter")


def steps_of(blocks: int, *, batch_size: int, max_epochs: int | None, max_steps: int) -> tuple[float, str]:
    """Return the optimizer steps of a training, a smaller one of an epoch's end as a part, and what ends it."""
    per_epoch = blocks / batch_size
    by_epochs = math.inf if max_epochs is None or max_epochs < 0 else max_epochs * per_epoch
    epochs, rest = divmod(max_steps, max(1, math.ceil(per_epoch)))
    by_steps = math.inf if max_steps < 0 else epochs * per_epoch + rest
    if by_epochs == by_steps == math.inf:
        found = f"trainer.max_epochs={max_epochs} and trainer.max_steps={max_steps} set no end"
        raise UserError(f"{found}; set one of them above 0, or a budget as budget=40m")
    return min((by_epochs, f"the end of the data, {max_epochs} epochs"), (by_steps, f"{max_steps:,} steps"))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run takes on so many devices; ``price`` has the currency of ``plan.price_per_hour``."""

    devices: int
    tokens_per_second: float
    steps: float
    tokens: float
    validation_hours: float
    hours: float  # with validation
    device_hours: float
    price: float | None
    kwh: float | None


def cost(
    *,
    steps: float | None,
    budget: float | None,
    devices: int,
    scaling: float,
    step_seconds: float,
    step_tokens: float,
    val_seconds: float,
    val_every: int | None,
    val_first: bool,
    price_per_hour: float | None,
    watts: float | None,
) -> Cost:
    """Return what a run of so many ``steps``, or of ``budget`` seconds, takes.

    ``step_seconds`` and ``val_seconds``, of a validation, were measured on one device. Each doubling of the devices
    keeps the share ``scaling`` of the speed.
    """
    speed = devices * scaling ** math.log2(devices)
    seconds = step_seconds / speed
    steps = (budget or 0.0) / seconds if steps is None else steps
    validations = math.ceil(steps / val_every) if val_every else 0
    validation = (validations + val_first) * val_seconds / speed / 3600
    hours = steps * seconds / 3600 + validation
    return Cost(
        devices=devices,
        tokens_per_second=step_tokens / seconds,
        steps=steps,
        tokens=steps * step_tokens,
        validation_hours=validation,
        hours=hours,
        device_hours=devices * hours,
        price=None if price_per_hour is None else price_per_hour * devices * hours,
        kwh=None if watts is None else watts * devices * hours / 1000,
    )


def decide(numbers: Mapping[str, Any]) -> str:
    """Return the line to decide by: time, memory, disk and money of the run, and what is fastest instead."""
    run, disk = numbers["run"], numbers["disk_mb"]
    where = "this machine" if run["devices"] == 1 else f"{run['devices']} devices"
    sizes = f"{megabytes(numbers['memory_mb'])} of memory, {megabytes(sum(disk.values()))} of disk"
    line = f"{duration(run['hours'])} on {where}, {sizes}"
    line += "" if run["price"] is None else f", price {run['price']:,.2f}"
    measured = [each for each in numbers["alternatives"] if "ratio" in each]
    if not measured:
        return line
    best = max(measured, key=lambda each: float(each["ratio"]))
    if best["ratio"] < _FASTER:
        return f"{line}; nothing that was measured is faster"
    name = best["override"] + ", which trains no LM head," * (best["override"] == "objective=minilm")
    gain = f"would take {duration(best['hours'])}" if best["hours"] < run["hours"] else "would read more text"
    return f"{line}; {name} {gain} ({best['ratio']:.1f} times the tokens/s)"
