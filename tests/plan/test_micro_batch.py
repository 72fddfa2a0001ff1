"""The search for the largest micro-batch, on devices of which every byte is known."""

from collections.abc import Callable

import pytest
import torch

from distilkit.plan.micro_batch import Fit, Point, grow

LEAST, EACH, LIMIT = 100.0, 10.0, 1000.0  # so that 90 blocks fit


def device(tried: list[int], *, crashes_above: float = float("inf"), seconds: float = 0.0) -> Callable[[int], Point]:
    """Return a measurement whose memory grows by ``EACH`` for a block, with an out-of-memory error beyond a bound."""

    def measure(size: int) -> Point:
        tried.append(size)
        if (peak := LEAST + EACH * size) > crashes_above:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Point(size, peak, seconds)

    return measure


def find(measure: Callable[[int], Point], *, most: int, seconds: float = 60.0, limit: float = LIMIT) -> Fit:
    return grow(measure, most=most, least=LEAST, limit=limit, seconds=seconds)


def test_no_size_is_tried_that_is_predicted_not_to_fit() -> None:
    fit = find(device(tried := []), most=256)
    assert tried == [1, 2, 4, 8, 16, 32, 64]
    assert (fit.largest, fit.measured) == (64, True)
    assert fit.predict(90) == pytest.approx(LIMIT)


def test_the_whole_step_is_the_last_size_that_is_tried() -> None:
    fit = find(device(tried := []), most=12)
    assert tried == [1, 2, 4, 8, 12]
    assert fit.largest == 12


def test_an_out_of_memory_error_ends_the_search() -> None:
    fit = find(device(tried := [], crashes_above=LEAST + EACH * 20), most=256)
    assert tried[-1] == 32
    assert (fit.largest, fit.measured) == (16, True)


def test_time_ends_the_search_and_the_growth_tells_the_rest() -> None:
    fit = find(device(tried := [], seconds=1.0), most=256, seconds=30.0)  # 2 and 4 blocks take 8 and 16 seconds
    assert tried == [1, 2, 4]
    assert (fit.largest, fit.measured) == (64, False)


def test_a_peak_above_the_limit_does_not_fit() -> None:
    def jump(size: int) -> Point:  # more than twice as much for the second block
        return Point(size, LEAST + 10 * size + 400 * (size > 1), 0.0)

    fit = find(jump, most=8, limit=500.0)
    assert [point.size for point in fit.points] == [1, 2]
    assert fit.largest == 1


def test_nothing_is_tried_where_the_models_alone_do_not_fit() -> None:
    fit = find(device(tried := []), most=8, limit=LEAST - 1)
    assert tried == []
    assert fit.largest == 0
