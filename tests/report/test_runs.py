"""Training runs: tables, loss curves, and the comparison of a sweep."""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import transformers
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from distilkit.records import find_runs, read_runs
from distilkit.report import runs
from scores import AFTER, COST, by_row, gathered, result, run, write_run, write_training
from tiny import build_model


def test_training_runs_show_what_they_took_and_reached() -> None:
    teacher = {"name": "outputs/demo/teacher/student", "parameters": 2000}
    distilled = run(
        "distilled",
        4.5,
        teacher=teacher,
        layers=[0, 2],
        objective={"alpha_ce": 5.0, "alpha_mlm": 2.0, "temperature": 2.0},
        wall_seconds=5400,
        tokens_per_second=1234.5,
        peak_memory_mb={"host": 900.0, "device": 1200.5},
    )
    distilled["after"] |= {"val/agreement": 0.5, "val/accuracy": 0.25, "val/teacher_nll": 4.25}
    rows = by_row(runs.training_table([distilled, run("teacher", 4.25)], gathered([])))
    assert list(rows["distilled"].values()) == [
        *("distilled", "9.000", "4.500", "4.250", "0.250", "0.500"),  # what one looks for stands first
        *("teacher", "0 2", "64", "1.50", "1,234", "ce 5.0, mlm 2.0, temperature 2.0"),
    ]
    assert list(rows["teacher"].values())[6:8] == ["none", "-"]
    beside = run("beside", 4.25, teacher=teacher, objective={"alpha_mlm": 2.0})  # it was scored beside one
    assert by_row(runs.training_table([beside], gathered([])))["beside"]["teacher"] == "none"
    relations = run("relations", 4.25, teacher=teacher, objective={"alpha_rel": 1.0})
    assert by_row(runs.training_table([relations], gathered([])))["relations"]["teacher"] == "teacher"
    cut = run("cut", 5.0, teacher=teacher, objective={"alpha_ce": 5.0}, optimizer_steps=0)
    row = by_row(runs.training_table([cut], gathered([])))["cut"]
    assert (row["teacher"], row["objective"]) == ("none", "-")


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"_target_": "distilkit.student.cut_student", "init": "random"}, "random init"),
        ({"_target_": "distilkit.student.new_student"}, "random init"),
        ({"_target_": "distilkit.student.pretrained_student", "name": "bert"}, "-"),
    ],
)
def test_a_random_init_is_one_that_the_config_of_the_run_asks_for(
    student: dict[str, str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "full" / ".hydra").mkdir(parents=True)
    (tmp_path / "full" / ".hydra" / "config.yaml").write_text(json.dumps({"student": student}), "utf-8")
    assert by_row(runs.training_table([run("full", 4.0, folder=str(tmp_path))], gathered([])))["full"]["layers"] == said


def test_the_cost_of_scoring_is_summed_over_seeds_and_settings() -> None:
    results = [
        result("m", "rte", 0.6, seed=seed, settings={"lr": lr}, cost={**COST}) for seed in (1, 2) for lr in (1, 2)
    ]
    results[0].cost["date"] = "2026-11-20T08:00:00+00:00"
    table = runs.cost_table(gathered([*results, result("m", "cola", 0.5, cost={})]))
    assert table is not None
    assert table.title == "Cost of fine-tuning and scoring"
    assert table.rows == [["m", "RTE", "4", "4,000,000", "2.00", "Some CPU, 2 cores", "2026-11-20"]]
    assert table.notes == [
        "All seeds and settings together: 4,000,000 tokens in 2.00 hours.",
        "Versions: python 3.11, torch 2.13.",
    ]


def test_curves_are_drawn_over_tokens(outputs: Path) -> None:
    (one,) = find_runs([outputs / "ablation" / "now" / "full"])
    curves = runs._curves(one, "tokens")
    assert curves["val/nll"] == [(0.0, 9.0), (45_000.0, 6.0), (90_000.0, 4.0)]
    assert runs.loss_plot([run("full", 4.0)]) is None


def test_curves_are_drawn_over_hours_as_logged_and_else_evenly(tmp_path: Path) -> None:
    folder = write_training(tmp_path, "full", [9.0, 6.0, 4.0], training_seconds=7200)
    (one,) = find_runs([folder])
    assert runs._curves(one, "hours")["val/nll"] == [(0.0, 9.0), (1.0, 6.0), (2.0, 4.0)]
    evenly = runs.loss_plot([one])
    rows = ["epoch,step,val/nll,progress/tokens,progress/hours", ",0,9,0,0", "0,44,6,500,1.75", "0,89,4,1000,2"]
    (folder / "metrics.csv").write_text("\n".join(rows), "utf-8")
    assert runs._curves(one, "hours")["val/nll"] == [(0.0, 9.0), (1.75, 6.0), (2.0, 4.0)]
    assert runs._curves(one, "tokens")["val/nll"] == [(0.0, 9.0), (500.0, 6.0), (1000.0, 4.0)]
    logged, untimed = runs.loss_plot([one]), runs.loss_plot([{**one, "training_seconds": None}])
    assert evenly is not None and logged is not None and untimed is not None
    heights = [matplotlib.image.imread(io.BytesIO(plot.png)).shape[0] for plot in (evenly, logged, untimed)]
    assert heights[0] == heights[1] == heights[2]  # the second was logged
    (folder / "metrics.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows), "utf-8")
    alone = runs.loss_plot([{**one, "training_seconds": None}])
    assert alone is not None
    assert matplotlib.image.imread(io.BytesIO(alone.png)).shape[0] < 0.7 * heights[0]  # tokens alone


def test_the_best_run_stands_first() -> None:
    table = runs.training_table([run("b", 4.5), run("unscored", 0.0, after={}), run("a", 4.25)], gathered([]))
    assert list(by_row(table)) == ["a", "b", "unscored"]


def test_the_table_has_the_numbers_of_each_run(tmp_path: Path) -> None:
    write_run(tmp_path, "0", ["x=a"], order=0)
    write_run(tmp_path, "1", ["x=b"], order=1, tokens_seen=8192, after={**AFTER, "val/nll": 1.9996})
    header, rows = runs.comparison_table(read_runs(tmp_path), gathered([]))
    assert header == [
        "run",
        "parameters",
        "tokens seen",
        "tokens/s",
        "cross-entropy",
        "accuracy",
        "agreement",
        "untrained",
    ]
    assert rows == [
        ["x=a", "1,234,567", "4,096", "988", "2.500", "0.432", "0.500", "7.250"],
        ["x=b", "1,234,567", "8,192", "988", "2.000", "0.432", "0.500", "7.250"],
    ]


def test_a_column_that_no_run_fills_is_left_out_and_one_that_some_fill_has_dashes(tmp_path: Path) -> None:
    alone = {"val/loss": 3.0, "val/nll": 2.5, "val/accuracy": 0.4}
    write_run(tmp_path, "0", ["x=a"], order=0, before={}, after=alone, tokens_per_second=None)
    write_run(tmp_path, "1", ["x=b"], order=1, before={}, tokens_per_second=None, latency_ms=12.34)
    header, rows = runs.comparison_table(read_runs(tmp_path), gathered([]))
    assert header == ["run", "parameters", "tokens seen", "cross-entropy", "accuracy", "agreement", "latency ms"]
    assert [row[-2:] for row in rows] == [["-", "-"], ["0.500", "12.3"]]
    assert {len(row) for row in rows} == {len(header)}


def test_a_metric_of_zero_is_a_number_and_no_dash() -> None:
    one = {"label": "a", "before": {"val/nll": 0.0}, "after": {"val/accuracy": 0.0}}
    header, rows = runs.comparison_table(
        [one, {"label": "b", "before": {}, "after": {"val/agreement": 0.5}}], gathered([])
    )
    assert header == ["run", "accuracy", "agreement", "untrained"]
    assert rows == [["a", "0.000", "-", "0.000"], ["b", "-", "0.500", "-"]]


def test_the_comparison_is_written_as_table_data_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "0", ["+experiment/demo=teacher"], order=0)
    write_run(tmp_path, "1", ["+experiment/demo=distilled"], order=1, after={**AFTER, "val/nll": 3.5})
    runs.compare(tmp_path, latency=False)
    header, rule, *rows = (tmp_path / "comparison.md").read_text("utf-8").splitlines()
    columns = header.count("|") - 1
    assert rule == "| " + " | ".join(["---"] + ["---:"] * (columns - 1)) + " |"  # figures stand to the right
    assert [row.count("|") - 1 for row in rows] == [columns, columns]
    assert [row.split("|")[1].strip() for row in rows] == ["teacher", "distilled"]
    assert "latency" not in header
    content = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    assert [(run["label"], run["after"]["val/nll"]) for run in content["runs"]] == [
        ("teacher", 2.5),
        ("distilled", 3.5),
    ]
    picture = matplotlib.image.imread(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert 900 < picture.shape[1] < 3000
    assert 200 < picture.shape[0] < 2000
    said = capsys.readouterr().out
    assert f"table and plot: {tmp_path / 'comparison'}.md, .json, .png" in said
    assert f"distilled: {tmp_path}/1/student" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "0",
        "1",
        "comparison.json",
        "comparison.md",
        "comparison.png",
    }


def bars(file: Path, *, blue: bool) -> int:
    """Count the pixels in the colour of the students' bars, or in the teacher's gray."""
    rgb = (matplotlib.image.imread(file)[..., :3] * 255).round().astype(int)
    return int(np.all(rgb == ([31, 119, 180] if blue else [127, 127, 127]), axis=-1).sum())


def test_bars_grow_with_the_metric_and_the_teachers_are_gray(tmp_path: Path) -> None:
    def run(label: str, nll: float) -> dict[str, Any]:
        return {"label": label, "after": {"val/nll": nll, "val/accuracy": 0.001}, "before": {}}

    runs.plot_runs([run("a", 2.0), run("b", 2.0)], tmp_path / "students.png")
    runs.plot_runs([run("a", 2.0), run("teacher", 2.0)], tmp_path / "teacher.png")
    runs.plot_runs([run("a", 2.0), run("b", 1.0)], tmp_path / "shorter.png")
    both, one = bars(tmp_path / "students.png", blue=True), bars(tmp_path / "teacher.png", blue=True)
    assert bars(tmp_path / "students.png", blue=False) < 0.02 * both
    assert one == pytest.approx(both / 2, rel=0.1)
    assert bars(tmp_path / "teacher.png", blue=False) == pytest.approx(one, rel=0.1)
    # Two bars of cross-entropy and two of accuracy: one of the four is half as long.
    assert bars(tmp_path / "shorter.png", blue=True) == pytest.approx(3.5 / 4 * both, rel=0.02)


def test_a_plot_has_room_for_many_runs(tmp_path: Path) -> None:
    many = [{"label": f"seed={seed}", "after": {"val/nll": 2.0, "val/accuracy": 0.5}} for seed in range(12)]
    runs.plot_runs(many[:2], tmp_path / "few.png")
    runs.plot_runs(many, tmp_path / "many.png")
    low, high = (matplotlib.image.imread(tmp_path / name).shape[0] for name in ("few.png", "many.png"))
    assert high > 2 * low


def test_a_sweep_without_finished_runs_writes_nothing(tmp_path: Path) -> None:
    runs.compare(tmp_path, latency=True)
    assert list(tmp_path.iterdir()) == []


def test_hydra_calls_the_comparison_at_the_end_of_a_sweep(tmp_path: Path) -> None:
    write_run(tmp_path, "0", ["x=a"])
    callback = runs.SweepReport(measure_latency=False)
    callback.on_multirun_end(
        OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}), config_name="train", job_return=[JobReturn()]
    )
    assert (tmp_path / "comparison.md").is_file()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A shallow and a deep masked model, and a causal one."""
    made = []
    for name, model_type, num_layers in (("small", "distilbert", 1), ("large", "bert", 12), ("causal", "gpt2", 2)):
        folder = tmp_path_factory.mktemp(name) / "student"
        build_model(model_type, num_layers=num_layers).save_pretrained(folder)
        made.append(str(folder))
    return made


def test_the_latency_of_each_model_is_measured_and_a_deep_one_takes_longer(folders: list[str]) -> None:
    small, large, causal = runs.measure_latency(folders, block_size=16, rounds=9)
    assert 0 < small < large
    assert causal > 0


def test_models_are_timed_in_turn_on_one_block_of_the_given_size(
    folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    calls: list[tuple[str, torch.Size]] = []

    def load(kind: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(folder: str) -> Any:
            model = kind(folder)
            model.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append((folder, kwargs["input_ids"].shape)), with_kwargs=True
            )
            return model

        return from_pretrained

    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM):
        monkeypatch.setattr(auto, "from_pretrained", load(auto.from_pretrained))
    medians = runs.measure_latency(folders, block_size=8, rounds=2)
    assert medians == [1000.0, 1000.0, 1000.0]  # a tick a pass, in milliseconds
    warm_up = [folder for folder in folders for _ in range(3)]
    assert calls == [(folder, torch.Size([1, 8])) for folder in [*warm_up, *folders, *reversed(folders)]]


def test_the_comparison_measures_the_students_on_the_smallest_block(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for order, (job, block_size) in enumerate((("0", 32), ("1", 16))):
        write_run(tmp_path, job, [f"x={job}"], order=order, block_size=block_size)
    asked: list[tuple[list[str], int]] = []

    def measure(paths: list[str], *, block_size: int) -> list[float]:
        asked.append((paths, block_size))
        return [1.25, 2.0]

    monkeypatch.setattr(runs, "measure_latency", measure)
    runs.compare(tmp_path, latency=True)
    assert asked == [([f"{tmp_path}/0/student", f"{tmp_path}/1/student"], 16)]
    table = (tmp_path / "comparison.md").read_text("utf-8").splitlines()
    assert table[0].split("|")[-2].strip() == "latency ms"
    assert [line.split("|")[-2].strip() for line in table[2:]] == ["1.2", "2.0"]
