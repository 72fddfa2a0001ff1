"""Imports go in one direction: from room to room, and without a cycle from file to file."""

import ast
import graphlib
from pathlib import Path

import distilkit

SOURCE = Path(distilkit.__file__).parent
PURE = {  # what knows neither Hydra nor Lightning
    *("attention", "errors", "fused", "language_model", "losses", "objective", "student", "teacher"),
    *("data.masking",),
}


def modules() -> dict[str, Path]:
    """Return each module of the package by its dotted name below distilkit."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = file
    return found


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


def own_imports() -> dict[str, set[str]]:
    """Return for each module of the package the modules of the package that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        graph[name] = set()
        for dotted in imports(file):
            below = dotted.removeprefix("distilkit.")
            if below != dotted:  # a module, or a name in one
                graph[name].add(below if below in known else below.rpartition(".")[0])
        graph[name].discard(name)
    return graph


def test_imports_have_no_cycles() -> None:
    graph = own_imports()
    del graph[""], graph["data"]  # they import what they offer when it is asked for
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert {"train", "losses", "errors"} <= set(order)
    assert graph["train"] >= {"module", "summary"}


def test_losses_students_and_their_kin_know_neither_hydra_nor_lightning() -> None:
    known = modules()
    assert set(known) >= PURE
    heavy = {
        f"{name} imports {dotted}"
        for name in PURE
        for dotted in imports(known[name])
        if dotted.split(".")[0] in ("hydra", "omegaconf", "pytorch_lightning", "lightning")
    }
    assert heavy == set()
