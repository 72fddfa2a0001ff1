"""Text that every machine with this package has: the docstrings of installed packages."""

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


class Docstrings:
    """Read the docstrings of installed packages: English technical prose that every machine with this package has.

    ``packages`` are import names; ``stdlib`` is Python's own library. A document is the docstrings of one module;
    a docstring that occurred before is dropped, since copies are common.

    Raises:
        UserError: a package is not installed.
    """

    def __init__(self, *, packages: Sequence[str], num_workers: int | None = None) -> None:
        """Find the packages without importing them."""
        self.num_workers = num_workers
        self.roots = {name: _package_folder(name) for name in packages}

    def fingerprint(self) -> dict[str, Any]:
        """Name each package and its version."""
        distributions = packages_distributions()
        versions = {}
        for name in self.roots:
            try:
                versions[name] = version(distributions.get(name, [name])[0])
            except PackageNotFoundError:
                versions[name] = sys.version
        return {"docstrings": versions}

    def files(self) -> list[Path]:
        """List the Python files, in a fixed order."""
        skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__"}
        return [
            file
            for root in self.roots.values()
            for file in sorted(root.rglob("*.py"))
            if not skipped.intersection(file.relative_to(root).parts)
        ]

    def documents(self) -> Iterator[str]:
        """Yield one document for each module that has docstrings, parsed in parallel."""
        seen: set[bytes] = set()
        for docstrings in self._parsed():
            fresh = []
            for docstring in docstrings:
                digest = blake2b(docstring.encode(), digest_size=8).digest()
                if digest not in seen:
                    seen.add(digest)
                    fresh.append(docstring)
            yield from nonempty(["\n\n".join(fresh)])

    def _parsed(self) -> Iterator[list[str]]:
        files = self.files()
        if len(files) < 1000:  # starting processes would take longer than parsing
            yield from map(module_docstrings, files)
            return
        # Spawned, not forked: torch and tokenizers hold threads that do not survive a fork.
        pool = ProcessPoolExecutor(self.num_workers, mp_context=get_context("spawn"))
        try:
            yield from pool.map(module_docstrings, files, chunksize=128)
        finally:
            pool.shutdown(cancel_futures=True)  # a reader may stop early


def _package_folder(name: str) -> Path:
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # of a parent, or of a module without a spec
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.corpus.packages: {name!r} is not an installed package; install it or drop it from the list"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def module_docstrings(file: Path) -> list[str]:
    """Parse one Python file and list its docstrings, outermost first; a file that does not parse has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    found: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        docstring = ast.get_docstring(node)
        if docstring:
            found.append(docstring)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child)

    visit(tree)
    return [docstring for docstring in found if not has_surrogate(docstring)]
