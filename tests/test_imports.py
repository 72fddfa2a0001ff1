"""Hold the layout: rules of import between rooms, no cycle between files, and the rooms' budgets of lines."""

import ast
import functools
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import distilkit

SOURCE = Path(distilkit.__file__).parent
ROOMS = ("data", "runs", "watch", "trim", "export", "plan", "evaluate", "report")
BUDGETS = {"core": 6200, "data": 3060, "runs": 2100, "watch": 1000, "export": 900, "plan": 890}
BUDGETS |= {"evaluate": 3750, "report": 2200, "trim": 650}
REPORT_TAKES = {"records", "metrics", "cli", "errors", "timing", "language_model.lm_of", "watch.tracking"}
WATCHERS = {"train", "dashboard"}  # files of the core that know of watch/, next to plan/, evaluate/ and report/
TRIMMERS = {"train", "prepare", "student"}  # files of the core that know of trim/
TRIM_TAKES = {"cli", "errors", "language_model", "teacher"}
RUNS_TAKE = {"budget", "cli", "errors", "module", "records"}
PURE = {  # files that know neither Hydra nor Lightning
    *("attention", "errors", "fused", "language_model", "losses", "metrics", "objective", "probe", "student"),
    *("layers", "projections", "relations", "schedule", "teacher", "verdict"),
    *("data.blocks", "data.masking", "watch.memory", "precision", "watch.screen", "plan.micro_batch"),
    *("trim.counts", "trim.model", "trim.pieces", "trim.tokenizer"),
    *("export.card", "export.folder", "export.hub", "export.onnx"),
}


@functools.cache
def modules() -> dict[str, Path]:
    """Return each module of the package by its dotted name below distilkit; the package itself is ``""``."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = file
    return found


def room(module: str) -> str:
    """Return the room of a module; what is in no folder is the core."""
    first = module.partition(".")[0]
    return first if first in ROOMS else "core"


def imports(file: Path) -> set[str]:
    """List what a file imports, anywhere in it, as module.name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def own_imports(module: str) -> set[str]:
    """List what a module imports of the package: as ``module.name``, or ``module`` for a whole one."""
    dotted = {name for name in imports(modules()[module]) if name.split(".")[0] == "distilkit"}
    return {name.removeprefix("distilkit").lstrip(".") for name in dotted}


def module_of(name: str) -> str:
    """Return the module that an imported name is, or stands in."""
    return name if name in modules() else name.rpartition(".")[0]


@pytest.mark.parametrize("module", sorted(modules()))
def test_only_evaluation_and_report_import_evaluation_and_report(module: str) -> None:
    if room(module) not in ("evaluate", "report"):
        assert {name for name in own_imports(module) if room(module_of(name)) in ("evaluate", "report")} == set()


@pytest.mark.parametrize("module", [module for module in sorted(modules()) if room(module) == "report"])
def test_the_report_imports_little_of_the_core_and_nothing_of_the_other_rooms(module: str) -> None:
    others = {name for name in own_imports(module) if room(module_of(name)) != "report"}
    assert {name for name in others if module_of(name) not in REPORT_TAKES and name not in REPORT_TAKES} == set()


@pytest.mark.parametrize("module", [module for module in sorted(modules()) if room(module) == "runs"])
def test_what_surrounds_a_run_imports_neither_models_nor_losses_nor_data(module: str) -> None:
    assert {module_of(name) for name in own_imports(module) if room(module_of(name)) != "runs"} <= RUNS_TAKE


@pytest.mark.parametrize("module", [module for module in sorted(modules()) if room(module) == "data"])
def test_the_data_know_of_runs_only_how_files_are_stored(module: str) -> None:
    assert {name for name in own_imports(module) if room(module_of(name)) == "runs"} <= {"runs.storage.whole_folder"}


@pytest.mark.parametrize("module", [module for module in sorted(modules()) if room(module) in ("core", "data", "runs")])
def test_models_losses_and_data_do_not_know_that_they_are_watched(module: str) -> None:
    watched = {name for name in own_imports(module) if room(module_of(name)) == "watch"}
    assert module in WATCHERS or watched == set()


def test_trimming_stands_beside_the_data_and_below_the_students() -> None:
    for module in modules():
        rooms = {room(module_of(name)) for name in own_imports(module)}
        taken = {module_of(name) for name in own_imports(module) if room(module_of(name)) == "core"}
        if room(module) == "trim":
            assert rooms <= {"core", "data", "trim", "runs"}
            assert taken <= TRIM_TAKES
        elif "trim" in rooms:
            assert module in TRIMMERS


def test_nothing_imports_the_plan() -> None:
    found = {module for module in modules() for name in own_imports(module) if room(module_of(name)) == "plan"}
    assert {module for module in found if room(module) != "plan"} <= {""}  # the public names


def test_imports_have_no_cycles() -> None:
    graph = {module: {module_of(name) for name in own_imports(module)} - {module} for module in modules()}
    del graph[""], graph["data"]  # these import what they offer when it is asked for
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert {"train", "losses", "errors", "data.blocks", "report.frame", "evaluate.__main__"} <= set(order)
    assert graph["train"] >= {"module", "summary"}
    assert "evaluate.fit" in graph["evaluate.texts"] | graph["evaluate.__main__"]


@pytest.mark.parametrize("module", sorted(PURE))
def test_losses_students_and_their_kin_know_neither_hydra_nor_lightning(module: str) -> None:
    heavy = ("hydra", "omegaconf", "pytorch_lightning", "lightning")
    assert {name for name in imports(modules()[module]) if name.split(".")[0] in heavy} == set()


@pytest.mark.parametrize("target", ["distilkit", "distilkit.report.__main__", "distilkit.records", "distilkit.cli"])
def test_what_must_start_fast_imports_no_torch(target: str) -> None:
    heavy = "{'torch', 'transformers', 'pytorch_lightning', 'wandb'}"
    code = f"import sys, {target}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_every_room() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    packages = project["tool"]["setuptools"]["packages"]
    assert {f"distilkit.{name}" for name in ROOMS} <= set(packages)
    assert {each.parent.name for each in SOURCE.glob("*/__init__.py")} - {"conf"} == set(ROOMS)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_room_keeps_its_budget_of_lines(name: str) -> None:
    lines = {module: len(file.read_text("utf-8").splitlines()) for module, file in modules().items()}
    found = sum(count for module, count in lines.items() if room(module) == name)
    print(f"{name}: {found:,} of {BUDGETS[name]:,} lines")
    assert found <= BUDGETS[name]
