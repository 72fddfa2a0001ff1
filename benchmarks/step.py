"""Time and memory of whole optimizer steps: forward passes, loss, backward pass, clipping and AdamW."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.machine import DTYPES, Precision
from benchmarks.measure import NoProducts, in_turn, peak_megabytes
from benchmarks.models import SIZES, Family, build_batch, build_models, lm_of_family
from benchmarks.naive import naive_loss
from distilkit.language_model import LM, Batch, cast_parameters
from distilkit.objective import Objective
from distilkit.watch.throughput import forward_cost, step_flops


@dataclass(frozen=True)
class Variant:
    """One variant of the step: its loss, its precision, and the rows of the soft targets."""

    maker: Literal["naive", "ours"]
    precision: Precision
    rows: Literal["all", "masked"]

    @property
    def name(self) -> str:
        """Return the name used in tables."""
        return f"{self.maker} {self.precision}, {self.rows} rows"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The models and batches that all variants of a comparison share."""

    family: Family
    size: str
    length: int
    dropout: float
    device: str = "cpu"


def variants(fast: Precision, family: Family = "bert") -> list[Variant]:
    """List the variants; ours runs in the precision that is faster on this machine."""
    masked = [Variant("naive", "bf16", "masked"), Variant("ours", fast, "masked")] if family != "gpt2" else []
    both = [Variant("naive", "fp32", "all"), Variant("naive", "bf16", "all"), Variant("ours", fast, "all")]
    if fast == "fp32" and masked:
        masked.insert(0, Variant("naive", "fp32", "masked"))
    return both + masked


class Step:
    """A variant with its models, objective and optimizer."""

    def __init__(
        self, variant: Variant, student: PreTrainedModel, teacher: PreTrainedModel, *, lm: LM, device: str
    ) -> None:
        """Set up a step; variants of the same maker may share the models."""
        self.variant, self.student, self.teacher, self.lm, self.device = variant, student, teacher, lm, device
        self.objective = objective(lm, rows=variant.rows)
        self.optimizer = torch.optim.AdamW(
            student.parameters(),
            lr=1e-6,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.0,
            fused=True if variant.maker == "ours" else None,
        )

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        half = self.variant.precision == "bf16"
        with torch.autocast(self.device, torch.bfloat16) if half else nullcontext():
            if self.variant.maker == "naive":
                return naive_loss(self.student, self.teacher, batch, objective=self.objective, lm=self.lm)
            return our_loss(self.student, self.teacher, batch, objective=self.objective, lm=self.lm)

    def flops(self, batch: Batch) -> float:
        """Count the FLOPs that a step requires, which a variant may exceed."""
        costs = forward_cost(self.student), forward_cost(self.teacher)
        return step_flops(self.objective, *costs, batch, lm=self.lm)

    def __call__(self, batch: Batch) -> None:
        """Take one optimizer step."""
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.optimizer.step()


def objective(lm: LM, *, rows: Literal["all", "masked"]) -> Objective:
    """Return DistilBERT's objective: 5 / 2 / 1 at temperature 2."""
    return Objective(
        alpha_ce=5.0,
        alpha_mlm=2.0 if lm == "mlm" else 0.0,
        alpha_clm=2.0 if lm == "clm" else 0.0,
        alpha_cos=1.0,
        alpha_mse=0.0,
        temperature=2.0,
        soft_targets=rows,
        implementation="fused",
    )


def our_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, *, objective: Objective, lm: LM
) -> Tensor:
    """Return distilkit's loss of a batch that makes a whole optimizer step."""
    counts = objective.denominators(num_tokens=batch["num_tokens"], num_labels=batch["num_labels"], lm=lm)
    return objective.loss(student, teacher, batch, lm=lm, denominators=counts)[0]


def build_steps(chosen: list[Variant], work: Workload, *, initializer_range: float = 0.02) -> dict[Variant, Step]:
    """Build the variants; those of one maker share a student and a teacher.

    All variants of ours have one precision, to which their teacher is cast, as in training.
    """
    lm = lm_of_family(work.family)
    steps: dict[Variant, Step] = {}
    models: dict[str, tuple[PreTrainedModel, PreTrainedModel]] = {}
    for variant in chosen:
        if variant.maker not in models:
            student, teacher = build_models(
                work.family, SIZES[work.size], dropout=work.dropout, initializer_range=initializer_range
            )
            models[variant.maker] = student.to(work.device), teacher.to(work.device)  # type: ignore[arg-type]
            if variant.maker == "ours":
                cast_parameters(teacher, DTYPES[variant.precision])
        steps[variant] = Step(variant, *models[variant.maker], lm=lm, device=work.device)
    return steps


def batch_of(work: Workload, batch_size: int) -> Batch:
    """Draw the batch that all variants of a comparison share."""
    vocabulary = SIZES[work.size].vocabulary_of(work.family)
    return build_batch(
        lm_of_family(work.family),
        vocabulary=vocabulary,
        batch_size=batch_size,
        length=work.length,
        device=work.device,
    )


def time_steps(work: Workload, fast: Precision, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Time the variants in turn; return one record per variant.

    Ours compiles in a warm-up on all rows; the median excludes a slow first round. A processor without bf16 units emulates
    bf16, up to a hundred times slower than fp32. On such a processor bf16 variants run once, on an eighth of a block.
    """
    steps = build_steps(variants(fast, work.family), work)
    whole, part = batch_of(work, batch_size), batch_of(replace(work, length=max(8, work.length // 8)), 1)
    batches = {variant: part if _emulated(variant, work, fast) else whole for variant in steps}
    for variant, step in steps.items():
        if variant.maker == "ours" and variant.rows == "all":
            step(batches[variant])
    timings = in_turn(
        {variant.name: partial(step, batches[variant]) for variant, step in steps.items()},
        rounds=rounds,
        device=work.device,
        once=frozenset(variant.name for variant in steps if _emulated(variant, work, fast)),
    )
    records = []
    for variant, step in steps.items():
        timing, (blocks, length) = timings[variant.name], batches[variant]["input_ids"].shape
        seconds = timing.wall_seconds if work.device == "cuda" else timing.core_seconds
        records.append(
            {
                "variant": variant.name,
                "maker": variant.maker,
                "precision": variant.precision,
                "rows": variant.rows,
                "tokens": blocks * length,
                "rounds": timing.rounds,
                "core_seconds": timing.core_seconds,
                "wall_seconds": timing.wall_seconds,
                "tokens_per_core_second": blocks * length / timing.core_seconds,
                "tokens_per_second": blocks * length / timing.wall_seconds,
                "gflops": 1e-9 * step.flops(batches[variant]) / seconds,
            }
        )
    return records


def profile_step(work: Workload, variant: Variant, batch_size: int, most: int = 12) -> dict[str, float]:
    """Return the shares of a step's time by operation, without what each calls, the largest first."""
    (step,) = build_steps([variant], work).values()
    batch = batch_of(work, batch_size)
    step(batch)  # compiles
    activity = torch.profiler.ProfilerActivity.CUDA if work.device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        step(batch)
    key = "self_device_time_total" if work.device == "cuda" else "self_cpu_time_total"
    found = {event.key: float(getattr(event, key)) for event in profiler.key_averages()}
    total = sum(found.values())
    ordered = sorted(found, key=lambda name: -found[name])
    return {name: found[name] / total for name in ordered[:most]}


def _emulated(variant: Variant, work: Workload, fast: Precision) -> bool:
    return work.device == "cpu" and variant.precision == "bf16" and fast == "fp32"


def weigh_step(work: Workload, variant: Variant, batch_size: int) -> dict[str, Any]:
    """Measure the peak memory of a variant's step in MB, without weights and optimizer state.

    On a CPU the naive step skips its matrix products (``NoProducts``), whose only memory is their results. Ours computes
    them, because its core is compiled.
    """
    (step,) = build_steps([variant], work).values()
    products = work.device == "cuda" or variant.maker == "ours"
    with nullcontext() if products else NoProducts():
        step(batch_of(work, 1))  # allocates the optimizer's state
        if variant.maker == "ours":
            step.loss(batch_of(work, batch_size))  # compiles, which needs extra memory
        step.optimizer.zero_grad()
        peak = peak_megabytes(partial(step, batch_of(work, batch_size)), device=work.device)
    return {"variant": variant.name, "blocks": batch_size, "peak_mb": peak, "products": products}
