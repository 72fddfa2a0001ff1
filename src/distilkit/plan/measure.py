"""Measure a run of distilkit.train before it starts: its micro-batches, a few steps, and what may be faster."""

import functools
import gc
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning import Trainer

from distilkit.cli import check_keys
from distilkit.errors import UserError
from distilkit.language_model import num_parameters, num_parameters_without_embeddings
from distilkit.module import DistillationModule
from distilkit.plan.forecast import Cost, Length, Settings, cost, decide, length_of
from distilkit.plan.memory import limit_bytes, used_bytes
from distilkit.plan.micro_batch import Fit, Point, grow
from distilkit.plan.preview import Example, TextFigures, examples, text_figures
from distilkit.plan.steps import Timing, how_many, time_steps, time_validation
from distilkit.records import processor, write_json
from distilkit.throughput import peak_flops
from distilkit.train import Job, budget_of, build, build_trainer

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A forecast: the line to decide by, what plan.json holds, the text's figures, and masked blocks to look at."""

    line: str
    numbers: dict[str, Any]
    text: TextFigures
    examples: list[Example]


def measure(cfg: DictConfig) -> Plan:
    """Measure on one device what the run of a config would take; nothing but the token cache is written."""
    check_keys(cfg.plan, path="plan")
    settings: Settings = instantiate(cfg.plan, _convert_="all")
    budget, own = budget_of(cfg), _for_timing(cfg)
    job = build(own)
    job.data.prepare_data()
    job.data.setup()
    count = _num_devices(cfg)
    device, batch_size = job.trainer.strategy.root_device, int(cfg.data.global_batch_size)
    fit = _search(job, settings, per_device=math.ceil(batch_size / count))
    given = min(int(cfg.data.micro_batch_size), math.ceil(batch_size / count))
    if not fit.largest:
        raise UserError(
            f"no micro-batch fits: one block needs {fit.predict(1) / _MIB:,.0f} MB, but plan.memory_share="
            f"{settings.memory_share:g} of what is free allows {fit.limit / _MIB:,.0f} MB; set "
            "activation_checkpointing=true, a smaller student or data.block_size, or a larger share"
        )
    micro = min(given, fit.largest)
    timing = _time(job, settings.seconds, settings.steps, micro=micro, rate=fit.points[-1].seconds_per_block)
    length = _length(cfg, job, budget=budget)
    val_seconds = _val_seconds(job, micro=micro) * math.ceil(length.val_blocks / micro) if length.val_blocks else 0.0
    per_step = math.ceil(batch_size / micro)
    forecast = functools.partial(
        cost,
        length,
        scaling=settings.scaling,
        step_seconds=timing.step_seconds(per_step),
        step_tokens=timing.tokens / micro * batch_size,
        val_seconds=val_seconds,
        price_per_hour=settings.price_per_hour,
        watts=timing.watts,
    )
    here = forecast(devices=count)
    others = [forecast(devices=each) for each in settings.devices if batch_size % each == 0]
    text, module = text_figures(job.data), job.module
    shown = examples(job.data, module.teacher if module.scores_teacher else None, count=settings.examples)
    numbers = {
        "machine": {"device": processor(str(device)), "devices": count, "precision": str(job.trainer.precision)},
        "teacher": None if module.teacher is None else {"name": module.teacher_name} | _sizes(module.teacher),
        "student": _sizes(module.student),
        "text": asdict(text),
        "micro_batch": _micro_batch(fit, given=given, timed=micro),
        "step": _step(timing, module, device, per_step=per_step, precision=str(job.trainer.precision)),
        "memory_mb": round(timing.peak / _MIB, 1),
        "disk_mb": _disk(cfg, job, timing),
        "run": {"end": length.end, **asdict(here)},
        "devices": [asdict(each) for each in others],
        "assumptions": [
            "Measured on one device; each doubling of the devices keeps %g of the speed." % settings.scaling,
            "Hours count training and validation, and neither the start, nor the saving of checkpoints.",
        ],
    }
    del job, module  # before the models of the alternatives are loaded
    numbers["alternatives"] = [
        _alternative(label, changes, own, timing, here, settings=settings, micro=micro, length=length)
        for label, changes in _alternatives(own, settings.alternatives, device=device)
    ]
    numbers = {"line": decide(numbers, budget=length.budget), **numbers}
    return Plan(line=numbers["line"], numbers=numbers, text=text, examples=shown)


def _for_timing(cfg: DictConfig) -> DictConfig:
    """Return a config whose trainer runs on one device, and writes and scores nothing."""
    own = cfg.copy()
    with open_dict(own):
        own.update({"callbacks": {}, "logger": {}, "budget": None, "ckpt_path": None, "baseline": None})
        own.update({"validate_first": False})
        own.trainer.update({"max_steps": 1, "max_epochs": -1, "max_time": None, "strategy": "auto"})
        own.trainer.update({"devices": 1, "num_nodes": 1, "limit_train_batches": 1.0, "limit_val_batches": 1.0})
        own.trainer.update({"enable_checkpointing": False, "enable_progress_bar": False})
        own.trainer.update({"check_val_every_n_epoch": None, "val_check_interval": 10**9})
        own.trainer.pop("accumulate_grad_batches", None)
    return own


def _trainer(job: Job, **options: Any) -> Trainer:
    cfg = job.cfg.copy()
    with open_dict(cfg):
        cfg.trainer.update(options)
    return build_trainer(cfg)


def _num_devices(cfg: DictConfig) -> int:
    """Return how many devices the run of a config would use."""
    given, nodes = cfg.trainer.get("devices", 1), int(cfg.trainer.get("num_nodes") or 1)
    if OmegaConf.is_list(given):
        return len(given) * nodes
    number = int(given) if str(given).lstrip("-").isdigit() else -1
    return (number if number > 0 else max(1, torch.cuda.device_count())) * nodes


def _search(job: Job, settings: Settings, *, per_device: int) -> Fit:
    """Find the largest micro-batch that fits."""
    device = job.trainer.strategy.root_device
    student = sum(each.numel() * each.element_size() for each in job.module.student.parameters())
    teacher = job.module.teacher
    moved = [] if device.type == "cpu" else [job.module.student, *([teacher] if teacher is not None else [])]
    weights = sum(each.numel() * each.element_size() for model in moved for each in model.parameters())

    def measured(size: int) -> Point:
        count = min(2, math.ceil(per_device / size))
        steps = {"micro_batch_size": size, "micro_batches": count}
        timing = time_steps(_trainer(job, max_steps=2), job.module, job.data, **steps)
        seconds = timing.step_seconds(count) / (count * size)
        return Point(micro_batch_size=size, peak=timing.peak, seconds_per_block=seconds)

    return grow(
        measured,
        most=per_device,
        least=used_bytes(device) + weights + 3 * student,  # a gradient, and two moments of Adam
        limit=limit_bytes(device, share=settings.memory_share),
        seconds=settings.seconds,
    )


def _time(job: Job, seconds: float, steps: int, *, micro: int, rate: float) -> Timing:
    """Time steps of a job for about so many seconds, if a block takes ``rate`` seconds."""
    per_step = math.ceil(job.data.global_batch_size / micro)
    steps, micro_batches = how_many(seconds, steps, per_step=per_step, micro_batch_seconds=micro * rate)
    trainer = _trainer(job, max_steps=steps + 1)
    return time_steps(trainer, job.module, job.data, micro_batch_size=micro, micro_batches=micro_batches)


def _val_seconds(job: Job, *, micro: int) -> float:
    return time_validation(_trainer(job, limit_val_batches=2), job.module, job.data, micro_batch_size=micro)


def _length(cfg: DictConfig, job: Job, *, budget: float | None) -> Length:
    """Return when the run of a config ends, and how much it scores on the way."""
    assert job.data.train_blocks is not None and job.data.val_blocks is not None
    trainer, validation = cfg.trainer, cfg.callbacks.get("validation") if cfg.callbacks else None
    blocks, limit = len(job.data.train_blocks), trainer.get("limit_train_batches")
    if limit is not None:
        blocks = min(blocks, int(limit * cfg.data.micro_batch_size if isinstance(limit, int) else limit * blocks))
    scores = trainer.get("limit_val_batches") != 0
    return length_of(
        blocks=blocks,
        global_batch_size=cfg.data.global_batch_size,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        budget=budget,
        val_blocks=min(len(job.data.val_blocks), cfg.data.max_val_blocks) if scores else 0,
        val_every=validation.optimizer_steps if validation else None,
        val_first=bool(cfg.validate_first),
    )


def _sizes(model: torch.nn.Module) -> dict[str, int]:
    return {
        "parameters": num_parameters(model),
        "parameters_without_embeddings": num_parameters_without_embeddings(model),
    }


def _micro_batch(fit: Fit, *, given: int, timed: int) -> dict[str, Any]:
    points = [
        {
            "micro_batch_size": point.micro_batch_size,
            "memory_mb": round(point.peak / _MIB, 1),
            "blocks_per_second": 1 / point.seconds_per_block,
        }
        for point in fit.points
    ]
    own = {"configured": given, "timed": timed, "largest": fit.largest, "measured": fit.measured}
    return own | {"limit_mb": round(fit.limit / _MIB, 1), "points": points}


def _step(
    timing: Timing, module: DistillationModule, device: torch.device, *, per_step: int, precision: str
) -> dict[str, Any]:
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    seconds = timing.step_seconds(per_step)
    return {
        "seconds": seconds,
        "micro_batches": per_step,
        "timed_steps": timing.steps,
        "timed_micro_batches": timing.micro_batches,
        "tokens_per_second": per_step * timing.tokens / seconds,
        "mfu": per_step * timing.flops / seconds / peak_flops(device, dtype),
        "watts": timing.watts,
    }


def _disk(cfg: DictConfig, job: Job, timing: Timing) -> dict[str, float]:
    """Return the megabytes of the token cache, of the checkpoints while one more is written, and of the student."""
    assert job.data.cache is not None
    student = sum(each.numel() * each.element_size() for each in job.module.student.parameters())
    saving = cfg.callbacks.get("checkpoint") if cfg.callbacks else None
    files = (saving.get("keep") or 1) + 2 if saving else 2  # best.ckpt and a temporary one, too
    sizes = {
        "cache": sum(job.data.cache.meta["bytes"].values()),
        "checkpoint": student + timing.state,
        "checkpoints": files * (student + timing.state),
        "student": student,
    }
    return {name: round(value / _MIB, 2) for name, value in sizes.items()}


def _alternatives(cfg: DictConfig, names: list[str], *, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Yield what may be faster, as an override and the changes of the config, or the reason why it is not measured."""
    objective, distils = instantiate(cfg.objective), cfg.teacher.get("name") is not None
    folder = resources.files("distilkit.conf.train").joinpath("objective")
    if "masked" in names and distils and objective.reads_teacher_logits and "clm" not in objective.weights:
        if objective.soft_targets == "all":
            yield "objective.soft_targets=masked", {"objective": {"soft_targets": "masked"}}
    if "minilm" in names and distils and set(objective.weights) != {"rel"}:
        parts: Any = [OmegaConf.create(folder.joinpath(f"{name}.yaml").read_text()) for name in ("distilbert", "minilm")]
        node = OmegaConf.merge(*parts)
        yield "objective=minilm", {"objective": {key: node[key] for key in node if key != "defaults"}}
    if "bf16" in names and cfg.trainer.precision == "32-true":
        reason = _no_bf16(device)
        yield "trainer.precision=bf16-mixed", reason or {"trainer": {"precision": "bf16-mixed"}}
    half = cfg.data.block_size // 2
    if "shorter" in names and half >= 16:
        sizes = {name: 2 * cfg.data[name] for name in ("global_batch_size", "micro_batch_size")}
        yield f"data.block_size={half}", {"data": {"block_size": half, **sizes}}


def _no_bf16(device: torch.device) -> str | None:
    """Return why bfloat16 would be slow on a device, or None."""
    if device.type == "cuda":
        return None if torch.cuda.is_bf16_supported(including_emulation=False) else "this GPU only emulates bfloat16"
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return None if units else "this CPU has no units for bfloat16"


def _alternative(
    label: str,
    changes: Any,
    cfg: DictConfig,
    timing: Timing,
    here: Cost,
    *,
    settings: Settings,
    micro: int,
    length: Length,
) -> dict[str, Any]:
    """Time the steps of a changed config, and compare its tokens per second; a reason stands for what is not measured."""
    if isinstance(changes, str):
        return {"override": label, "reason": changes}
    own, rate = cfg.copy(), timing.seconds / micro
    with open_dict(own):
        own.merge_with(changes)
    micro *= own.data.micro_batch_size // cfg.data.micro_batch_size
    gc.collect()
    try:
        job = build(own)
        job.data.prepare_data()
        job.data.setup()
        seconds = settings.seconds / 2 / max(1, len(settings.alternatives))
        other = _time(job, seconds, settings.steps, micro=micro, rate=rate)
    except UserError as error:
        return {"override": label, "reason": str(error)}
    except torch.OutOfMemoryError:
        return {"override": label, "reason": "it needs more memory than the device has"}
    per_step = math.ceil(own.data.global_batch_size / micro)
    mine, theirs = (each.tokens * per_step / each.step_seconds(per_step) for each in (timing, other))
    ratio = theirs / mine
    hours = here.hours if length.blocks is None else here.training_hours / ratio + here.validation_hours
    return {
        "override": label,
        "tokens_per_second": here.tokens_per_second * ratio,
        "ratio": ratio,
        "hours": hours,
        "memory_mb": round(other.peak / _MIB, 1),
        "timed_steps": other.steps,
    }


def write(plan: Plan, file: str | None) -> Path | None:
    """Write plan.json, and return its path."""
    if file is None:
        return None
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plan.numbers)
    return path.resolve()
