"""The files that training runs and scores leave, and how to read them. Importing this imports no torch."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import resource
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from distilkit.errors import UserError

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]

FILE = "results.json"
FORMAT = 2
_READ = (1, FORMAT)  # the first had no hashes of rows
_PACKAGES = ("distilkit", "torch", "pytorch-lightning", "transformers", "tokenizers", "datasets", "hydra-core", "numpy")
_DATED = re.compile(r"\d{4}-\d\d-\d\d")  # a folder of Hydra
_NEEDED = ("before", "after", "student_parameters", "tokens_seen")  # of a summary.json


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one task with one seed.

    ``name`` is the model's row in tables. ``sha256`` is the hash of a folder's weights, config, code and tokenizer, or
    the commit of a hub model. ``score`` is the task's one number, the mean of its metrics as in GLUE; it is None for
    speed. Shares lie between 0 and 1, correlations between -1 and 1; perplexities and times have their units.

    ``settings`` holds what decides a score beside the model and the seed, with plain keys: of fine-tuning ``epochs``,
    ``lr``, ``batch_size``, ``max_length``, ``precision``, ``train_rows`` and so on, the keys of the task but for where
    its rows lie, and the hashes of its rows, ``scored_data`` and ``train_data``. Scores of other settings do not
    compare. A refit after a grid has ``refit=True`` and ``settings_tried``.

    ``held_out`` is the score on rows of the training set that were held out to choose settings; that of a refit is the
    median of the setting that it took. ``teacher`` describes the teacher of a second distillation. ``details`` holds
    what is not one number: ``rows``, how many of each split, whose file read_rows reads, and ``task``, the composed
    node. ``folder`` is that of the file that it was read from.
    """

    name: str
    model: str
    sha256: str
    model_type: str
    parameters: int
    parameters_without_embeddings: int
    task: str
    kind: Literal["finetuned", "zero_shot", "language_model", "speed"]
    seed: int | None
    settings: dict[str, Any]
    scores: dict[str, float]
    score: float | None
    higher_is_better: bool = True
    held_out: float | None = None
    teacher: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    folder: str | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What a model said of each row of one split.

    ``ids`` (rows,) are int64 places in the split, or strings such as the ids of questions. ``gold`` and ``said`` (rows,)
    are int64 classes or float64 numbers, and ``logits`` (rows, classes) float16. ``sums`` holds, by name, float64 parts
    (rows,) whose sums over rows give a metric.
    """

    ids: Array
    gold: Array | None = None
    said: Array | None = None
    logits: Array | None = None
    sums: dict[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def take(self, index: Array) -> Rows:
        """Select rows by their places, as often as each is given."""
        gold, said, logits = (None if part is None else part[index] for part in (self.gold, self.said, self.logits))
        sums = {name: part[index] for name, part in self.sums.items()}
        return Rows(ids=self.ids[index], gold=gold, said=said, logits=logits, sums=sums)


def model_name(model: str) -> str:
    """Return a model's name in tables: its folder's, that above student or model, or the end of its hub id.

    A folder that is called by a date or a job's number goes by the name of its training run.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model.rstrip("/").rpartition("/")[2]
    folder = folder.resolve()
    folder = folder.parent if folder.name in ("student", "model") else folder
    summary = folder / "summary.json"
    if not (_DATED.match(folder.name) or folder.name.isdigit()) or not summary.is_file():
        return folder.name
    name = str(json.loads(summary.read_text("utf-8")).get("name") or folder.name)
    return f"{name}-{folder.name}" if folder.name.isdigit() else name


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that influence results."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def peak_memory_mb(device: torch.device) -> dict[str, float]:
    """Return the peak resident memory of this process and, on CUDA, of its tensors, in megabytes."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        import torch

        peak["device"] = torch.cuda.max_memory_allocated(device) / 2**20
    return {name: round(value, 1) for name, value in peak.items()}


def cpu_name() -> str:
    """Return the name of the CPU's model, or of its architecture if the system has no model name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text("utf-8") if info.exists() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def processor(device: str) -> str:
    """Return the name of the GPU, or of the CPU and the number of its cores."""
    if not device.startswith("cuda"):
        return f"{cpu_name()}, {os.cpu_count()} cores"
    import torch

    return torch.cuda.get_device_name(device)


def cost(*, seconds: float, tokens: int, device: str) -> dict[str, Any]:
    """Return what a measurement took, where and when; ``tokens`` were trained on or scored."""
    return {
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "device": device,
        "machine": processor(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def write_json(file: Path, content: Any) -> None:
    """Write JSON to a temporary file and rename it, so that a reader never finds a partial file."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")
    temporary.replace(file)


def write_rows(folder: Path, split: str, rows: Rows) -> None:
    """Write the rows of one split to rows-<split>.npz; a reader finds all of them or none."""
    arrays = {name: part for name, part in vars(rows).items() if name != "sums" and part is not None}
    arrays |= {f"sums/{name}": part for name, part in rows.sums.items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rows-{split}.npz"
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    temporary.replace(file)


def read_rows(folder: str | Path, split: str) -> Rows | None:
    """Read the rows of one split; None where there are none, as beside results of older versions."""
    file = Path(folder) / f"rows-{split}.npz"
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        sums = {name.removeprefix("sums/"): arrays.pop(name) for name in list(arrays) if name.startswith("sums/")}
        return Rows(**arrays, sums=sums)
    except Exception as error:  # whatever zipfile, zlib and numpy's reader of headers raise
        raise UserError(f"{file} is damaged ({error}); delete it and score the model again") from error


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Write the results of one job; a reader finds all of them or none."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"format": FORMAT, "results": [_record(result) for result in results]})


def _record(result: Result) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name != "folder"}


def read_file(file: Path) -> list[Result]:
    """Read the results of one job."""
    try:
        content = json.loads(file.read_text("utf-8"))
        if content["format"] not in _READ:
            found, known = content["format"], " and ".join(map(str, _READ))
            raise UserError(f"{file} has format {found}, this distilkit reads {known}; score the model again")
        return [Result(**record, folder=str(file.parent)) for record in content["results"]]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a result of distilkit.evaluate ({error}); delete it") from error


def read_results(folders: Iterable[Path]) -> list[Result]:
    """Read all results below some folders, in the order of their folders."""
    results = []
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder} does not exist; give the folder of a run, a sweep or an evaluation in outputs/")
        results += [
            result for file in sorted(folder.rglob(FILE), key=lambda file: file.parent) for result in read_file(file)
        ]
    return results


def read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Read Lightning's metrics.csv: for each metric, the optimizer steps done and its values."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    # Lightning numbers steps from 0; the score before the first one has no epoch.
                    curves.setdefault(name, []).append((int(row["step"]) + bool(row.get("epoch")), float(value)))
    return curves


NOT_SETTINGS = ("ckpt_path=", "may_change=", "sweep.share_teacher=")  # overrides that change no result


def _overrides(folder: Path) -> list[str]:
    file = folder / ".hydra" / "overrides.yaml"
    if not file.is_file():
        return []
    given: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # which may hold ${...}
    return [each for each in map(str, given) if not each.startswith(NOT_SETTINGS)]


def run_label(folder: Path, common: set[str]) -> str:
    """Label a run by the overrides that not all runs share, or its folder; +experiment/demo=teacher becomes teacher."""
    own = [item for item in _overrides(folder) if item not in common]
    return ", ".join(re.sub(r"^\+[^=]*/[^=]*=|^\++", "", item) for item in own) or folder.name


def read_runs(sweep: Path, *, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Read the summaries of a sweep's finished runs, by job number or else in the order they ended.

    Each has ``label`` and ``folder``.
    ``only`` limits which summaries are read. The labels still depend on the overrides of all runs.
    """
    files = sorted(
        sweep.glob("*/summary.json"),
        key=lambda file: (int(name) if (name := file.parent.name).isdecimal() else math.inf, file.stat().st_mtime),
    )
    sets = [set(_overrides(file.parents[1])) for file in sweep.glob("*/.hydra/overrides.yaml")]  # of failed jobs too
    common = set.intersection(*sets) if len(sets) > 1 else set()
    return [
        {**json.loads(file.read_text("utf-8")), "label": run_label(file.parent, common), "folder": str(file.parent)}
        for file in files
        if only is None or str(file.parent) in only
    ]


def distinct(folders: Iterable[Path]) -> list[Path]:
    """Remove folders that are given twice or lie in another one, so that nothing counts twice."""
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [folder for folder in resolved if not any(other in folder.parents for other in resolved)]


def find_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the summaries of all training runs below some folders, each with its ``label`` and ``folder``."""
    runs = []
    for folder in folders:
        found = {str(file.parent) for file in folder.rglob("summary.json")}
        for sweep in sorted({PurePath(run).parent for run in found}):
            try:
                some = read_runs(Path(sweep), only=found)
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
                raise UserError(f"a summary.json below {sweep} is damaged ({error}); delete it") from error
            for run in some if len(some) == 1 else ():  # there is no other run to compare its overrides with
                if ", " in run["label"] or _DATED.match(run["label"]):
                    name, own = run.get("name", ""), Path(run["folder"]).name
                    run["label"] = name if name and _DATED.match(own) else f"{name}/{own}"
            runs += some
    for run in runs:
        if missing := [name for name in _NEEDED if name not in run]:
            raise UserError(
                f"{run['folder']}/summary.json has no {', '.join(missing)} and was not written by distilkit.train; "
                "give other folders in runs, or delete it"
            )
    return runs


def duration(hours: float) -> str:
    """Write a time to three digits, as 40 s, 12.5 min, 2.14 h or 3.4 days."""
    units = ((48, 24.0, "days"), (1, 1.0, "h"), (1 / 60, 1 / 60, "min"))
    unit, name = next(((unit, name) for least, unit, name in units if hours >= least), (1 / 3600, "s"))
    return f"{hours / unit:,.{'0f' if hours / unit >= 100 else '3g'}} {name}"
