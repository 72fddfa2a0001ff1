"""Results and runs as scoring and training write them, with figures that can be added up by hand."""

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from distilkit import metrics
from distilkit.records import Result, Rows, write_results, write_rows
from distilkit.report.frame import GLUE_TASKS, Scores, gather
from distilkit.report.page import Table

GLUE = GLUE_TASKS


COST = {
    "seconds": 1800.0,
    "tokens": 1_000_000,
    "device": "cpu",
    "machine": "Some CPU, 2 cores",
    "date": "2026-11-20",
    "versions": {"python": "3.11", "torch": "2.13"},
}


BERT = dict(zip(GLUE, (0.56, 0.84, 0.88, 0.91, 0.89, 0.69, 0.92, 0.89, 0.53), strict=True))  # sum 7.11


STUDENT = dict(zip(GLUE, (0.51, 0.82, 0.87, 0.89, 0.88, 0.59, 0.91, 0.86, 0.56), strict=True))  # sum 6.89


BASELINE = dict(zip(GLUE, (0.30, 0.75, 0.81, 0.84, 0.85, 0.55, 0.88, 0.80, 0.56), strict=True))  # sum 6.34


PARAMETERS = {"bert": 110_000_000, "student": 66_000_000, "baseline": 66_000_000}


def result(name: str, task: str, score: float | None, **fields: Any) -> Result:
    """Make a result as scoring writes it."""
    parameters = PARAMETERS.get(name, 66_000_000)
    given = {
        "model": f"outputs/{name}/student",
        "sha256": f"{name:0<7}0123456789",
        "model_type": "bert",
        "parameters": parameters,
        "parameters_without_embeddings": parameters - 24_000_000,
        "kind": "finetuned",
        "seed": 1,
        "settings": {"lr": 2e-5, "batch_size": 32},
        "scores": {} if score is None else {"accuracy": score},
        "cost": COST,
        **fields,
    }
    return Result(name=name, task=task, score=score, **given)


def with_rows(
    folder: Path,
    name: str,
    task: str,
    rows: Rows,
    *,
    seed: int = 1,
    names: Sequence[str] = ("accuracy",),
    **fields: Any,
) -> Result:
    """Make a result of the rows of one split, and write both as scoring does."""
    folder = folder / name / task / f"seed{seed}"
    write_rows(folder, "dev", rows)
    scores = {metric: metrics.score(metric, rows) for metric in names}
    given = {"details": {"rows": {"dev": len(rows)}}, "folder": str(folder), **fields}
    made = result(name, task, statistics.fmean(scores.values()), seed=seed, scores=scores, **given)
    write_results(folder, [made])
    return made


def said(share: float, *, seed: int, size: int = 1000) -> Rows:
    """Classes of which about a share is right, on rows that are equally hard for all models; 60 % are of class 1."""
    rng = np.random.default_rng(0)
    gold, hard = (rng.random(size) < 0.6).astype(int), rng.random(size)
    own = np.random.default_rng(seed).random(size)
    right = 0.7 * hard + 0.3 * own < np.quantile(0.7 * hard + 0.3 * own, share)
    logits = np.stack([-own, own], axis=1) * np.where(right == gold, 1, -1)[:, None]
    return Rows(ids=np.arange(size), gold=gold, said=np.where(right, gold, 1 - gold), logits=logits.astype(np.float16))


def glue(*, seeds: Sequence[int] = (1, 2, 3)) -> list[Result]:
    """Nine tasks, three models, three seeds: the middle one has the score of the tables above."""
    shift = {1: 0.0, 2: -0.02, 3: 0.01}
    return [
        result(name, task, score + shift[seed], seed=seed)
        for name, scores in (("student", STUDENT), ("bert", BERT), ("baseline", BASELINE))
        for task, score in scores.items()
        for seed in seeds
    ]


def speed(name: str, latency: float, **fields: Any) -> Result:
    scores = {
        "cpu/latency_ms": latency,
        "cpu/latency_ms_p10": latency - 1,
        "cpu/latency_ms_p90": latency + 2,
        "cpu/sentences_per_second": 3000 / latency,
        "cpu/onnx/latency_ms": latency / 2,
        "file_mb": 438.0,
        "onnx_mb": 440.5,
    }
    return result(name, "sst2", None, kind="speed", seed=None, scores=scores, **fields)


WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1", "split": "test", "revision": None}


def perplexity(name: str, value: float, *, task: str = "perplexity", **fields: Any) -> Result:
    """Make a result as LanguageScore writes it; ``settings`` and ``details`` are changes of what it writes."""
    given = {"scores": {task: value, "word_perplexity": 2 * value}, **fields}
    given["settings"] = {
        **{"scored_data": "5f2d", "max_tokens": None, "block_size": 512, "vocabulary": 50_257, "stride": 256},
        **fields.get("settings", {}),
    }
    given["details"] = {"documents": 60, "text_tokens": 900, "words": 700, "task": {"paths": None, "dataset": WIKITEXT}}
    given["details"] |= fields.get("details", {})
    return result(name, task, value, kind="language_model", seed=None, higher_is_better=False, **given)


def run(label: str, nll: float, *, folder: str = "outputs/a", **fields: Any) -> dict[str, Any]:
    """What the comparison of a sweep reads of a run."""
    return {
        "label": label,
        "name": "distil",
        "folder": f"{folder}/{label}",
        "before": {"val/nll": 9.0},
        "after": {"val/nll": nll},
        "student_parameters": 1000,
        "tokens_seen": 64,
        **fields,
    }


ABLATED = {"full": 0.70, "no_ce": 0.66, "no_mlm": 0.71, "no_cos": 0.69, "random_init": 0.60}


def ablated() -> list[Result]:
    return [result(f"tiny/{name}", task, s) for name, s in ABLATED.items() for task in ("sst2", "rte")]


RESULT = Result(
    name="distilbert-base-uncased",
    model="distilbert/distilbert-base-uncased",
    sha256="x",
    model_type="distilbert",
    parameters=1,
    parameters_without_embeddings=1,
    task="rte",
    kind="finetuned",
    seed=1,
    settings={},
    scores={},
    score=0.6,
)


def scored(**scores: list[float]) -> list[Any]:
    return [
        dataclasses.replace(RESULT, task=task, seed=seed, score=score)
        for task, values in scores.items()
        for seed, score in enumerate(values, 1)
    ]


def gathered(results: Sequence[Result], *, teacher: str | None = "bert", baseline: str | None = "baseline") -> Scores:
    """Gather results with the rows that are the teacher and the baseline."""
    return dataclasses.replace(gather(results), teacher=teacher, baseline=baseline)


def counting(results: Sequence[Result]) -> list[Any]:
    """List the lines of the scores that count."""
    return [line for line in gather(results).frame.itertuples(index=False) if line.metric == ""]


def by_row(table: Table | None) -> dict[str, dict[str, str]]:
    """Read a table's cells by row and column."""
    assert table is not None
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def every_kind() -> list[Result]:
    """Three models on GLUE, WikiText-103 and SQuAD with a second distillation, timed, and an ablation."""
    squad = [
        result("bert", "squad", 0.85, scores={"exact_match": 0.81, "f1": 0.89}),
        result("student", "squad", 0.81, scores={"exact_match": 0.77, "f1": 0.85}),
        result(
            "student", "squad", 0.83, scores={"exact_match": 0.79, "f1": 0.87}, teacher={"name": "outputs/bert/squad"}
        ),
    ]
    timed = [speed("bert", 33.0), speed("student", 20.0), speed("baseline", 20.2)]
    return [*glue(), *squad, *timed, perplexity("bert", 16.3), perplexity("student", 21.1), *ablated()]


def write_training(sweep: Path, label: str, nlls: list[float], **fields: Any) -> Path:
    """Write what the report reads of a training run: summary.json, metrics.csv and the overrides that name it."""
    folder = sweep / label
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create([f"+sweep/ablation={label}"]), folder / ".hydra" / "overrides.yaml")
    teacher = {"name": "someone/bert", "revision": "main", "sha256": "0" * 64, "parameters": 110_000_000}
    record = run(label, nlls[-1], teacher=teacher, tokens_seen=90_000, optimizer_steps=90, layers=[0, 2], **fields)
    (folder / "summary.json").write_text(json.dumps(record), "utf-8")
    steps = [90 * index // (len(nlls) - 1) for index in range(len(nlls))]
    rows = [f"{'' if step == 0 else 0},{max(0, step - 1)},,{nll},3.5\n" for step, nll in zip(steps, nlls, strict=True)]
    header = "epoch,step,train/loss,val/nll,val/teacher_nll\n"
    (folder / "metrics.csv").write_text(header + "0,9,5.0,,\n" + "".join(rows), "utf-8")
    return folder


AFTER = {"val/loss": 3.0, "val/nll": 2.5, "val/accuracy": 0.4321, "val/agreement": 0.5}


def write_run(
    sweep: Path,
    job: str,
    overrides: list[str] | None,
    *,
    order: int = 0,
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
    **fields: Any,
) -> Path:
    """Write what the comparison reads of a finished run, as if it had ended ``order`` seconds into 1970."""
    folder = sweep / job
    (folder / ".hydra").mkdir(parents=True)
    if overrides is not None:
        OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    summary = {
        "student_parameters": 1234567,
        "tokens_seen": 4096,
        "tokens_per_second": 987.6,
        "block_size": 16,
        "before": {"val/nll": 7.25} if before is None else before,
        "after": after or AFTER,
        **fields,
    }
    file = folder / "summary.json"
    file.write_text(json.dumps(summary), "utf-8")
    os.utime(file, (order, order))
    return folder
