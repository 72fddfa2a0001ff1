"""What changes over a training: values that are linear between points, and the schedule of the learning rate."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_wsd_schedule

from distilkit.errors import UserError

Points = float | list[list[float]]  # a value that stays, or [[share of training, value], ...]


def as_points(points: Points) -> list[list[float]]:
    """Return points, also of a value that stays."""
    return points if isinstance(points, list) else [[0.0, points], [1.0, points]]


def piecewise(points: Points, progress: float) -> float:
    """Return the value at ``progress`` (0 to 1), linear between points; at a share that repeats it is the latter."""
    shares, values = zip(*as_points(points), strict=True)
    return float(np.interp(progress, shares, values))


def check_points(value: Any, *, key: str, limit: str, holds: Callable[[float], bool]) -> Points:
    """Return a number, or points as plain lists; ``UserError`` unless ``holds`` of each, which ``limit`` describes."""

    def is_number(each: Any) -> bool:
        return isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each)

    if is_number(value) and holds(value):
        return float(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{key}={value}, but it must be {limit}")
    points = [list(point) if isinstance(point, Sequence) else [] for point in value]
    wrong = [point for point in points if len(point) != 2 or not all(map(is_number, point))]
    shares = [point[0] for point in points if point]
    if wrong:
        found = "an entry is no pair of numbers"
    elif not shares or (shares[0], shares[-1]) != (0, 1) or any(share > later for share, later in pairwise(shares)):
        found = "its shares of the training do not rise from 0 to 1"
    elif not all(holds(each) for _, each in points):
        found = f"each value must be {limit}"
    else:
        return points
    raise UserError(f"{key}={value}: {found}; give [[share, value], ...], as [[0, 0.5], [0.8, 0.5], [1, 0.2]]")


def show_points(points: Points) -> float | str:
    """Return a number as it is, and points for a reader, as ``5 at 0% → 0 at 100%``."""
    if not isinstance(points, list):
        return points
    return " → ".join(f"{value:g} at {100 * share:.4g}%" for share, value in points)


def _piecewise(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, points: Any) -> LambdaLR:
    """Build a schedule of points, which contain the warm-up."""
    limit = "a finite number of at least 0"
    checked = check_points(points, key="scheduler.kwargs.points", limit=limit, holds=lambda each: each >= 0)
    return LambdaLR(optimizer, lambda step: piecewise(checked, step / num_training_steps))


def _wsd(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, decay_share: float, decay_type: str = "linear"
) -> LambdaLR:
    """Build a warm-up, a stable rate, and its decay to 0 over a share of the steps (arXiv 2404.06395, 2405.18392)."""
    left, decays = num_training_steps - num_warmup_steps, round(decay_share * num_training_steps)
    if not 0 < decay_share <= 1 or decays > left + 1:  # one more by rounding
        raise ValueError("decay_share must be above 0, and its sum with scheduler.warmup_share at most 1")
    steps: Any = {"num_decay_steps": min(decays, left), "num_training_steps": num_training_steps}
    schedule: LambdaLR = get_wsd_schedule(optimizer, num_warmup_steps, **steps, decay_type=decay_type)
    return schedule


_OWN: dict[str, Any] = {"piecewise": _piecewise, "wsd": _wsd}  # in shares, which do not depend on the number of steps
_NEED_A_METRIC = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}  # the others depend on the step alone
_SCHEDULES: dict[str, Any] = {
    kind.value: TYPE_TO_SCHEDULER_FUNCTION[kind] for kind in SchedulerType if kind not in _NEED_A_METRIC
} | _OWN
_GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def build_schedule(
    optimizer: Optimizer, *, name: str, warmup_share: float, kwargs: Mapping[str, Any], num_steps: int
) -> LambdaLR:
    """Build a schedule over ``num_steps`` optimizer steps; ``kwargs`` are the arguments of this schedule alone."""
    if not isinstance(kwargs, Mapping):
        raise UserError(f"scheduler.kwargs={kwargs}, but it takes keys and values, as {{power: 2}}")
    if str(name) not in _SCHEDULES:
        raise UserError(f"scheduler.name={name} is unknown; it takes {', '.join(sorted(_SCHEDULES))}")
    takes = {key: each for key, each in inspect.signature(_SCHEDULES[name]).parameters.items() if key not in _GIVEN}
    own = ", ".join(takes) or "no arguments"
    for key in kwargs:
        if key not in takes:
            raise UserError(f"scheduler.kwargs.{key} is unknown to scheduler.name={name}; it takes {own}")
    for key, parameter in takes.items():
        if parameter.default is parameter.empty and key not in kwargs:
            raise UserError(f"scheduler.name={name} needs {key}; add +scheduler.kwargs.{key}=...")
    try:
        build: Any = functools.partial(get_scheduler, name, scheduler_specific_kwargs=dict(kwargs))
        if name in _OWN:
            build = functools.partial(_OWN[name], **kwargs)
        warmup = round(warmup_share * num_steps)
        schedule: LambdaLR = build(optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
        asked = {round(num_steps * part / 64) for part in range(65)}  # the last is asked for after training
        rates = [rate(step) for rate in schedule.lr_lambdas for step in asked]
        if not all(0 <= each < math.inf for each in rates) or not max(rates):
            raise ValueError(f"over {num_steps} steps the learning rate is negative, not finite or always 0")
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"scheduler.name={name} cannot be built with scheduler.kwargs={dict(kwargs)}: {error}; it takes {own}"
        ) from error
    return schedule
