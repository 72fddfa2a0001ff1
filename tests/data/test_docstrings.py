import json
import sys
import sysconfig
from pathlib import Path

import pytest

from distilkit.data.docstrings import Docstrings, module_docstrings
from distilkit.errors import UserError

SOURCE = '''"""The module."""
import os

def function(x: int) -> int:
    """The function,

        indented,
    and not.
    """
    def inner():
        """The inner function."""
    return "a string"

class Outer:
    """The outer class."""
    attribute = """no docstring"""

    class Inner:
        """The inner class."""

        async def method(self):
            "The method."

    def undocumented(self): ...
'''


def write(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def test_the_docstrings_of_a_module_are_listed_outermost_first(tmp_path: Path) -> None:
    assert module_docstrings(write(tmp_path / "module.py", SOURCE)) == [
        "The module.",
        "The function,\n\n    indented,\nand not.",
        "The inner function.",
        "The outer class.",
        "The inner class.",
        "The method.",
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b'"""Two."""\nprint "a"', []),
        (b'"""Null."""\0', []),
        (b'"""caf\xe9"""', []),
        (b'# coding: latin1\n"""caf\xe9"""', ["café"]),
        (b'"""Half: \\ud83d."""\nclass A:\n    """Whole."""', ["Whole."]),
        (rb'"""An invalid \escape."""', [r"An invalid \escape."]),
        (b"", []),
        (b'\xef\xbb\xbf"""Marked."""', ["Marked."]),
        (b"x = " + b"(" * 100_000, []),
        (b"x = " + b"-" * 100_000 + b"1", []),
        (b"x = " + b"1" * 100_000, []),
        ('"""Wide."""'.encode("utf-16"), []),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_module_that_does_not_parse_has_no_docstrings(tmp_path: Path, source: bytes, expected: list[str]) -> None:
    assert module_docstrings(write(tmp_path / "module.py", source)) == expected


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the path with copies of docstrings, tests, and a module that must not be imported."""
    root = tmp_path / "site/littlepackage"
    write(root / "__init__.py", '"""Package."""\nraise RuntimeError("imported")\n')
    write(root / "a.py", '"""A."""\ndef f():\n    """Copy."""\ndef g():\n    """Copy."""\n')
    write(root / "deep/b.py", '"""Copy."""\nclass B:\n    """B."""\n')
    write(root / "deep/copy.py", '"""Copy."""\n')
    write(root / "tests/test_a.py", '"""Not a test."""\n')
    write(root / "broken.py", "def")
    write(root / "deep/._b.py", b'"""Resource fork."""')
    write(root / ".ipynb_checkpoints/a-checkpoint.py", '"""Checkpoint."""')
    (root / "gone.py").symlink_to("nowhere.py")
    (root / "back").symlink_to(".")
    (root / "link.py").symlink_to("a.py")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "littlepackage"


def test_docstrings_are_one_document_a_module_without_copies(package: str) -> None:
    docstrings = Docstrings(packages=[package])
    assert list(docstrings.documents()) == list(docstrings.documents()) == ["Package.", "A.\n\nCopy.", "B."]


def test_many_modules_are_parsed_in_processes_to_the_same_documents(tmp_path: Path, package: str) -> None:
    for number in range(1000):
        write(tmp_path / f"site/{package}/many/{number:04}.py", f'"""Module {number}."""')
    documents = list(Docstrings(packages=[package], num_workers=2).documents())
    assert documents == ["Package.", "A.\n\nCopy.", "B.", *(f"Module {number}." for number in range(1000))]


def test_installed_packages_give_their_own_docstrings_once() -> None:
    docstrings = Docstrings(packages=["json", "email"])
    documents = list(docstrings.documents())
    assert any(json.dumps.__doc__.split("\n")[0] in document for document in documents)
    assert len(documents) <= len(docstrings.files())
    assert len(set(documents)) == len(documents)


def test_stdlib_is_pythons_own_library_without_tests_and_installed_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = Docstrings(packages=["stdlib"]).files()
    assert {root / "json/__init__.py", root / "ast.py"} <= set(files)
    assert not [file for file in files if {"site-packages", "test", "tests"} & set(file.relative_to(root).parts)]


def test_the_fingerprint_of_docstrings_names_versions() -> None:
    versions = Docstrings(packages=["json", "numpy", "pytorch_lightning"]).fingerprint()["docstrings"]
    import numpy
    import pytorch_lightning

    assert versions == {
        "json": sys.version,
        "numpy": numpy.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
    }


@pytest.mark.parametrize("name", ["nosuchpackage", "nosuchpackage.part", "json.nothing", "__main__", "bisect"])
def test_what_is_no_installed_package_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not an installed package; install it or remove it from the list"):
        Docstrings(packages=[name])
