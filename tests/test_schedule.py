from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import get_scheduler

from distilkit.errors import UserError
from distilkit.schedule import build_schedule, check_points, piecewise, show_points

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
        ("piecewise", {}, r"scheduler.name=piecewise needs points; add \+scheduler.kwargs.points="),
        (
            "piecewise",
            {"points": [[0, 1], [0.5, 0]]},
            r"kwargs.points=\[\[0, 1\], \[0.5, 0\]\]: its shares .* from 0 to 1",
        ),
        ("piecewise", {"points": [[0, 1], [1, -1]]}, r"each value must be a finite number of at least 0"),
        ("piecewise", {"points": [[0, 0], [1, 0]]}, r"is negative, not finite or always 0; it takes points"),
        ("wsd", {}, r"scheduler.name=wsd needs decay_share; add \+scheduler.kwargs.decay_share="),
        ("wsd", {"decay_share": 0}, r"decay_share must be above 0, and its sum with scheduler.warmup_share at most 1"),
        ("wsd", {"decay_share": 0.97}, r"decay_share must be above 0, .*; it takes decay_share, decay_type"),
        ("wsd", {"decay_share": "all"}, r"cannot be built with scheduler.kwargs=\{'decay_share': 'all'\}"),
        (
            "wsd",
            {"decay_share": 0.2, "decay_type": "sqrt"},
            r"Unknown decay type: sqrt, expected 'linear', .* '1-sqrt'",
        ),
    ],
)
def test_a_wrong_name_or_argument_is_refused_with_the_known_ones(
    name: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **kwargs)


POINTS = [[0, 3], [0.25, 1], [0.5, 1], [1, 0]]


def test_a_value_is_linear_between_points() -> None:
    shares, values = zip(*POINTS, strict=True)
    for progress in np.linspace(0, 1, 41):
        assert piecewise(POINTS, progress) == pytest.approx(np.interp(progress, shares, values), abs=1e-15)
    assert piecewise(0.15, 0.3) == 0.15
    assert [piecewise(POINTS, share) for share in shares] == list(values)


def test_a_share_that_stands_twice_is_a_jump_to_the_latter_value() -> None:
    points = [[0, 0], [0.5, 0], [0.5, 2], [1, 4]]
    assert [piecewise(points, progress) for progress in (0, 0.4999, 0.5, 0.75, 1)] == [0, 0, 2, 3, 4]
    assert [piecewise([[0, 9], [0, 1], [1, 1], [1, 5]], progress) for progress in (0, 0.5, 1)] == [1, 1, 5]


def test_points_of_a_config_become_plain_lists() -> None:
    given = OmegaConf.create({"points": POINTS}).points
    found = check_points(given, key="key", limit="a number", holds=np.isfinite)
    assert found == POINTS
    assert type(found) is list
    assert {type(each) for each in found} == {list}


def test_points_are_shown_with_their_shares() -> None:
    assert show_points([[0, 5.0], [0.125, 0.5], [1, 0]]) == "5 at 0% → 0.5 at 12.5% → 0 at 100%"
    assert show_points(2.0) == 2.0


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "key=None, but it must be at least 1"),
        (True, "key=True, but"),
        (0.5, "key=0.5, but it must be at least 1"),
        (float("nan"), "key=nan, but"),
        ("[[0,5],[1,0]]", r"key=\[\[0,5\],\[1,0\]\], but"),
        ([], r"key=\[\]: its shares of the training do not rise from 0 to 1; give \[\[share, value\], ...\], as"),
        ([0, 1], r"key=\[0, 1\]: an entry is no pair of numbers"),
        ([[0, 2], [1]], "an entry is no pair of numbers"),
        ([[0, 2], [1, "2"]], "an entry is no pair of numbers"),
        ([[0, 2], [1, float("inf")]], "an entry is no pair of numbers"),
        ([[0, 2]], "its shares of the training do not rise from 0 to 1"),
        ([[0.1, 2], [1, 2]], "its shares of the training do not rise"),
        ([[0, 2], [0.9, 2]], "its shares of the training do not rise"),
        ([[0, 2], [0.6, 2], [0.5, 2], [1, 2]], "its shares of the training do not rise"),
        ([[0, 2], [1, 0]], r"key=\[\[0, 2\], \[1, 0\]\]: each value must be at least 1"),
    ],
)
def test_wrong_points_are_an_error(value: Any, found: str) -> None:
    for given in (value, OmegaConf.create({"value": value}).value):
        with pytest.raises(UserError, match=found):
            check_points(given, key="key", limit="at least 1", holds=lambda each: each >= 1)


def test_a_learning_rate_follows_points() -> None:
    schedule = build("piecewise", points=[[0, 0], [0.05, 1], [0.8, 1], [1, 0]])
    expected = [min(step / 5, 1.0, (100 - step) / 20) for step in range(STEPS)]
    assert rates(schedule) == pytest.approx(expected)
    assert schedule.get_last_lr()[0] == 0.0


def test_a_rate_warms_up_stays_and_decays() -> None:
    linear, root = build("wsd", decay_share=0.2), build("wsd", decay_share=0.2, decay_type="1-sqrt")
    expected = [min(step / 5, 1.0) for step in range(80)]
    assert rates(linear) == pytest.approx([*expected, *(1 - step / 20 for step in range(20))])
    assert rates(root) == pytest.approx([*expected, *(1 - (step / 20) ** 0.5 for step in range(20))])
    at_once = build_schedule(optimizer(), name="wsd", warmup_share=0, kwargs={"decay_share": 1}, num_steps=STEPS)
    assert rates(at_once) == pytest.approx([1 - step / 100 for step in range(STEPS)])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 31, 33, 10_000])
def test_a_schedule_in_shares_fits_any_number_of_steps(num_steps: int) -> None:
    shares = {"warmup_share": 0.1, "num_steps": num_steps}
    wsd = build_schedule(optimizer(), name="wsd", kwargs={"decay_share": 0.9}, **shares)
    points = build_schedule(optimizer(), name="piecewise", kwargs={"points": [[0, 1], [1, 0]]}, **shares)
    assert wsd.lr_lambdas[0](num_steps) == points.lr_lambdas[0](num_steps) == 0
    assert points.lr_lambdas[0](num_steps / 2) == 0.5
    halves: dict[str, Any] = {"warmup_share": 0.5, "kwargs": {"decay_share": 0.5}}  # of 3 steps both round up
    assert build_schedule(optimizer(), name="wsd", num_steps=num_steps, **halves).lr_lambdas[0](num_steps) == 0
