"""The record of a scored model: what was measured on which task, and what it cost."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from distilkit.errors import UserError
from distilkit.summary import versions, write_json

FILE = "results.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one task with one seed.

    ``name`` is the model's row in tables. ``score`` is the task's one number, the mean of its metrics as in GLUE; it is
    None where there is none (speed). Shares and correlations are between 0 and 1 (-1 and 1), perplexities and times in
    their own units. ``held_out`` is the score on a part of the training set that was kept for choosing. ``teacher``
    tells of a second distillation. ``details`` holds what is no single number.
    """

    name: str
    model: str
    sha256: str
    model_type: str
    parameters: int
    parameters_without_embeddings: int
    task: str
    kind: Literal["finetuned", "language_model", "speed"]
    seed: int | None
    settings: dict[str, Any]
    scores: dict[str, float]
    score: float | None
    higher_is_better: bool = True
    held_out: float | None = None
    teacher: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


def model_name(model: str) -> str:
    """Name a model's row: a folder's name, its parent's where it is but student or model, or a hub id's last part."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model.rstrip("/").rpartition("/")[2]
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("student", "model") else folder.name


def cpu_name() -> str:
    """Name the CPU's model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processor(device: str) -> str:
    """Name the GPU, or the CPU and the number of its cores."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{cpu_name()}, {os.cpu_count()} cores"


def cost(*, seconds: float, tokens: int, device: str) -> dict[str, Any]:
    """Say what a measurement took, where and when; ``tokens`` were trained on or scored."""
    return {
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "device": device,
        "machine": processor(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Write the results of one job, all at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"format": FORMAT, "results": [asdict(result) for result in results]})


def read_file(file: Path) -> list[Result]:
    """Read the results of one job.

    Raises:
        UserError: the file was not written by ``write_results``.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise UserError(
                f"{file} has format {content['format']}, this distilkit reads {FORMAT}; score the model again"
            )
        return [Result(**record) for record in content["results"]]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a result of distilkit.evaluate ({error}); delete it") from error


def read_results(folders: Iterable[Path]) -> list[Result]:
    """Read all results below some folders, in the order of their paths.

    Raises:
        UserError: a folder does not exist, or a file is damaged.
    """
    results = []
    for folder in folders:
        if not folder.exists():
            raise UserError(
                f"{folder} does not exist; give the folder of a run, a sweep or an evaluation below outputs/"
            )
        for file in sorted(folder.rglob(FILE)):
            results.extend(read_file(file))
    return results
