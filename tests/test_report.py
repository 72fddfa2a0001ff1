import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf

from distilkit.report import SweepReport, compare, measure_latency, read_runs, run_label, table_rows


def fake_run(sweep: Path, number: int, overrides: list[str], **changes: Any) -> Path:
    """Write what a finished run leaves: its overrides and its summary."""
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    after = {"val/nll": 4.0 + number, "val/accuracy": 0.3 - number / 100}
    summary = {
        "student_parameters": 1000 * (number + 1),
        "tokens_seen": 123456,
        "tokens_per_second": 789.6,
        "block_size": 16,
        "before": {"val/nll": 9.0},
        "after": after,
    }
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for number, temperature in enumerate((1, 2, 4)):
        fake_run(tmp_path, number, ["teacher=gpt2", f"objective.temperature={temperature}"])
    (tmp_path / "3" / ".hydra").mkdir(parents=True)  # a run that did not finish
    return tmp_path


def test_runs_are_named_by_what_they_do_not_share(sweep: Path) -> None:
    runs = read_runs(sweep)
    assert [run["label"] for run in runs] == [f"objective.temperature={value}" for value in (1, 2, 4)]
    assert [run["student_parameters"] for run in runs] == [1000, 2000, 3000]
    assert [Path(run["folder"]).name for run in runs] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "overrides, label",
    [
        (["+experiment/demo=teacher", "experiment=demo"], "teacher"),
        (["+trainer.profiler=simple", "experiment=demo"], "trainer.profiler=simple"),
        (["seed=1", "objective=mlm", "experiment=demo"], "seed=1, objective=mlm"),
        (["experiment=demo"], "7"),
    ],
)
def test_labels_are_short(overrides: list[str], label: str, tmp_path: Path) -> None:
    assert run_label(fake_run(tmp_path, 7, overrides), {"experiment=demo"}) == label


def test_the_table_holds_what_the_summaries_hold(sweep: Path) -> None:
    header, rows = table_rows(read_runs(sweep))
    assert header == ["run", "parameters", "tokens seen", "tokens/s", "cross-entropy", "accuracy", "untrained"]
    assert rows[1] == ["objective.temperature=2", "2,000", "123,456", "790", "5.000", "0.290", "9.000"]


def test_a_value_that_one_run_lacks_is_a_dash(sweep: Path) -> None:
    fake_run(
        sweep, 5, ["teacher=gpt2", "x=1"], before={}, after={"val/nll": 1.0, "val/accuracy": 0.5, "val/agreement": 0.9}
    )
    header, rows = table_rows(read_runs(sweep))
    column = header.index("agreement")
    assert [row[column] for row in rows] == ["-", "-", "-", "0.900"]
    assert rows[3][header.index("untrained")] == "-"


def test_a_comparison_is_printed_and_written(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SweepReport(measure_latency=False).on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}}))
    printed = capsys.readouterr().out
    for folder in ("0", "1", "2"):
        assert f"{sweep}/{folder}/student" in printed
    lines = (sweep / "comparison.md").read_text().splitlines()
    assert len(lines) == 2 + 3
    assert lines[2] == "| objective.temperature=1 | 1,000 | 123,456 | 790 | 4.000 | 0.300 | 9.000 |"
    assert len(json.loads((sweep / "comparison.json").read_text())["runs"]) == 3
    picture = imread(sweep / "comparison.png")
    assert picture.shape[0] > 200
    assert picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05  # something is drawn


def test_a_sweep_without_a_finished_run_writes_nothing(tmp_path: Path) -> None:
    compare(tmp_path, latency=False)
    assert list(tmp_path.iterdir()) == []


def test_latency_is_measured_for_each_model(save_teacher: Callable[..., Path]) -> None:
    folders = [str(save_teacher(name, num_layers=1)) for name in ("bert", "gpt2")]
    milliseconds = measure_latency(folders, block_size=16, rounds=3)
    assert len(milliseconds) == 2
    assert all(value > 0 for value in milliseconds)
