"""The notebook runs from top to bottom, and what is committed of it holds no path of a machine."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
FEW = 'TEACHER_STEPS, STUDENT_STEPS, PACKAGES = 2, 10, ["numpy"]'


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_the_notebook_runs_from_top_to_bottom(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("DISTILKIT_TEACHER", raising=False)
    notebook = nbformat.read(file, as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert set(re.findall(r"^([A-Z_]+) =", parameters.source, re.MULTILINE)) == set(re.findall(r"[A-Z_]{5,}", FEW))
    parameters.source = FEW
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    plots = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(plots) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_the_committed_outputs_name_no_path_of_a_machine(file: Path) -> None:
    outputs = [o for cell in nbformat.read(file, as_version=4).cells for o in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    assert not re.search(r"/(tmp|home|root|Users|usr)/", json.dumps(outputs))
