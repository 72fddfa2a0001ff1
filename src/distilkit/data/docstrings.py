"""A corpus that needs no download: the docstrings of installed packages."""

import ast
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from distilkit.data.corpus import has_surrogate, nonempty
from distilkit.errors import UserError

_NOT_PROSE = {"site-packages", "test", "tests", "idlelib", "__pycache__"}


class Docstrings:
    """Read the docstrings of installed packages, which are English technical prose.

    ``packages`` are import names; ``stdlib`` is the standard library. A document holds the docstrings of one module.
    Repeated docstrings are dropped.

    Raises:
        UserError: a package is not installed.
    """

    def __init__(self, *, packages: Sequence[str], num_workers: int | None = None) -> None:
        """Find the packages without importing them."""
        self.num_workers = num_workers
        self.roots = {name: _package_folder(name) for name in packages}

    def fingerprint(self) -> dict[str, Any]:
        """Return the version of each package."""
        distributions = packages_distributions()
        versions = {}
        for name in self.roots:
            try:
                versions[name] = version(distributions.get(name, [name])[0])
            except PackageNotFoundError:
                versions[name] = sys.version
        return {"docstrings": versions}

    def files(self) -> list[Path]:
        """List the Python files in a fixed order."""
        return [
            file
            for root in self.roots.values()
            for file in sorted(root.rglob("*.py"))
            if not _NOT_PROSE.intersection(file.relative_to(root).parts)
            and not any(part.startswith(".") for part in file.relative_to(root).parts)  # copies that editors keep
        ]

    def documents(self) -> Iterator[str]:
        """Yield one document for each module with docstrings. Modules are parsed in parallel."""
        seen: set[bytes] = set()
        for docstrings in self._parsed():
            by_digest = {blake2b(text.encode(), digest_size=8).digest(): text for text in docstrings}
            fresh = [text for digest, text in by_digest.items() if digest not in seen]
            seen.update(by_digest)
            yield from nonempty(["\n\n".join(fresh)])

    def _parsed(self) -> Iterator[list[str]]:
        files = self.files()
        if len(files) < 1000:  # starting processes would take longer than parsing
            yield from map(module_docstrings, files)
            return
        # Spawned, not forked: the threads of torch and tokenizers do not survive a fork.
        pool = ProcessPoolExecutor(self.num_workers, mp_context=get_context("spawn"))
        try:
            yield from pool.map(module_docstrings, files, chunksize=128)
        finally:
            pool.shutdown(cancel_futures=True)  # the caller may stop early


def _package_folder(name: str) -> Path:
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # no parent package, or a module without a spec
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.corpus.packages: {name!r} is not an installed package; install it or remove it from the list"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def module_docstrings(file: Path) -> list[str]:
    """Return the docstrings of a Python file, outermost first, or none if the file cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            tree = ast.parse(file.read_bytes())
        return [docstring for docstring in _docstrings(tree) if not has_surrogate(docstring)]
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):  # the last: too many brackets
        return []


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)
