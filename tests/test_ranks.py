"""The ranks that a run starts itself."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distilkit import ranks
from distilkit.ranks import ranks_on_config, starter


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
