"""The ranks that a run starts itself."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from lightning_fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd
from omegaconf import OmegaConf

from distilkit.runs import ranks
from distilkit.runs.ranks import ranks_on_config, starter


def test_a_failed_job_of_a_sweep_ends_its_ranks_before_lightning_ends_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "in_sweep", lambda: True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    children = [child]
    with (
        contextlib.suppress(ValueError),
        ranks_on_config(tmp_path / "config.yaml", launcher=SimpleNamespace(procs=children)),
    ):
        raise ValueError("the job failed")
    assert child.returncode is not None
    assert children == []  # which Lightning's thread takes for the end of all ranks


def test_a_run_tells_its_ranks_of_itself_and_then_forgets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    with ranks_on_config(tmp_path / "config.yaml"):
        assert starter() is None
        assert os.environ["DISTILKIT_STARTER"] == str(os.getpid())
    assert dict(os.environ) == before
    monkeypatch.setenv("DISTILKIT_STARTER", "7")
    assert starter() == 7


@pytest.mark.parametrize(
    ("launcher", "program"), [("hydra._internal.core_plugins.basic.X", "my.worker"), ("joblib.X", "distilkit.train")]
)
def test_ranks_run_the_training_also_where_a_launcher_has_started_this_process(
    launcher: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ModuleType("__main__")
    worker.__spec__ = spec = SimpleNamespace(name="my.worker")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", worker)
    monkeypatch.setattr(ranks, "in_sweep", lambda: True)
    hydra = {"launcher": {"_target_": launcher}, "run": {"dir": "x"}, "runtime": {"cwd": str(tmp_path)}}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": hydra}))
    with ranks_on_config(tmp_path / "config.yaml"):
        command, folder = _hydra_subprocess_cmd(local_rank=1)
    assert command[:5] == [sys.executable, "-m", program, f"--config-path={tmp_path}", "--config-name=config"]
    assert folder == str(tmp_path)
    assert worker.__spec__ is spec
