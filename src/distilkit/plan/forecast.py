"""The arithmetic of a forecast: from measured seconds, bytes and watts to hours, money and energy."""

import math
from dataclasses import dataclass
from typing import Any

from distilkit.errors import UserError

_FASTER = 1.05  # times the tokens per second that are worth a word
_FEWEST = 10  # optimizer steps of a budget, as distilkit.budget demands


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
        for key, least in (("steps", 1), ("examples", 0)):
            if getattr(self, key) < least:
                raise UserError(f"plan.{key}={getattr(self, key)}, but it must be at least {least}")
        if self.seconds <= 0:
            raise UserError(f"plan.seconds={self.seconds}, but it must be above 0; give the seconds to time steps for")
        for key in ("memory_share", "scaling"):
            if not 0 < getattr(self, key) <= 1:
                raise UserError(f"plan.{key}={getattr(self, key)}, but it must be above 0 and at most 1")
        if any(count < 1 for count in self.devices):
            raise UserError(f"plan.devices={self.devices}, but each number of devices must be at least 1")
        if self.price_per_hour is not None and self.price_per_hour < 0:
            cure = "give what a device costs in an hour, or null"
            raise UserError(f"plan.price_per_hour={self.price_per_hour}, but it must be at least 0; {cure}")
        if self.price_per_hour is not None and not self.devices:
            found = f"plan.price_per_hour={self.price_per_hour} is of one device, but plan.devices is empty"
            raise UserError(f"{found}; give the numbers of devices, as plan.devices=[1,8]")
        known = ("masked", "minilm", "bf16", "shorter")
        if wrong := [each for each in self.alternatives if each not in known]:
            raise UserError(f"plan.alternatives has {wrong[0]}, but it takes {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Length:
    """When a training ends: after ``blocks`` blocks, or after ``budget`` seconds, whatever they are on the way.

    ``end`` is what ends it, in words. A validation scores ``val_blocks`` every ``val_every`` steps, if at all, and once
    more where the run is scored at its start.
    """

    end: str
    global_batch_size: int
    blocks: float | None
    budget: float | None
    val_blocks: int
    val_every: int | None
    val_first: bool


def length_of(
    *, blocks: int, global_batch_size: int, max_epochs: int | None, max_steps: int, budget: float | None, **rest: Any
) -> Length:
    """Return when a training of a corpus of so many blocks ends; -1 epochs and steps are without end."""
    if budget is not None:
        return Length(end=f"a budget of {budget:,.0f} s", global_batch_size=global_batch_size, blocks=None,
                      budget=budget, **rest)  # fmt: skip
    epochs = math.inf if max_epochs in (None, -1) else float(max_epochs or 0)
    by_epochs, by_steps = epochs * blocks, math.inf if max_steps < 0 else float(max_steps * global_batch_size)
    # The last step of an epoch may be smaller, so that steps and blocks are not in proportion over several epochs.
    per_epoch = math.ceil(blocks / global_batch_size)
    if max_steps >= 0:
        whole, left = divmod(max_steps, per_epoch)
        by_steps = float(whole * blocks + left * global_batch_size)
    end = f"{max_steps:,} steps" if by_steps <= by_epochs else f"the end of the data, {epochs:g} epochs"
    return Length(end=end, global_batch_size=global_batch_size, blocks=min(by_epochs, by_steps), budget=None, **rest)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run takes on so many devices; times in hours, ``price`` in the currency of ``price_per_hour``."""

    devices: int
    tokens_per_second: float
    steps: float
    tokens: float
    training_hours: float
    validation_hours: float
    hours: float
    device_hours: float
    price: float | None
    kwh: float | None


def cost(
    length: Length,
    *,
    devices: int,
    scaling: float,
    step_seconds: float,
    step_tokens: float,
    val_seconds: float,
    price_per_hour: float | None,
    watts: float | None,
) -> Cost:
    """Return what a run takes; ``step_seconds`` and ``val_seconds``, of a validation, were measured on one device.

    Each doubling of the devices keeps the share ``scaling`` of the speed. A budget that is shorter than ten steps raises
    a ``UserError``.
    """
    speed = devices * scaling ** math.log2(devices)
    step_seconds = step_seconds / speed
    if length.budget is not None and length.budget < _FEWEST * step_seconds:
        short = math.ceil(_FEWEST * step_seconds)
        found = f"budget={length.budget:g} seconds is shorter than {_FEWEST} optimizer steps of {step_seconds:.3g} seconds"
        raise UserError(f"{found}; set budget={short}s or more, or a smaller data.global_batch_size")
    steps = length.budget / step_seconds if length.blocks is None else length.blocks / length.global_batch_size  # type: ignore[operator]
    training = steps * step_seconds / 3600
    validations = math.ceil(steps / length.val_every) if length.val_every else 0
    validation = (validations + length.val_first) * val_seconds / speed / 3600
    hours = training + validation
    return Cost(
        devices=devices,
        tokens_per_second=step_tokens / step_seconds,
        steps=steps,
        tokens=steps * step_tokens,
        training_hours=training,
        validation_hours=validation,
        hours=hours,
        device_hours=devices * hours,
        price=None if price_per_hour is None else price_per_hour * devices * hours,
        kwh=None if watts is None else watts * devices * hours / 1000,
    )


def duration(hours: float) -> str:
    """Write a time as a person would: 40 s, 12 min, 2.1 h, 3.4 days."""
    for unit, size in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= size * (2 if unit == "days" else 1):
            return f"{hours / size:,.1f} {unit}" if hours / size < 100 else f"{hours / size:,.0f} {unit}"
    return f"{hours * 3600:.0f} s"


def size(megabytes: float) -> str:
    """Write megabytes (2 ** 20 bytes) as MB or GB."""
    return f"{megabytes / 1024:,.1f} GB" if megabytes >= 1024 else f"{megabytes:,.0f} MB"


def decide(numbers: dict[str, Any], *, budget: float | None) -> str:
    """Return the line to decide by: time, memory, disk and money of the run, and what is fastest instead."""
    run, disk, machine = numbers["run"], numbers["disk_mb"], numbers["machine"]
    where = "this machine" if machine["devices"] == 1 else f"{machine['devices']} devices"
    parts = [f"{duration(run['hours'])} on {where}", f"{size(numbers['memory_mb'])} of memory"]
    parts.append(f"{size(disk['cache'] + disk['checkpoints'] + disk['student'])} of disk")
    parts += [] if run["price"] is None else [f"price {run['price']:,.2f}"]
    line = ", ".join(parts)
    measured = [each for each in numbers["alternatives"] if "ratio" in each]
    best = max(measured, key=lambda each: float(each["ratio"]), default=None)
    if best is None:
        return line
    if best["ratio"] < _FASTER:
        return f"{line}; none of {len(measured)} alternatives is faster"
    gain = f"would take {duration(best['hours'])}" if budget is None else f"would read {best['ratio']:.2g} times the text"
    return f"{line}; {best['override']} {gain}"
