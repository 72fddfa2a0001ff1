"""Measure a run of distilkit.train before it starts: its micro-batches, a few steps, and what may be faster."""

import functools
import gc
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from time import perf_counter
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning import Trainer

from distilkit.budget import check_budget
from distilkit.cli import check_keys
from distilkit.errors import UserError
from distilkit.language_model import num_parameters, num_parameters_without_embeddings
from distilkit.plan.forecast import Settings, cost, decide, steps_of
from distilkit.plan.micro_batch import Fit, Point, grow
from distilkit.plan.preview import Example, examples, text_figures
from distilkit.plan.step_timer import Timing, how_many, sizes, time_steps
from distilkit.precision import choose_precision
from distilkit.records import processor
from distilkit.runs.storage import check_writable
from distilkit.train import Job, budget_of, build, build_trainer
from distilkit.watch.memory import free_bytes, used_bytes
from distilkit.watch.throughput import dtype_of, peak_flops

log = logging.getLogger(__name__)

_MIB = 2**20
_TIMING = {  # of the trainer that times steps: one device, nothing written, nothing scored between steps
    "max_steps": 1, "max_epochs": -1, "max_time": None, "devices": 1, "num_nodes": 1, "strategy": "auto",
    "limit_train_batches": 1.0, "limit_val_batches": 1.0, "check_val_every_n_epoch": None, "val_check_interval": 10**9,
    "enable_checkpointing": False, "enable_progress_bar": False, "accumulate_grad_batches": 1, "fast_dev_run": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A forecast: the line to decide by, what plan.json holds, and masked blocks to look at."""

    line: str
    numbers: dict[str, Any]
    examples: list[Example]


def measure(cfg: DictConfig) -> Plan:
    """Measure on one device what the run of a config would take; nothing but the token cache is written."""
    check_keys(cfg.plan, path="plan")
    settings: Settings = instantiate(cfg.plan, _convert_="all")
    if settings.file:
        check_writable(settings.file, cure="set plan.file to another one, or null")
    budget, own = budget_of(cfg), cfg.copy()
    with open_dict(own):
        own.update({"callbacks": {}, "logger": {}, "budget": None, "ckpt_path": None, "baseline": None})
        own.validate_first = False
        own.trainer.update(_TIMING)
    job, count, batch_size = _built(own), _num_devices(cfg), int(cfg.data.global_batch_size)
    steps, end = _steps(cfg, job, count=count) if budget is None else (None, f"a budget of {budget:,.0f} s")
    device, per_device = job.trainer.strategy.root_device, math.ceil(batch_size / count)
    fit = _search(job, settings, per_device=per_device)
    if not fit.largest:
        found = f"no micro-batch fits: one block needs {fit.predict(1) / _MIB:,.0f} MB, but plan.memory_share="
        found += f"{settings.memory_share:g} of the free memory allows {fit.limit / _MIB:,.0f} MB"
        raise UserError(f"{found}; set activation_checkpointing=true, a smaller student, or a larger share")
    micro = min(wanted := min(cfg.data.micro_batch_size, per_device), fit.largest)
    if micro < wanted:
        log.warning("a micro-batch of %d blocks does not fit; steps of %d are timed", wanted, micro)
    timing = _time(job, settings.seconds, settings.steps, micro=micro, rate=fit.points[-1].seconds_per_block)
    per_step = math.ceil(batch_size / micro)
    seconds, step_tokens = timing.step_seconds(per_step), timing.tokens / micro * batch_size
    check_budget(budget, step_seconds=seconds / count)
    validation = (cfg.callbacks or {}).get("validation")
    forecast = functools.partial(
        cost,
        steps=steps,
        budget=budget,
        scaling=settings.scaling,
        step_seconds=seconds,
        step_tokens=step_tokens,
        val_seconds=_val_seconds(cfg, job, micro=micro, count=count),
        val_every=validation.optimizer_steps if validation else 10**9,  # the student is scored in the end
        val_first=bool(cfg.validate_first or cfg.trainer.max_steps == 0),
        price_per_hour=settings.price_per_hour,
        watts=timing.watts,
    )
    run, module, precision = forecast(devices=count), job.module, str(job.trainer.precision)
    shown = examples(job.data, module.teacher if module.scores_teacher else None, count=settings.examples)
    numbers: dict[str, Any] = {
        "machine": f"{processor(str(device))}, {precision}",
        "teacher": {"name": module.teacher_name, **_parameters(module.teacher)} if module.teacher else None,
        "student": _parameters(module.student),
        "text": text_figures(job.data),
        "micro_batch": {"configured": int(cfg.data.micro_batch_size), "timed": micro, **asdict(fit)}
        | {"points": [point._asdict() for point in fit.points]},
        "step": {
            **asdict(timing),
            "micro_batches": per_step,
            "timed_micro_batches": timing.micro_batches,
            "step_seconds": seconds,
            "tokens_per_second": step_tokens / seconds,
            "mfu": per_step * timing.flops / seconds / peak_flops(device, dtype_of(precision)),
        },
        "memory_mb": timing.peak / _MIB,
        "disk_mb": _disk(cfg, job, state=timing.state),
        "run": {"end": end, **asdict(run)},
        "devices": [asdict(forecast(devices=each)) for each in settings.devices if batch_size % each == 0],
        "assumption": f"Measured on one device. Each doubling of the devices keeps {settings.scaling:g} of the speed.",
    }
    del job, module  # before the models of the alternatives are loaded
    numbers["alternatives"] = []
    for label, changes in _alternatives(own, settings.alternatives, device=device, precision=precision):
        other = {"override": label, **_alternative(changes, own, timing, micro=micro, settings=settings)}
        if "ratio" in other:
            other["tokens_per_second"] = run.tokens_per_second * other["ratio"]
            training = (run.hours - run.validation_hours) / (other["ratio"] if budget is None else 1)
            other["hours"] = run.validation_hours + training
        numbers["alternatives"].append(other)
    return Plan(line=decide(numbers), numbers={"line": decide(numbers), **numbers}, examples=shown)


def _built(cfg: DictConfig) -> Job:
    job = build(cfg)
    job.data.setup()
    return job


def _trainer(job: Job, **options: Any) -> Trainer:
    cfg: Any = OmegaConf.merge(job.cfg, {"trainer": options})
    return build_trainer(cfg)


def _bytes(model: torch.nn.Module | None) -> int:
    return 0 if model is None else sum(each.numel() * each.element_size() for each in model.parameters())


def _parameters(model: torch.nn.Module) -> dict[str, int]:
    without = num_parameters_without_embeddings(model)
    return {"parameters": num_parameters(model), "parameters_without_embeddings": without}


def _search(job: Job, settings: Settings, *, per_device: int) -> Fit:
    """Find the largest micro-batch that fits."""
    device, module = job.trainer.strategy.root_device, job.module
    moved = 0 if device.type == "cpu" else _bytes(module.student) + _bytes(module.teacher)

    def measured(size: int) -> Point:
        count = min(2, math.ceil(per_device / size))
        timing = time_steps(_trainer(job, max_steps=2), module, job.data, micro_batch_size=size, micro_batches=count)
        return Point(size, timing.peak, timing.step_seconds(count) / (count * size))

    return grow(
        measured,
        most=per_device,
        least=used_bytes(device) + moved + 3 * _bytes(module.student),  # a gradient, and two moments of Adam
        limit=used_bytes(device) + (settings.memory_share if device.type == "cpu" else 1.0) * free_bytes(device),
        seconds=settings.seconds,
    )


def _num_devices(cfg: DictConfig) -> int:
    """Return how many devices a run would use; a batch that they cannot share is refused."""
    given, batch_size = cfg.trainer.get("devices", 1), cfg.data.global_batch_size
    number = len(given) if OmegaConf.is_list(given) else int(given) if str(given).isdigit() else None
    count = (number or max(1, torch.cuda.device_count())) * int(cfg.trainer.get("num_nodes") or 1)
    if batch_size % count:
        found = f"data.global_batch_size={batch_size} is not divisible by the {count} devices"
        raise UserError(f"{found}; set a multiple of {count}")
    return count


def _time(job: Job, seconds: float, steps: int, *, micro: int, rate: float) -> Timing:
    """Time steps of a job for about so many seconds, if a block takes ``rate`` seconds."""
    per_step = math.ceil(job.data.global_batch_size / micro)
    steps, micro_batches = how_many(seconds, steps, per_step=per_step, micro_batch_seconds=micro * rate)
    trainer = _trainer(job, max_steps=steps + 1)
    return time_steps(trainer, job.module, job.data, micro_batch_size=micro, micro_batches=micro_batches)


def _val_seconds(cfg: DictConfig, job: Job, *, micro: int, count: int) -> float:
    """Score some held-out blocks, after once to warm up, and return the seconds of a whole validation."""
    data, limit = job.data, cfg.trainer.get("limit_val_batches")
    blocks = min(len(data.val_blocks or ()), data.max_val_blocks)
    batches = math.ceil(blocks / count / cfg.data.micro_batch_size)  # of each device
    share = 1.0 if limit is None else limit / batches if isinstance(limit, int) else limit
    if not share:
        return 0.0
    with sizes(data, micro_batch_size=micro, micro_batches=1):
        data.max_val_blocks = timed = min(blocks, 2 * micro)  # of all lengths; nothing else reads it
        for _ in range(2):
            trainer, began = _trainer(job), perf_counter()
            trainer.validate(job.module, datamodule=data, verbose=False)
            seconds = perf_counter() - began
    return min(1.0, share) * seconds * blocks / timed


def _steps(cfg: DictConfig, job: Job, *, count: int) -> tuple[float, str]:
    """Return after how many full steps the run of a config ends, and what ends it."""
    blocks, batch = len(job.data.train_blocks or ()), job.data.global_batch_size
    per_step = math.ceil(batch / count / cfg.data.micro_batch_size)  # micro-batches on each device
    if (limit := cfg.trainer.get("limit_train_batches")) is not None:
        blocks = min(blocks, int(limit * batch / per_step if isinstance(limit, int) else limit * blocks))
    return steps_of(blocks, batch_size=batch, max_epochs=cfg.trainer.max_epochs, max_steps=cfg.trainer.max_steps)


def _disk(cfg: DictConfig, job: Job, *, state: int) -> dict[str, float]:
    """Return the megabytes of the token cache, of all checkpoints while one more is written, and of the student."""
    assert job.data.cache is not None
    student, saving = _bytes(job.module.student), (cfg.callbacks or {}).get("checkpoint")
    files = 2 + ((saving.get("keep") or 1) if saving else 0)  # best.ckpt and a temporary one, too
    cache = sum(job.data.cache.meta["bytes"].values())
    return {"cache": cache / _MIB, "checkpoints": files * (student + state) / _MIB, "student": student / _MIB}


def _alternatives(
    cfg: DictConfig, names: list[str], *, device: torch.device, precision: str
) -> Iterator[tuple[str, Any]]:
    """Yield what may be faster, as an override with the changes of the config, or why it is not measured."""
    objective, distils = instantiate(cfg.objective), cfg.teacher.get("name") is not None
    all_rows = distils and objective.reads_teacher_logits and objective.soft_targets == "all"
    if "masked" in names and all_rows and "clm" not in objective.weights:
        yield "objective.soft_targets=masked", {"objective": {"soft_targets": "masked"}}
    if "minilm" in names and distils and set(objective.weights) != {"rel"}:
        folder = resources.files("distilkit.conf.train").joinpath("objective")
        text = [folder.joinpath(f"{name}.yaml").read_text("utf-8") for name in ("distilbert", "minilm")]
        node: Any = OmegaConf.merge(*map(OmegaConf.create, text))
        yield "objective=minilm", {"objective": {key: node[key] for key in node if key != "defaults"}}
    if "bf16" in names and precision == "32-true":
        chosen, reason = choose_precision(accelerator=device.type)
        yield "trainer.precision=bf16-mixed", reason if chosen == precision else {"trainer": {"precision": chosen}}
    if "shorter" in names and (half := cfg.data.block_size // 2) >= 16:
        twice = {name: 2 * cfg.data[name] for name in ("global_batch_size", "micro_batch_size")}  # as many tokens
        yield f"data.block_size={half}", {"data": {"block_size": half, **twice}}


def _alternative(changes: Any, cfg: DictConfig, timing: Timing, *, micro: int, settings: Settings) -> dict[str, Any]:
    """Time the steps of a changed config, and compare its tokens per second with ``timing``, or say why it cannot be."""
    if isinstance(changes, str):
        return {"reason": changes}
    own, seconds = cfg.copy(), settings.seconds / 2 / len(settings.alternatives)
    own.merge_with(changes)
    size = micro * own.data.micro_batch_size // cfg.data.micro_batch_size
    gc.collect()
    try:
        other = _time(_built(own), seconds, settings.steps, micro=size, rate=timing.seconds / micro)
    except (UserError, torch.OutOfMemoryError) as error:
        return {"reason": str(error)}
    per_step = math.ceil(own.data.global_batch_size / size)
    mine, theirs = (per_step * each.tokens / each.step_seconds(per_step) for each in (timing, other))
    return {"ratio": theirs / mine, "memory_mb": other.peak / _MIB, "timed_steps": other.steps}
