"""What a release check finds wrong before anything is built or installed."""

import zipfile
from pathlib import Path

import pytest

from benchmarks.release import disagreements, unwanted

CHECKOUT = Path(__file__).parents[1]


def write(folder: Path, *, cited: str, listed: str) -> None:
    (folder / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n', "utf-8")
    (folder / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited}\n", "utf-8")
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## Unreleased\n\n## {listed}\n\n## 1.1.0\n", "utf-8")


def test_this_checkout_names_one_version() -> None:
    assert disagreements(CHECKOUT) == []


@pytest.mark.parametrize(
    ("cited", "listed", "found"),
    [
        ("1.2.0", "1.2.0", []),
        ("1.1.0", "1.2.0", ["but 1.1.0 in CITATION.cff"]),
        ("1.2.0", "1.1.9", ["but 1.1.9 in the newest heading of CHANGELOG.md"]),
        ("0.9", "0.8", ["but 0.9 in CITATION.cff", "but 0.8 in the newest heading of CHANGELOG.md"]),
    ],
)
def test_each_place_with_another_version_is_named(cited: str, listed: str, found: list[str], tmp_path: Path) -> None:
    write(tmp_path, cited=cited, listed=listed)
    named = disagreements(tmp_path)
    assert len(named) == len(found)
    assert all(part in line and "version=1.2.0" in line for part, line in zip(found, named, strict=True))


def test_tests_and_caches_in_a_wheel_are_found(tmp_path: Path) -> None:
    package = ["distilkit/__init__.py", "distilkit/data/cache.py", "distilkit/conf/train/train.yaml"]
    stray = ["distilkit/tests/test_a.py", "distilkit/__pycache__/a.pyc", "distilkit/.mypy_cache/a.json", "tests/b.py"]
    stray += ["benchmarks/step.py", "distilkit/conftest.py"]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in [*package, *stray, "distilkit-1.2.0.dist-info/METADATA"]:
            wheel.writestr(name, "")
    assert unwanted(tmp_path / "a.whl") == stray
