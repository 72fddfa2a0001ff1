"""What plots share: safe names, and names of points that cover nothing."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from distilkit.report import drawing
from distilkit.report.drawing import Point
from scores import gathered, result


def test_pictures_do_not_read_names_as_formulas() -> None:
    assert drawing.plain("$a$") == r"\$a\$"
    assert drawing.plain("_a") == " _a"
    assert len(drawing.plain("a" * 99)) == 40


def overlap(one: Bbox, other: Bbox) -> bool:
    shared = Bbox.intersection(one, other)
    return shared is not None and shared.width > 0 and shared.height > 0


@pytest.mark.parametrize("number", [3, 8, 15])
@pytest.mark.parametrize("gap", [1.0, 0.05, 0.0])
def test_names_of_points_cover_neither_each_other_nor_the_plot_and_have_symbols_of_their_own(
    gap: float, number: int
) -> None:
    points = [
        Point(f"a model with the name {index}", x := 66 + gap * index, 77 + gap * (index % 3), x - 4, x + 4)
        for index in range(number - 2)
    ]
    points += [Point("bert", 110.0, 80.0), Point("baseline", 66.0, 70.0)]
    figure = drawing.scatter({"size": points, "speed": points[::-1]}, gathered([]), x="x", y="y")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(names) == len(set(names)) == number
    assert (names[0], names[-1]) == ("bert (teacher)", "baseline")  # from the highest to the lowest
    boxes = [text.get_window_extent(renderer) for text in legend.get_texts()]
    assert not any(overlap(one, other) for one, other in itertools.combinations(boxes, 2))
    frames = [axis.get_tightbbox(renderer) for axis in figure.axes]
    assert not any(overlap(box, frame) for box, frame in itertools.product(boxes, frames))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    symbols = {(line.get_marker(), line.get_color()) for line in figure.axes[0].get_lines()}
    assert len(symbols) == number
    for axis in figure.axes:  # all points are inside, and those of one place stand apart
        places = [tuple(line.get_transform().transform(line.get_xydata()[0])) for line in axis.get_lines()]
        assert len(set(places)) == number
        assert all(axis.get_window_extent().contains(*place) for place in places)
    for axis in figure.axes:  # the same symbol in each panel
        assert {(line.get_marker(), line.get_color()) for line in axis.get_lines()} == symbols


def test_a_model_has_the_colour_of_its_row_in_every_plot() -> None:
    scores = gathered([result(name, "rte", 0.6) for name in ("one", "two")])
    for heights in ((70.0, 80.0), (80.0, 70.0)):
        points = [Point(name, 66.0, y) for name, y in zip(("one", "two"), heights, strict=True)]
        lines = drawing.scatter({"size": points}, scores, x="x", y="y").axes[0].get_lines()
        assert {line.get_label(): line.get_color() for line in lines} == dict(
            zip(("one", "two"), drawing.COLOURS, strict=False)
        )
