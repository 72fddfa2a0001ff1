"""Forecast a run before it starts: ``python -m distilkit.plan``, or ``distilkit.plan(...)`` from Python."""

import sys
import tempfile
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distilkit.api import Paths
    from distilkit.plan.measure import Plan


def plan(
    teacher: str | Path | None,
    *,
    text: Iterable[str] | None = None,
    paths: "Paths | None" = None,
    student: str = "half_depth",
    max_steps: int | None = None,
    budget: str | float | None = None,
    price_per_hour: float | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> "Plan":
    """Measure what ``distill`` with the same arguments would take, and write it to ``out``/plan.json, if that is given.

    ``price_per_hour`` is of one device; ``overrides`` may set ``plan.*``. It takes a few minutes, and trains nothing.
    A wrong setting raises a ``UserError``.
    """
    from distilkit.api import composed, isolated  # which import torch
    from distilkit.cli import quiet
    from distilkit.plan.measure import measure
    from distilkit.records import write_json

    given: dict[str, Any] = {"text": text, "paths": paths, "max_steps": max_steps, "budget": budget}
    with isolated(), quiet():
        nowhere = Path(tempfile.gettempdir(), "distilkit-plan")  # nothing is written there
        given |= {"out": out or nowhere, "student": student, "overrides": overrides}
        taken = {"plan.price_per_hour"} if price_per_hour is not None else set[str]()
        cfg = composed(teacher, **given, config="plan", caller="plan", taken=taken)
        cfg.plan.price_per_hour = cfg.plan.price_per_hour if price_per_hour is None else price_per_hour
        cfg.plan.file = None if out is None else cfg.plan.file
        found = measure(cfg)
        if cfg.plan.file:
            write_json(Path(cfg.plan.file), found.numbers)
    return found


class _Callable(types.ModuleType):
    """A module that is also the function: Python binds ``distilkit.plan`` to this package once it is imported."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Plan":
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
