from typing import Any

import pytest
import torch
from transformers import get_scheduler

from distilkit.errors import UserError
from distilkit.schedule import build_schedule

STEPS = 100
ARGUMENTS: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 0.1, "warmup_lr_rate": 0.2},
    "polynomial": {"power": 2.0, "lr_end": 0.1},
    "inverse_sqrt": {"timescale": 7},
    "warmup_stable_decay": {"num_decay_steps": 20, "min_lr_ratio": 0.1},
}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)


def rates(schedule: Any) -> list[float]:
    found = []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def build(name: str, **kwargs: Any) -> Any:
    return build_schedule(optimizer(), name=name, warmup_share=0.05, kwargs=kwargs, num_steps=STEPS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_schedule_is_that_of_transformers_with_its_own_arguments(name: str) -> None:
    theirs = get_scheduler(name, optimizer(), 5, STEPS, ARGUMENTS[name])
    assert rates(build(name, **ARGUMENTS[name])) == rates(theirs)


@pytest.mark.parametrize(("name", "end"), [("constant_with_warmup", 1.0), ("linear", 1 / 95), ("cosine", 0.0)])
def test_the_warmup_starts_at_zero_and_takes_its_share_of_the_steps(name: str, end: float) -> None:
    found = rates(build(name))
    assert found[:6] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[-1] == pytest.approx(end, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("sawtooth", {}, r"scheduler.name=sawtooth is unknown; it takes constant, .*cosine, .*warmup_stable_decay"),
        ("reduce_lr_on_plateau", {}, r"scheduler.name=reduce_lr_on_plateau is unknown"),
        ("linear", {"power": 2}, r"scheduler.kwargs.power is unknown to scheduler.name=linear; it takes no arguments"),
        ("constant", {"min_lr": 2}, r"scheduler.kwargs.min_lr is unknown to scheduler.name=constant"),
        ("polynomial", {"powr": 2}, r"scheduler.kwargs.powr is unknown .*; it takes lr_end, power"),
        ("cosine", {"num_training_steps": 9}, r"scheduler.kwargs.num_training_steps is unknown"),
        ("warmup_stable_decay", {}, r"needs num_decay_steps; add \+scheduler.kwargs.num_decay_steps="),
        (
            "polynomial",
            {"lr_end": 2},
            r"cannot be built with scheduler.kwargs=\{'lr_end': 2\}: .*smaller.*; it takes lr_end",
        ),
        ("cosine_with_min_lr", {}, r"cannot be built with scheduler.kwargs=\{\}: .*min_lr_rate.*; it takes .*min_lr"),
        ("polynomial", {"power": -1}, r"cannot be built with scheduler.kwargs=\{'power': -1\}"),
        ("polynomial", {"lr_end": -1}, r"over 100 steps the learning rate is negative, not finite or always 0"),
        ("polynomial", {"power": "two"}, r"cannot be built with scheduler.kwargs=\{'power': 'two'\}"),
    ],
)
def test_a_wrong_name_or_argument_is_refused_with_the_known_ones(
    name: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **kwargs)
