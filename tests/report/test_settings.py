"""Parallel coordinates over the settings of a sweep."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from distilkit.report import settings
from scores import run


def write_configs(sweep: Path, *configs: dict[str, Any], nlls: list[float] | None = None) -> list[dict[str, Any]]:
    made = []
    for number, config in enumerate(configs):
        made.append(run(str(number), 4.0 + number if nlls is None else nlls[number], folder=str(sweep)))
        (sweep / str(number)).mkdir(parents=True)
        (sweep / str(number) / "config.yaml").write_text(json.dumps(config), "utf-8")
    return made


def config(**objective: Any) -> dict[str, Any]:
    return {"objective": {"_target_": "x", "alpha_ce": 5.0, **objective}, "seed": 1, "name": "distil"}


def test_the_axes_are_the_settings_in_which_runs_differ(tmp_path: Path) -> None:
    made = write_configs(
        tmp_path,
        {**config(temperature=1), "output_dir": "a", "data": {"cache_dir": "x", "seed": 1}},
        {**config(temperature=2, alpha_mlm=None), "output_dir": "b", "data": {"cache_dir": "y", "seed": 2}},
        {**config(temperature=2, alpha_mlm=1.0), "output_dir": "c", "seed": 2},
    )
    assert settings.varied(made) == {
        "objective.temperature": [1, 2, 2],
        "seed": [1, 1, 2],
        "objective.alpha_mlm": ["-", "-", 1.0],
    }


@pytest.mark.parametrize(
    ("values", "heights", "ticks"),
    [
        ([1, 2, 4], [0, 1 / 3, 1], {0: "1", 1: "4", 1 / 3: "2"}),
        ([1e-5, 1e-3, 1e-4], [0, 1, 0.5], {0: "1e-05", 1: "0.001", 0.5: "0.0001"}),
        (["all", "masked", "all"], [0, 1, 0], {0: "all", 1: "masked"}),
        ([True, False], [1, 0], {0: "False", 1: "True"}),
        ([3, 3], [0.5, 0.5], {0.5: "3"}),
    ],
)
def test_values_stand_in_their_order(values: list[Any], heights: list[float], ticks: dict[float, str]) -> None:
    found, written = settings._heights(values)
    assert found == pytest.approx(heights)
    assert list(written.values()) == list(ticks.values())
    assert list(written) == pytest.approx(list(ticks))


def test_an_axis_of_many_values_names_few_of_them_with_its_ends() -> None:
    _, written = settings._heights([index / 10 for index in range(40)])
    assert len(written) == 6
    assert {"0", "3.9"} <= set(written.values())


def test_each_sweep_of_three_scored_runs_is_drawn_and_its_best_run_is_red(tmp_path: Path) -> None:
    three = write_configs(tmp_path / "a", *(config(temperature=t) for t in (1, 2, 4)), nlls=[4.2, 4.0, 4.4])
    two = write_configs(tmp_path / "b", config(temperature=1), config(temperature=2))
    same = write_configs(tmp_path / "c", config(), config(), config())
    unscored = [
        {**each, "after": {}} for each in write_configs(tmp_path / "d", *[config(temperature=t) for t in (1, 2, 3)])
    ]
    (plot,) = settings.settings_plots([*three, *two, *same, *unscored])
    assert plot.name == "settings_1"
    assert plot.caption == "Settings and held-out cross-entropy of the 3 runs of a, the best one in red."
    picture = (matplotlib.image.imread(io.BytesIO(plot.png))[..., :3] * 255).round().astype(int)
    red = (picture == [0xD5, 0x5E, 0x00]).all(axis=-1)
    assert red[:, : red.shape[1] // 2].any() and red.any()
