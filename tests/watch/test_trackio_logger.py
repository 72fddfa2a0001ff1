"""What Trackio holds after a run, and after a resume of it."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distilkit.errors import UserError
from distilkit.watch.trackio_logger import TrackioLogger
from jobs import QUIET, SMALL, only, spawn

# Trackio finds its folder when it is imported, so that each part has a process of its own.
READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("distilkit")
print(json.dumps([name, SQLiteStorage.get_run_config("distilkit", name), SQLiteStorage.get_logs("distilkit", name)]))
"""


@pytest.mark.slow
def test_a_run_and_its_resume_are_one_run_with_numbers_config_predictions_and_verdict(
    tmp_path: Path, text_file: Path, save_teacher: Callable[..., Path]
) -> None:
    place = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(Path(__file__).parents[1])}
    own = ["teacher=hf", f"teacher.name={save_teacher('bert')}", *SMALL, f"data.corpus.paths={text_file}"]
    own += [f"cache_dir={tmp_path / 'cache'}", *QUIET, "logger=trackio"]
    own += [f"hydra.run.dir={tmp_path / 'run'}", "ckpt_path=auto", "callbacks.validation.optimizer_steps=2"]
    stop = "+callbacks.stop={_target_: jobs.StopAfter, step: 3}"
    save = "callbacks.checkpoint.every_n_train_steps=2"
    broken = spawn("-m", "distilkit.train", *own, "trainer.max_steps=4", stop, save, cwd=tmp_path, environment=place)
    assert "the power went out" in broken.err
    done = spawn("-m", "distilkit.train", *own, "trainer.max_steps=4", cwd=tmp_path, environment=place)
    assert done.code == 0, done.err
    read = spawn("-c", READ, cwd=tmp_path, environment=place)
    assert read.code == 0, read.err
    name, config, logs = json.loads(read.out.splitlines()[-1])
    assert name == "distil-run"
    assert config["objective"]["alpha_ce"] == 5.0
    keys = {key for row in logs for key in row}
    terms = {f"train/{kind}_{term}" for kind in ("loss", "weighted") for term in ("ce", "mlm", "cos")}
    assert keys >= {*terms, "train/lr", "train/gradient_norm", "val/nll", "val/agreement", "progress/tokens"}
    last = {key: value for row in logs for key, value in row.items()}
    verdict = json.loads(only(tmp_path, "run/summary.json").read_text("utf-8"))["verdict"]["line"]
    assert last["verdict"]["_value"] == verdict
    assert "| teacher |" in last["predictions"]["_value"]
    steps = [row["step"] for row in logs if "train/loss" in row]
    assert set(steps) == {0, 1, 2, 3}


def test_a_missing_package_is_an_error_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "distilkit.watch.trackio_logger.find_spec", lambda name: None if name == "trackio" else find(name)
    )
    with pytest.raises(UserError, match=r"install it with pip install 'distilkit\[trackio\]'"):
        TrackioLogger(save_dir="runs/a", project="distilkit", name="distil")
