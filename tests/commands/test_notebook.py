"""The notebooks run from top to bottom, each alone, and what is committed of them holds no path of a machine."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
FEW = {  # values for the cell of parameters
    "01_distil": {"STUDENT_STEPS": 10},
    "02_temperature": {"SENTENCES": 8},
    "03_sweep": {"STUDENT_STEPS": 1, "GRID": ["objective.temperature=1,2", "objective.alpha_mlm=2"], "SEEDS": "seed=1"},
    "04_evaluate": {"STUDENT_STEPS": 1, "ROWS": 8, "SCORED_ROWS": 8, "SEEDS": "seed=1"},
}
PLOTS = {"01_distil": 1, "02_temperature": 2, "03_sweep": 1, "04_evaluate": 2}


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def plots_of(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


def code_of(file: Path) -> list[Any]:
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom(
    file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILKIT_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("DISTILKIT_TEACHER", raising=False)
    notebook = nbformat.read(file, as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    few = {**FEW[file.stem], "TEACHER_STEPS": 2, "PACKAGES": ["numpy", "pandas"]}
    assert [name for name in few if not re.search(rf"\b{name}\b.* =", parameters.source)] == []
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in few.items())
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert 0 < plots_of(notebook) <= PLOTS[file.stem]  # a report draws nothing of a teacher at chance
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_the_notebooks_make_and_find_the_same_teacher() -> None:
    cells = [code_of(file) for file in NOTEBOOKS]
    assert len(cells) == len(PLOTS)
    assert len({tuple(re.findall(r"TEACHER_STEPS\b.* = (\d+)", parameters.source)) for parameters, *_ in cells}) == 1
    assert len({re.findall(r"PACKAGES = .*]", parameters.source)[0] for parameters, *_ in cells}) == 1
    assert len({teacher.source for _, teacher, *_ in cells}) == 1


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_committed_outputs_are_whole_and_name_no_path_of_a_machine(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    outputs = outputs_of(notebook)
    assert plots_of(notebook) == PLOTS[file.stem]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert not re.search(r"/(tmp|home|root|Users|usr|work)/", json.dumps(outputs))
