"""The arithmetic of a forecast, against numbers by hand."""

import math
from typing import Any

import pytest

from distilkit.budget import check_budget
from distilkit.errors import UserError
from distilkit.plan.forecast import Cost, cost, decide, steps_of
from distilkit.records import duration
from distilkit.watch.memory import megabytes

MEASURED: dict[str, Any] = {
    "scaling": 0.9,
    "step_seconds": 36.0,
    "step_tokens": 1000.0,
    "val_seconds": 18.0,
    "price_per_hour": 2.0,
    "watts": 500.0,
}


def costs(*, devices: int = 1, **changes: Any) -> Cost:
    length: dict[str, Any] = {"steps": 200.0, "budget": None, "val_every": None, "val_first": False}
    return cost(devices=devices, **length | MEASURED | changes)


def test_one_device_takes_what_was_measured() -> None:
    found = costs()
    assert (found.hours, found.device_hours, found.price, found.kwh) == pytest.approx((2.0, 2.0, 4.0, 1.0))
    assert found.tokens_per_second == pytest.approx(1000 / 36)
    assert found.tokens == pytest.approx(200_000)


def test_each_doubling_of_the_devices_keeps_its_share_of_the_speed() -> None:
    found = costs(devices=4)
    assert found.hours == pytest.approx(2.0 / (4 * 0.9**2))
    assert found.price == pytest.approx(4.0 / 0.9**2)


def test_a_budget_fixes_the_time_and_not_the_tokens() -> None:
    one, two = (costs(steps=None, budget=3600.0, devices=each) for each in (1, 2))
    assert one.hours == two.hours == 1.0
    assert one.steps == pytest.approx(100)
    assert two.tokens == pytest.approx(one.tokens * 2 * 0.9)


def test_validations_count_at_the_start_on_the_way_and_at_the_end() -> None:
    found = costs(val_every=80, val_first=True)  # after 0, 67, 134 and 200 steps
    assert found.validation_hours == pytest.approx(4 * 18 / 3600)
    assert found.hours == pytest.approx(2.0 + found.validation_hours)


def test_what_is_unknown_stays_out() -> None:
    found = costs(price_per_hour=None, watts=None)
    assert found.price is found.kwh is None


@pytest.mark.parametrize(("epochs", "steps"), [(-1, -1), (None, -1), (-1, -5), (-3, -1)])
def test_a_training_without_an_end_is_refused(epochs: int | None, steps: int) -> None:
    with pytest.raises(UserError, match=f"max_epochs={epochs} and trainer.max_steps={steps} set no end; set one of"):
        steps_of(10, batch_size=4, max_epochs=epochs, max_steps=steps)


def test_epochs_without_batches_take_no_step() -> None:
    assert steps_of(0, batch_size=4, max_epochs=3, max_steps=7)[0] == 0
    assert steps_of(0, batch_size=4, max_epochs=-1, max_steps=7)[0] == 0


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(3, -1, 7.5), (None, 4, 3.5), (-1, 2, 2.0), (3, 4, 3.5), (1, 100, 2.5), (3, 0, 0.0)],
)
def test_the_last_step_of_an_epoch_counts_as_a_part(epochs: int | None, steps: int, expected: float) -> None:
    found, end = steps_of(10, batch_size=4, max_epochs=epochs, max_steps=steps)  # steps of 4, 4 and 2 blocks
    assert found == expected
    assert math.isfinite(found) and ("steps" in end) == (expected in (3.5, 2.0, 0.0))


def test_the_line_to_decide_by_says_that_minilm_trains_no_head() -> None:
    run: dict[str, Any] = {"devices": 1, "hours": 2.0, "price": None}
    numbers: dict[str, Any] = {"run": run, "memory_mb": 512, "disk_mb": {"cache": 1, "student": 2}}
    masked, minilm = ({"override": f"objective{each}", "ratio": 2.0, "hours": 1.0} for each in (".x=y", "=minilm"))
    line = "2 h on this machine, 512 MB of memory, 3 MB of disk; "
    gain = "would take 1 h (2.0 times the tokens/s)"
    assert decide({**numbers, "alternatives": [masked]}) == f"{line}objective.x=y {gain}"
    assert decide({**numbers, "alternatives": [minilm]}) == f"{line}objective=minilm, which trains no LM head, {gain}"


def test_a_budget_shorter_than_ten_steps_is_refused() -> None:
    check_budget(20.0, step_seconds=2.0)
    with pytest.raises(
        UserError, match="budget=19 seconds is shorter than 10 optimizer steps of 2 seconds; set budget=20s"
    ):
        check_budget(19.0, step_seconds=2.0)


@pytest.mark.parametrize(
    ("hours", "text"), [(40 / 3600, "40 s"), (0.2, "12 min"), (2.14, "2.14 h"), (47, "47 h"), (96, "4 days")]
)
def test_times_are_written_as_a_person_would(hours: float, text: str) -> None:
    assert duration(hours) == text


def test_sizes_are_written_in_the_unit_that_fits() -> None:
    assert [megabytes(each) for each in (0.256, 12.34, 3481.6)] == ["0.256 MB", "12.3 MB", "3.4 GB"]
