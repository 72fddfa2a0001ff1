"""The comparison of a sweep's runs: which runs, under which names, in which columns, and how fast they are."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from distilkit.report import comparison
from tiny import build_model

AFTER = {"val/loss": 3.0, "val/nll": 2.5, "val/accuracy": 0.4321, "val/agreement": 0.5}


def write_run(
    sweep: Path,
    job: str,
    overrides: list[str] | None,
    *,
    order: int = 0,
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
    **fields: Any,
) -> Path:
    """Write what the comparison reads of a finished run, as if it had ended ``order`` seconds into 1970."""
    folder = sweep / job
    (folder / ".hydra").mkdir(parents=True)
    if overrides is not None:
        OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    summary = {
        "student_parameters": 1234567,
        "tokens_seen": 4096,
        "tokens_per_second": 987.6,
        "block_size": 16,
        "before": {"val/nll": 7.25} if before is None else before,
        "after": after or AFTER,
        **fields,
    }
    file = folder / "summary.json"
    file.write_text(json.dumps(summary), "utf-8")
    os.utime(file, (order, order))
    return folder


# --------------------------------------------------------------------------------- reading


def test_runs_are_read_in_the_order_they_ended_and_unfinished_ones_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, "2", ["x=c"], order=1)
    write_run(tmp_path, "0", ["x=a"], order=2)
    write_run(tmp_path, "10", ["x=b"], order=3)
    (tmp_path / "3" / "checkpoints").mkdir(parents=True)
    runs = comparison.read_runs(tmp_path)
    assert [run["folder"] for run in runs] == [str(tmp_path / job) for job in ("2", "0", "10")]
    assert [run["label"] for run in runs] == ["x=c", "x=a", "x=b"]
    assert runs[0]["after"] == AFTER
    assert runs[0]["tokens_seen"] == 4096


def test_a_summary_that_is_not_asked_for_is_not_read_and_names_runs_all_the_same(tmp_path: Path) -> None:
    one = write_run(tmp_path, "0", ["seed=1", "x=a"])
    (write_run(tmp_path, "1", ["seed=1", "x=b"]) / "summary.json").write_text("{", "utf-8")
    assert [run["label"] for run in comparison.read_runs(tmp_path, only=[str(one)])] == ["x=a"]


def test_an_empty_sweep_has_no_runs(tmp_path: Path) -> None:
    assert comparison.read_runs(tmp_path) == []


def test_a_run_is_named_by_what_not_all_runs_share(tmp_path: Path) -> None:
    shared = ["teacher=hf", "teacher.name=/models/bert", "trainer=cpu"]
    write_run(tmp_path, "0", [*shared, "objective.temperature=1", "seed=1"], order=0)
    write_run(tmp_path, "1", [*shared, "objective.temperature=2", "seed=1"], order=1)
    write_run(tmp_path, "2", [*shared, "objective.temperature=2", "seed=2"], order=2)
    assert [run["label"] for run in comparison.read_runs(tmp_path)] == [
        "objective.temperature=1, seed=1",
        "objective.temperature=2, seed=1",
        "objective.temperature=2, seed=2",
    ]


@pytest.mark.parametrize(
    ("override", "label"),
    [
        ("+experiment/demo=teacher", "teacher"),  # a stage
        ("+sweep/ablation=no_ce", "no_ce"),  # a row
        ("+trainer.deterministic=true", "trainer.deterministic=true"),
        ("objective.temperature=4", "objective.temperature=4"),
        ("data.corpus.paths=/texts/en.txt", "data.corpus.paths=/texts/en.txt"),
        ("+data.corpus.extra=/texts/en.txt", "data.corpus.extra=/texts/en.txt"),
        ("teacher=roberta-base", "teacher=roberta-base"),
    ],
)
def test_a_label_is_the_override_and_a_stage_is_its_name_alone(override: str, label: str, tmp_path: Path) -> None:
    assert comparison.run_label(write_run(tmp_path, "0", ["seed=1", override]), {"seed=1"}) == label


@pytest.mark.parametrize("overrides", [None, [], ["seed=1"]])
def test_a_run_without_overrides_of_its_own_is_named_by_its_folder(overrides: list[str] | None, tmp_path: Path) -> None:
    assert comparison.run_label(write_run(tmp_path, "only", overrides), {"seed=1"}) == "only"


# ----------------------------------------------------------------------------------- table


def test_the_table_has_the_numbers_of_each_run(tmp_path: Path) -> None:
    write_run(tmp_path, "0", ["x=a"], order=0)
    write_run(tmp_path, "1", ["x=b"], order=1, tokens_seen=8192, after={**AFTER, "val/nll": 1.9996})
    header, rows = comparison.table_rows(comparison.read_runs(tmp_path))
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
    header, rows = comparison.table_rows(comparison.read_runs(tmp_path))
    assert header == ["run", "parameters", "tokens seen", "cross-entropy", "accuracy", "agreement", "latency ms"]
    assert [row[-2:] for row in rows] == [["-", "-"], ["0.500", "12.3"]]
    assert {len(row) for row in rows} == {len(header)}


def test_a_metric_of_zero_is_a_number_and_no_dash() -> None:
    run = {"before": {"val/nll": 0.0}, "after": {"val/accuracy": 0.0}}
    assert comparison.cell(run, "val/accuracy", "{:.3f}") == "0.000"
    assert comparison.cell(run, "before", "{:.3f}") == "0.000"
    assert comparison.cell(run, "val/agreement", "{:.3f}") == "-"


# ----------------------------------------------------------------------------------- files


def test_the_comparison_is_written_as_table_data_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "0", ["+experiment/demo=teacher"], order=0)
    write_run(tmp_path, "1", ["+experiment/demo=distilled"], order=1, after={**AFTER, "val/nll": 3.5})
    comparison.compare(tmp_path, latency=False)
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

    comparison.plot_runs([run("a", 2.0), run("b", 2.0)], tmp_path / "students.png")
    comparison.plot_runs([run("a", 2.0), run("teacher", 2.0)], tmp_path / "teacher.png")
    comparison.plot_runs([run("a", 2.0), run("b", 1.0)], tmp_path / "shorter.png")
    both, one = bars(tmp_path / "students.png", blue=True), bars(tmp_path / "teacher.png", blue=True)
    assert bars(tmp_path / "students.png", blue=False) < 0.02 * both
    assert one == pytest.approx(both / 2, rel=0.1)
    assert bars(tmp_path / "teacher.png", blue=False) == pytest.approx(one, rel=0.1)
    # Two bars of cross-entropy and two of accuracy: one of the four is half as long.
    assert bars(tmp_path / "shorter.png", blue=True) == pytest.approx(3.5 / 4 * both, rel=0.02)


def test_a_plot_has_room_for_many_runs(tmp_path: Path) -> None:
    runs = [{"label": f"seed={seed}", "after": {"val/nll": 2.0, "val/accuracy": 0.5}} for seed in range(12)]
    comparison.plot_runs(runs[:2], tmp_path / "few.png")
    comparison.plot_runs(runs, tmp_path / "many.png")
    few, many = (matplotlib.image.imread(tmp_path / name).shape[0] for name in ("few.png", "many.png"))
    assert many > 2 * few


def test_a_sweep_without_finished_runs_writes_nothing(tmp_path: Path) -> None:
    comparison.compare(tmp_path, latency=True)
    assert list(tmp_path.iterdir()) == []


def test_hydra_calls_the_comparison_at_the_end_of_a_sweep(tmp_path: Path) -> None:
    write_run(tmp_path, "0", ["x=a"])
    callback = comparison.SweepReport(measure_latency=False)
    callback.on_multirun_end(
        OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}), config_name="train", job_return=[JobReturn()]
    )
    assert (tmp_path / "comparison.md").is_file()


# --------------------------------------------------------------------------------- latency


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
    small, large, causal = comparison.measure_latency(folders, block_size=16, rounds=9)
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
    for auto in (comparison.AutoModelForCausalLM, comparison.AutoModelForMaskedLM):
        monkeypatch.setattr(auto, "from_pretrained", load(auto.from_pretrained))
    medians = comparison.measure_latency(folders, block_size=8, rounds=2)
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

    monkeypatch.setattr(comparison, "measure_latency", measure)
    comparison.compare(tmp_path, latency=True)
    assert asked == [([f"{tmp_path}/0/student", f"{tmp_path}/1/student"], 16)]
    table = (tmp_path / "comparison.md").read_text("utf-8").splitlines()
    assert table[0].split("|")[-2].strip() == "latency ms"
    assert [line.split("|")[-2].strip() for line in table[2:]] == ["1.2", "2.0"]
