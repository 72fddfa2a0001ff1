"""The end of a run: its record, summary.json and the loss curves."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, Trainer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from transformers import PreTrainedModel

from distilkit.callbacks import CompareForms
from distilkit.data.corpus import Corpus
from distilkit.errors import UserError
from distilkit.export.card import is_text, teacher_metadata
from distilkit.export.folder import export_checkpoint
from distilkit.language_model import num_parameters
from distilkit.metrics import ratio_of_sums
from distilkit.module import DistillationModule
from distilkit.objective import Objective
from distilkit.records import (
    Rows,
    peak_memory_mb,
    processor,
    read_metrics,
    read_rows,
    versions,
    write_json,
    write_rows,
)
from distilkit.runs.checkpoints import read_checkpoint
from distilkit.schedule import show_points
from distilkit.teacher import Teacher
from distilkit.verdict import Verdict, find_faults, judge, relative_change, weight_sample

log = logging.getLogger(__name__)

_TERMS = {
    "train/loss": "weighted sum",
    "train/loss_ce": "soft-target KL",
    "train/loss_mlm": "masked LM",
    "train/loss_clm": "causal LM",
    "train/loss_cos": "1 - cosine",
    "train/loss_mse": "logit MSE",
    "train/loss_rel": "relations",
}


def _plot_curves(metrics_file: Path, out: Path, *, title: str) -> None:
    """Plot the terms of the training loss, and held-out cross-entropy and accuracy, over optimizer steps."""
    curves = read_metrics(metrics_file)
    figure = Figure(figsize=(14, 4), layout="constrained")
    training, entropy, accuracy = figure.subplots(1, 3)
    for name, label in _TERMS.items():
        if name in curves:
            training.plot(*zip(*curves[name], strict=True), label=label, linewidth=2 if name == "train/loss" else 1)
    training.set(title="training loss and its terms", ylabel="nats per token; 1 - cosine", yscale="log")
    for axis, metric in ((entropy, "nll"), (accuracy, "accuracy")):
        for name, label, style in (("val/", "student", "o-"), ("val/teacher_", "teacher", "k--")):
            if name + metric in curves:
                axis.plot(*zip(*curves[name + metric], strict=True), style, label=label)
    entropy.set(title="held-out cross-entropy", ylabel="nats per labelled token")
    accuracy.set(title="held-out accuracy", ylabel="share of labelled tokens")
    accuracy.set_ylim(bottom=0)
    training.margins(y=0.3)  # space for the legend
    for axis in (training, entropy, accuracy):
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.get_lines():
            axis.legend(loc="upper right" if axis is training else "best", ncols=2 if axis is training else 1)
    figure.suptitle(title)
    figure.savefig(out, dpi=120)


def _hub_datasets(fingerprint: Mapping[str, Any]) -> list[str]:
    """Return the hub ids in the fingerprint of a corpus, each once."""
    own = [fingerprint[kind]["path"] for kind in ("hub", "wikipedia") if kind in fingerprint]
    own = [
        path for path in own if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    ]  # not a local one
    return list(dict.fromkeys(own + [path for part in fingerprint.get("parts", ()) for path in _hub_datasets(part)]))


def card_metadata(own: DictConfig, *, teacher: Mapping[str, Any], datasets: list[str]) -> dict[str, Any]:
    """Return the hub's metadata of a student: the config's ``card``, else what the teacher's own card says."""
    given: Any = OmegaConf.to_container(own, resolve=True) if own else {}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if not is_text(value):
            raise UserError(f"card.{key}={value}, but it must be a text or a list of texts, as en or [en,de]")
    found = {**teacher, **given}
    return found | ({"datasets": datasets} if datasets else {})


def describe(
    cfg: DictConfig,
    *,
    objective: Objective,
    teacher: Teacher | None,
    student: PreTrainedModel,
    corpus: Corpus,
    choice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what the model card and summary.json report about a training, as JSON."""
    # Each rank of torchrun or srun has its own folder, but all ranks must have the same config.
    folder = json.dumps(cfg.output_dir)[:-1]
    config = json.dumps(OmegaConf.to_container(cfg, resolve=True)).replace(folder, '".')
    origin = None
    if teacher is not None:
        origin = {name: getattr(teacher, name) for name in ("name", "revision", "sha256")}
        origin |= {"parameters": num_parameters(teacher.model), "folder": Path(teacher.name).exists()}
    terms: dict[str, Any] = {f"alpha_{name}": show_points(alpha) for name, alpha in objective.weights.items()}
    if objective.reads_teacher_logits:
        terms |= {"temperature": objective.temperature, "soft_targets": objective.soft_targets}
    if "cos" in objective.weights and objective.cos_targets != "all":
        terms["cos_targets"] = objective.cos_targets
    if teacher is not None and "rel" in objective.weights:
        terms["relation_heads"] = objective.num_relation_heads(student, teacher.model)
        terms["student_layer"], terms["teacher_layer"] = objective.relation_layers(student, teacher.model)
    return {
        "name": cfg.name,
        "version": version("distilkit"),
        "teacher": origin,
        "objective": terms,
        "architecture": type(student).__name__,
        "layers": student.config.distilkit_layers,
        "layer_choice": choice,
        "data": cfg.data.description,
        "packing": cfg.data.packing,
        "block_size": cfg.data.block_size,
        "global_batch_size": cfg.data.global_batch_size,
        "metadata": card_metadata(
            cfg.card,
            teacher=teacher_metadata(teacher.name) if teacher else {},
            datasets=_hub_datasets(corpus.fingerprint()),
        ),
        "config": json.loads(config),
    }


def _rows(blocks: Mapping[str, Tensor]) -> Rows | None:
    """Return the scores of held-out blocks as rows, each once: ranks may share blocks if there are few."""
    if not blocks:
        return None
    ids, first = np.unique(blocks["ids"].numpy(), return_index=True)
    return Rows(ids=ids, sums={name: sums.numpy()[first] for name, sums in blocks.items() if name != "ids"})


def _judge(module: DistillationModule, *, out: Path, steps: int, baseline: str | None) -> Verdict:
    """Judge the student of a run, keep what it said of each held-out block, and log the warnings."""
    before, after = _rows(module.before_blocks), _rows(module.after_blocks if module.after else {})
    if after is not None:
        write_rows(out, "val", after)
    curves = read_metrics(out / "metrics.csv") if (out / "metrics.csv").is_file() else {}
    if not isinstance(module.record["config"]["data"]["masking"]["mlm_probability"], float):
        curves = {"val/nll": curves.get("val/nll", [])}  # training losses follow a masking rate that changes
    state = read_checkpoint(out / "checkpoints" / "last.ckpt")["state_dict"]
    end = weight_sample({name.removeprefix("student."): weight for name, weight in state.items()})
    faults = find_faults(
        lm=module.lm,
        steps=steps,
        before=module.before,
        after=module.after,
        rows=after,
        curves=curves,
        moved=relative_change(module.start, end),
        copied=module.copied,
        reads_teacher=module.objective.reads_teacher,
        reads_logits=module.objective.reads_student_logits,
        packing=module.record["packing"],
        spikes={name: int(spikes.count) for name, spikes in module.spikes.items()},
        skipped=module.num_skipped,
    )
    for fault in faults:
        log.warning("%s", fault)
    return judge(
        lm=module.lm,
        before=before,
        after=after,
        steps=steps,
        start="cut student" if module.record["layers"] else "student before training",
        baseline=read_rows(baseline, "val") if baseline else None,
        baseline_folder=baseline,
        warnings=faults,
    )


def _intervals(rows: Rows | None) -> dict[str, float]:
    """Return half of the 95 % interval of held-out scores over blocks, of those that have one."""
    sums = {} if rows is None else rows.sums
    margins = {
        name: ratio_of_sums(sums[name], sums["tokens"])[1] for name in ("nll", "accuracy", "agreement") if name in sums
    }
    return {name: margin for name, margin in margins.items() if margin is not None and np.isfinite(margin)}


def finish(trainer: Trainer, module: DistillationModule, *, out: Path, baseline: str | None) -> None:
    """Write student/, summary.json and loss_curves.png into a run's folder; compare with the run of ``baseline``."""
    verdict = module.verdict = _judge(module, out=out, steps=trainer.global_step, baseline=baseline)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by one of its connectors
    forms = next((callback.found for callback in callbacks if isinstance(callback, CompareForms)), None)
    record, clock = {name: value for name, value in module.record.items() if name != "config"}, module.clock
    if choice := record["layer_choice"]:
        record["layer_choice"] = {name: value for name, value in choice.items() if name != "table"}
    device, compared = trainer.strategy.root_device, baseline and verdict.better_than_baseline is not None
    summary = {
        **record,
        "student_parameters": None,  # until it is exported
        "teacher_parameters": record["teacher"]["parameters"] if record["teacher"] else None,
        "optimizer_steps": trainer.global_step,
        "tokens_seen": module.tokens_seen,
        "tokens_per_second": round(module.tokens_seen / clock.wall, 1) if clock.wall else None,
        "wall_seconds": round(clock.wall, 1),
        "training_seconds": round(clock.seconds, 3),
        "budget_seconds": clock.budget,
        "spikes": {name: int(spikes.count) for name, spikes in module.spikes.items()},
        "skipped_steps": module.num_skipped,
        "machine": f"{trainer.world_size} processes on " * (trainer.world_size > 1) + processor(str(device)),
        "peak_memory_mb": peak_memory_mb(device),
        "input_forms": asdict(forms) if forms else None,
        "before": module.before,
        "after": module.after,
        "intervals": _intervals(_rows(module.after_blocks if module.after else {})),
        "baseline_after": json.loads((Path(baseline or "") / "summary.json").read_text("utf-8"))["after"]
        if compared
        else None,
        "verdict": asdict(verdict),
        "versions": versions(),
    }
    # Code of the student's own is that which was trained here.
    ckpt = out / "checkpoints" / "last.ckpt"
    student = export_checkpoint(ckpt, out / "student", summary=summary, trust_remote_code=True)
    write_json(out / "summary.json", summary | {"student_parameters": num_parameters(student)})
    if (out / "metrics.csv").is_file():
        _plot_curves(out / "metrics.csv", out / "loss_curves.png", title=record["name"])


def print_result(out: Path, module: DistillationModule) -> None:
    """Show the held-out metrics before and after training, the path of the student, and the verdict."""
    numbers = (Column(name, justify="right") for name in ("before", "after"))
    table = Table("metric", *numbers, title="held-out documents", title_justify="left")
    for name, value in module.after.items():
        first = f"{module.before[name]:.4f}" if name in module.before else "-"
        table.add_row(name.removeprefix("val/"), first, f"{value:.4f}")
    if module.after:
        Console().print(table)
    print(f"student: {out / 'student'}")
    if module.verdict:
        print(f"verdict on held-out text: {module.verdict.line}")
