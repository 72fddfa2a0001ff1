"""Sizes and timings: which count, the table and the plot."""

import dataclasses
import io
from typing import Any

import matplotlib.image
import pytest

from distilkit.records import Result
from distilkit.report.speed import latency_plot, speed_table, speeds
from scores import COST, every_kind, gathered, speed


def test_size_and_speed_have_a_row_for_each_model_and_backend() -> None:
    against = {"bert": {"cpu/latency_ms": 1.63, "cpu/latency_ms_p10": 9.0, "cpu/onnx/latency_ms": 1.5}}
    results = [speed("student", 20.0, details={"against": against}), speed("bert", 33.0)]
    table = speed_table(gathered(results))
    assert table is not None
    sizes = ["66,000,000", "42,000,000"]
    assert [row[:2] for row in table.rows] == [
        ["bert (teacher)", "cpu"],
        ["student", "cpu"],
        ["bert (teacher)", "cpu/onnx"],
        ["student", "cpu/onnx"],
    ]
    assert table.rows[1] == [
        "student",
        "cpu",
        *sizes,
        "438.0",
        "20.0 (19.0 to 22.0)",
        "150.0",
        "latency 1.63 x bert",
    ]
    assert table.rows[3] == ["student", "cpu/onnx", *sizes, "440.5", "10.0", "-", "latency 1.50 x bert"]
    assert "Some CPU, 2 cores" in table.notes[0]
    assert "batch 1" not in table.notes[0]


def test_the_note_on_speed_says_how_it_was_timed() -> None:
    details = {"threads": 2, "num_sentences": 200, "rounds": 5}
    table = speed_table(gathered([speed("m", 20.0, settings={"batch_sizes": [4, 16]}, details=details)]))
    assert table is not None
    assert table.notes[0].endswith(
        " Batches of 4 and 16, sentences: 200, CPU threads: 2, measured on Some CPU, 2 cores."
    )


@pytest.mark.parametrize("turned", [False, True])
def test_the_later_timing_counts_and_of_the_teacher_that_beside_a_student(turned: bool) -> None:
    def at(hour: int) -> dict[str, Any]:
        return {"cost": {**COST, "date": f"2026-11-20T{hour:02}:00:00+00:00"}}

    beside = [speed("student", 20.0, details={"against": {"bert": {}}}, **at(8)), speed("bert", 30.0, **at(8))]
    later = [speed("bert", 99.0, **at(9)), speed("baseline", 50.0, **at(9))]
    earlier = [speed("baseline", 40.0, **at(7))]
    order = [*later, *earlier, *beside] if turned else [*beside, *later, *earlier]
    found = speeds(gathered(order))
    latency = {each["model"]: each["latency_ms"] for each in found if each["backend"] == "cpu"}
    assert latency == {"student": 20.0, "bert": 30.0, "baseline": 50.0}
    assert speeds(gathered(order, teacher=None))[0]["latency_ms"] == (99.0 if turned else 20.0)


def test_a_panel_shows_each_device_and_backend() -> None:
    results = every_kind()
    two = latency_plot(gathered(results))
    for each in results:
        each.scores.pop("cpu/onnx/latency_ms", None)
    one = latency_plot(gathered(results))
    assert one is not None
    assert two is not None
    heights = [matplotlib.image.imread(io.BytesIO(plot.png)).shape[0] for plot in (one, two)]
    assert heights[1] > 1.7 * heights[0]
    assert latency_plot(gathered([each for each in results if each.kind != "speed"])) is None


def test_the_panel_of_int8_has_no_scores_of_float32() -> None:
    def quantized(each: Result) -> Result:
        scores = {
            name.replace("cpu/onnx/", "cpu/").replace("cpu/", "cpu/onnx-int8/"): x for name, x in each.scores.items()
        }
        return dataclasses.replace(each, scores=scores) if each.kind == "speed" else each

    results = every_kind()
    int8 = [quantized(each) for each in results]
    assert latency_plot(gathered(int8)) is None
    both = [dataclasses.replace(one, scores=two.scores | one.scores) for one, two in zip(results, int8, strict=True)]
    assert latency_plot(gathered(both)) == latency_plot(gathered(results))
