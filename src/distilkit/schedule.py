"""The learning-rate schedule: a name and arguments of ``transformers.get_scheduler``."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from distilkit.errors import UserError

_NEED_A_METRIC = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}  # the others depend on the step alone
_SCHEDULES: dict[str, Any] = {
    kind.value: TYPE_TO_SCHEDULER_FUNCTION[kind] for kind in SchedulerType if kind not in _NEED_A_METRIC
}
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
        schedule: LambdaLR = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=round(warmup_share * num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(kwargs),
        )
        steps = {round(num_steps * part / 64) for part in range(65)}  # the last is asked for after training
        rates = [rate(step) for rate in schedule.lr_lambdas for step in steps]
        if not all(0 <= each < math.inf for each in rates) or not max(rates):
            raise ValueError(f"over {num_steps} steps the learning rate is negative, not finite or always 0")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"scheduler.name={name} cannot be built with scheduler.kwargs={dict(kwargs)}: {error}; it takes {own}"
        ) from error
    return schedule
