"""Task-agnostic knowledge distillation of pretrained language models (DistilBERT, arXiv 1910.01108).

import distilkit

result = distilkit.distill("roberta-base", paths="books/*.txt", out="runs/books", max_steps=1000)
result.path, result.metrics
"""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from distilkit.errors import UserError
from distilkit.runs.signals import end_at_once

if sys.argv[:1] == ["-m"]:  # Python is about to import a command, which takes seconds
    end_at_once()

if TYPE_CHECKING:
    from distilkit.api import Distilled, distill, export_student, replay
    from distilkit.data import DistillationDataModule
    from distilkit.module import DistillationModule
    from distilkit.objective import Objective
    from distilkit.plan import plan
    from distilkit.student import cut_student
    from distilkit.teacher import load_teacher

__all__ = [
    "DistillationDataModule",
    "DistillationModule",
    "Distilled",
    "Objective",
    "UserError",
    "__version__",
    "cut_student",
    "distill",
    "export_student",
    "load_teacher",
    "plan",
    "replay",
]
__version__ = version("distilkit")

_MODULES = {
    "Distilled": "distilkit.api",
    "DistillationDataModule": "distilkit.data",
    "DistillationModule": "distilkit.module",
    "Objective": "distilkit.objective",
    "cut_student": "distilkit.student",
    "distill": "distilkit.api",
    "export_student": "distilkit.api",
    "load_teacher": "distilkit.teacher",
    "plan": "distilkit.plan",
    "replay": "distilkit.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """List the public names before they are imported."""
    return sorted({*globals(), *__all__})
