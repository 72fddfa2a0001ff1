"""Sizes and timings: which count, the table and the plot."""

import dataclasses
import io
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from distilkit.records import Result
from distilkit.report import speed as speed_module
from distilkit.report.speed import latency_plot, speed_tables, speeds
from scores import COST, every_kind, gathered, speed


def test_size_and_speed_have_a_row_for_each_model_and_backend() -> None:
    (table,) = speed_tables(gathered([speed("student", 20.0), speed("bert", 33.0)]))
    sizes = ["66,000,000", "42,000,000"]
    assert [row[:2] for row in table.rows] == [
        ["bert (teacher)", "cpu"],
        ["student", "cpu"],
        ["bert (teacher)", "cpu/onnx"],
        ["student", "cpu/onnx"],
    ]
    assert table.rows[0][6:] == ["-", "90.9", "-"]
    assert table.rows[1] == ["student", "cpu", *sizes, "438.0", "20.0 (19.0 to 22.0)", "1.65", "150.0", "1.65"]
    assert table.rows[3] == ["student", "cpu/onnx", *sizes, "440.5", "10.0", "1.65", "-", "-"]
    assert "Some CPU, 2 cores" in table.notes[0]
    assert "batches of" not in table.notes[0]


def test_the_note_on_speed_says_how_it_was_timed() -> None:
    details = {"threads": 2, "num_sentences": 200, "rounds": 5}
    (table,) = speed_tables(gathered([speed("m", 20.0, settings={"batch_sizes": [4, 16]}, details=details)]))
    said = "Measured on Some CPU, 2 cores, batches of 4 and 16, sentences: 200, CPU threads: 2, 2026-11-20."
    assert table.notes[0].endswith(said)


def on(machine: str, *, hour: int = 8, folder: str | None = None, **details: Any) -> dict[str, Any]:
    cost = {**COST, "machine": machine, "date": f"2026-11-20T{hour:02}:00:00+00:00"}
    return {"cost": cost, "folder": folder, "details": details}


@pytest.mark.parametrize(
    "other",
    [
        on("Xeon"),
        on("M4", threads=8),
        on("M4", folder="later", hour=9),
        {**on("M4"), "settings": {"batch_sizes": [8, 64]}},
    ],
)
def test_timings_of_other_machines_conditions_or_runs_are_in_tables_and_panels_of_their_own(
    other: dict[str, Any],
) -> None:
    results = [speed("bert", 12.0, **on("M4")), speed("student", 7.0, **on("M4")), speed("baseline", 33.0, **other)]
    scores = gathered([*every_kind(), *results])
    scores = dataclasses.replace(scores, results=scores.results.tail(3))
    tables = speed_tables(scores)
    assert [[row[0] for row in table.rows if row[1] == "cpu"] for table in tables] == [
        ["bert (teacher)", "student"],
        ["baseline"],
    ]
    assert [table.title for table in tables] == ["Size and speed, run 1 of 2", "Size and speed, run 2 of 2"]
    assert [table.name for table in tables] == ["speed", "speed_2"]
    assert tables[1].rows[0][6] == "-"  # of another run there is no ratio
    panels: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed_module, "scatter", lambda found, *args, **labels: panels.update(found) or Figure())
        latency_plot(scores)
    assert {title: [point.name for point in points] for title, points in panels.items()} == {
        "cpu, M4, run 1": ["bert", "student"],
        "cpu/onnx, M4, run 1": ["bert", "student"],
    }


@pytest.mark.parametrize("turned", [False, True])
def test_a_run_that_was_repeated_as_a_whole_counts_once(turned: bool) -> None:
    first = [speed("student", 20.0, **on("M4", folder="a")), speed("bert", 30.0, **on("M4", folder="a"))]
    again = [
        speed("student", 22.0, **on("M4", folder="b", hour=9)),
        speed("bert", 99.0, **on("M4", folder="b", hour=9)),
    ]
    alone = [speed("student", 21.0, **on("M4", folder="c", hour=10))]
    found = speeds(gathered([*again, *alone, *first] if turned else [*first, *again, *alone]))
    cpu = [(each["run"], each["model"], each["latency_ms"]) for each in found if each["backend"] == "cpu"]
    assert sorted(cpu) == [(1, "bert", 99.0), (1, "student", 22.0), (2, "student", 21.0)]


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
