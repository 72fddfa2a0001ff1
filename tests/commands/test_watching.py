"""What a run writes for those who watch it: read back from the offline file of W&B and from TensorBoard."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distilkit.dashboard
import distilkit.train
from distilkit.objective import Objective
from distilkit.records import read_metrics
from jobs import SMALL, call, only
from test_dashboard import panels
from watched import history, records

KEYS = {
    *("train/loss", "train/loss_ce", "train/loss_mlm", "train/loss_cos"),
    *("train/weighted_ce", "train/weighted_mlm", "train/weighted_cos"),
    *("train/gradient_norm", "train/gradient_norm_ce", "train/gradient_norm_mlm", "train/gradient_norm_cos"),
    *("train/lr", "throughput/tokens_per_second", "throughput/mfu", "memory/host_peak_mb"),
    *("val/nll", "val/agreement", "progress/tokens", "progress/hours"),
}
BOARD = (
    "{_target_: pytorch_lightning.loggers.TensorBoardLogger, save_dir: '${output_dir}', name: '', version: tensorboard}"
)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, save_teacher: Callable[..., Path], text_file: Path, cache: Path
) -> Path:
    """Train for four steps with W&B and TensorBoard."""
    cwd = tmp_path_factory.mktemp("watching")
    done = call(
        distilkit.train.main,
        "teacher=hf",
        f"teacher.name={save_teacher('bert')}",
        *SMALL,
        f"data.corpus.paths={text_file}",
        f"cache_dir={cache}",
        "trainer.max_steps=4",
        "callbacks.validation.optimizer_steps=2",
        "callbacks.gradient_norms.by_term=true",
        "logger=wandb",
        "logger.wandb.log_model=true",
        f"+logger.tensorboard={BOARD}",
        "hydra.run.dir=run",
        cwd=cwd,
    )
    assert done.code == 0, done.err
    return cwd / "run"


def test_all_loggers_have_the_same_numbers(run: Path) -> None:
    logged: dict[str, list[Any]] = {}
    for row in history(run):
        for name, value in row.items():
            logged.setdefault(name, []).append(value)
    assert logged.keys() >= KEYS
    curves = read_metrics(run / "metrics.csv")
    assert curves.keys() >= KEYS
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) >= KEYS
    for name in KEYS - {"progress/tokens", "progress/hours"}:  # those stand beside both kinds of rows
        values = [value for _, value in curves[name]]
        assert logged[name] == pytest.approx(values, rel=1e-5), name
        assert [event.value for event in board.Scalars(name)] == pytest.approx(values, rel=1e-5), name


def test_weighted_terms_add_up_and_the_axes_are_tokens_and_hours(run: Path) -> None:
    curves = {name: dict(points) for name, points in read_metrics(run / "metrics.csv").items()}
    for step, loss in curves["train/loss"].items():
        terms = {name: curves[f"train/weighted_{name}"][step] for name in ("ce", "mlm", "cos")}
        assert sum(terms.values()) == pytest.approx(loss, rel=1e-5)
        assert terms["ce"] == pytest.approx(5.0 * curves["train/loss_ce"][step], rel=1e-5)
    assert curves["progress/tokens"][0] == curves["progress/hours"][0] == 0
    assert curves["progress/tokens"][4] == json.loads((run / "summary.json").read_text("utf-8"))["tokens_seen"]
    seconds = json.loads((run / "summary.json").read_text("utf-8"))["training_seconds"]
    assert 3600 * curves["progress/hours"][4] == pytest.approx(seconds, abs=1e-3)  # the clock stands after a step
    scored = [row for row in history(run) if "val/nll" in row]  # W&B draws what stands in one row
    assert [row["progress/tokens"] for row in scored] == [curves["progress/tokens"][step] for step in (0, 2, 4)]


def test_the_table_of_predictions_grows_with_each_validation(run: Path) -> None:
    tables = [row for row in history(run) if "predictions/path" in row]
    assert [(row["predictions/_type"], row["predictions/nrows"]) for row in tables] == [
        ("table-file", 4),
        ("table-file", 8),
        ("table-file", 12),
    ]
    file = only(run, "wandb/offline-run-*/files") / tables[-1]["predictions/path"]
    table = json.loads(file.read_text("utf-8"))
    assert table["columns"] == ["step", "sentence", "word", "teacher", "student"]
    assert [row[0] for row in table["data"]] == [0] * 4 + [2] * 4 + [4] * 4
    by_word = {(row[1], row[2]) for row in table["data"]}
    assert len(by_word) == 4
    assert len({(row[1], row[2], row[3]) for row in table["data"]}) == 4  # a teacher does not change
    assert all(len(row[column].split(" %, ")) == 5 for row in table["data"] for column in (3, 4))
    text = (run / "predictions.md").read_text("utf-8")
    assert text.count("| teacher |") == 4
    assert text.count("| student |") == 12
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = board.Tensors("predictions/text_summary")
    assert text.endswith(shown[-1].tensor_proto.string_val[0].decode())


def test_the_config_and_the_student_are_there(run: Path) -> None:
    found = records(run)
    config = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in found
        for update in (record.config.update, record.run.config.update)
        for item in update
    }
    assert config["objective"]["temperature"] == 2.0
    assert config["trainer"]["max_steps"] == 4
    assert config["data"]["corpus"]["paths"].endswith("corpus.txt")  # resolved
    (artifact,) = [record.artifact for record in found if record.artifact.type == "model"]
    files = {entry.path for entry in artifact.manifest.contents}
    student = run / "student"
    assert files == {file.relative_to(student).as_posix() for file in student.rglob("*") if file.is_file()}
    verdict = json.loads((run / "summary.json").read_text("utf-8"))["verdict"]
    assert json.loads(artifact.metadata)["line"] == verdict["line"]


def test_a_resumed_run_keeps_the_table(run: Path, tmp_path: Path) -> None:
    import torch

    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Predictions"]["rows"]
    assert [row["step"] for row in saved if row["model"] == "student"] == [0] * 4 + [2] * 4 + [4] * 4


def test_the_dashboard_draws_what_runs_log_and_leaves_nothing_out(run: Path, tmp_path: Path) -> None:
    done = call(distilkit.dashboard.main, "project=p", "dry_run=true", cwd=tmp_path)
    assert done.code == 0, done.err
    configs = panels(json.loads(done.out)["run"]).values()
    drawn = {name for config in configs for name in (*(config.get("metrics") or ()), config.get("xAxis")) if name}
    terms = {field.name.removeprefix("alpha_") for field in fields(Objective) if field.name.startswith("alpha_")}
    absent = {f"train/{kind}_{name}" for kind in ("loss", "weighted", "gradient_norm") for name in terms} - KEYS
    logged = {name for row in history(run) for name in row}
    assert drawn - logged == absent | {"memory/device_peak_mb"}  # of terms without a weight, and of a GPU
    assert drawn >= KEYS


def test_a_run_that_fails_is_closed_as_failed_so_that_the_next_training_has_its_own(
    tmp_path: Path, save_teacher: Callable[..., Path], text_file: Path, cache: Path
) -> None:
    given = "teacher=hf", f"teacher.name={save_teacher('bert')}", *SMALL, f"data.corpus.paths={text_file}"
    stop = "+callbacks.stop={_target_: jobs.StopAfter, step: 1}"
    more = "logger=wandb", "validate_first=false", f"cache_dir={cache}", "hydra.run.dir=run", stop
    assert "the power went out" in call(distilkit.train.main, *given, *more, cwd=tmp_path).err
    ends = [record.exit.exit_code for record in records(tmp_path / "run") if record.WhichOneof("record_type") == "exit"]
    assert ends == [1]
