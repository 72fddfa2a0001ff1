"""Time and memory of the loss alone, heads included: from hidden states of both models to gradients."""

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import DTYPES, Precision
from benchmarks.measure import NoProducts, in_turn, peak_megabytes
from benchmarks.models import MASKED_SHARE
from benchmarks.naive import naive_cross_entropy, naive_kl
from distilkit.fused import fused_losses
from distilkit.losses import IGNORE_INDEX, Head

Maker = Literal["naive", "full logits, compiled", "Liger, chunked", "ours", "torch, hard targets", "ours, hard targets"]

_HARD: tuple[Maker, ...] = ("torch, hard targets", "ours, hard targets")  # without a teacher, on all tokens

ALPHA_SOFT, ALPHA_HARD, TEMPERATURE = 5.0, 2.0, 2.0


@dataclass(frozen=True)
class LossVariant:
    """One way to compute the loss, in one precision."""

    maker: Maker
    precision: Precision

    @property
    def name(self) -> str:
        """Return the name used in tables."""
        return f"{self.maker} {self.precision}"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The inputs of both models' logits, and labels (tokens,)."""

    student: Head
    teacher: Head
    labels: Tensor

    def forget_gradients(self) -> None:
        """Free the gradients of the last backward pass."""
        for tensor in self.student:
            if tensor is not None:
                tensor.grad = None


def draw_heads(num_tokens: int, *, vocabulary: int, width: int, device: str = "cpu", spread: float = 0.05) -> Heads:
    """Draw random heads; 15 % of the tokens are labelled."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale)

    labels = torch.randint(vocabulary, (num_tokens,), generator=generator, device=device)
    labels[torch.rand(num_tokens, generator=generator, device=device) >= MASKED_SHARE] = IGNORE_INDEX
    student, teacher = (
        Head(normal(num_tokens, width), normal(vocabulary, width, scale=spread), normal(vocabulary, scale=spread))
        for _ in range(2)
    )
    for tensor in student:
        assert tensor is not None
        tensor.requires_grad_()
    return Heads(student=student, teacher=teacher, labels=labels)


def flops_per_token(*, vocabulary: int, width: int, hard: bool = False) -> float:
    """Count matrix products: the logits of both models, or of one, and the gradients of hidden states and weight."""
    return (3 if hard else 4) * 2.0 * width * vocabulary


def naive_head_loss(heads: Heads) -> Tensor:
    """Compute the loss from full logits, with ``masked_select`` copies."""
    student = F.linear(*heads.student)
    with torch.no_grad():
        teacher = F.linear(*heads.teacher)
    chosen = torch.ones_like(heads.labels, dtype=torch.bool)
    soft = naive_kl(student, teacher, chosen, temperature=TEMPERATURE)
    return ALPHA_SOFT * soft + ALPHA_HARD * naive_cross_entropy(student, heads.labels)


def full_logits_loss(heads: Heads) -> Tensor:
    """Compute the same loss from full logits without copies, for ``torch.compile`` to fuse."""
    student = F.linear(*heads.student)
    with torch.no_grad():
        teacher = F.linear(*heads.teacher)
    soft = F.kl_div(
        F.log_softmax(student.float() / TEMPERATURE, dim=-1),
        F.log_softmax(teacher.float() / TEMPERATURE, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(student.float(), heads.labels, ignore_index=IGNORE_INDEX)
    return ALPHA_SOFT * TEMPERATURE**2 * soft + ALPHA_HARD * hard


def our_head_loss(heads: Heads) -> Tensor:
    """Compute the same loss with ``fused_losses``, with one weight per row."""
    labelled = heads.labels != IGNORE_INDEX
    return fused_losses(
        heads.student,
        heads.teacher,
        heads.labels,
        soft_weights=torch.full(labelled.shape, ALPHA_SOFT / len(labelled), device=labelled.device),
        hard_weights=ALPHA_HARD * labelled / labelled.sum().clamp(min=1),
        temperature=TEMPERATURE,
    ).total


def liger_head_loss(heads: Heads) -> Tensor:
    """Compute Liger's closest loss, chunked distillation; it has no factor of temperature squared."""
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=ALPHA_HARD, weight_soft_loss=ALPHA_SOFT, beta=0.0, temperature=TEMPERATURE
    )
    student, teacher = heads.student, heads.teacher
    result: Tensor = loss(
        student.features, student.weight, teacher.features, teacher.weight, heads.labels, student.bias, teacher.bias
    )
    return result


def torch_hard_loss(heads: Heads) -> Tensor:
    """Compute the hard targets of all tokens with torch's own loss of a linear layer, in chunks."""
    features, weight, bias = heads.student
    options = torch.nn.LinearCrossEntropyOptions()
    result: Tensor = F.linear_cross_entropy(features, weight, heads.labels, linear_bias=bias, options=options)
    return result


def our_hard_loss(heads: Heads) -> Tensor:
    """Compute the same with ``fused_losses``."""
    weights = torch.full(heads.labels.shape, 1 / len(heads.labels), device=heads.labels.device)
    return fused_losses(heads.student, None, heads.labels, hard_weights=weights).total


def absent() -> dict[Maker, str]:
    """Return the variants that cannot run on this machine, and why."""
    reasons: dict[Maker, str] = {}
    if importlib.util.find_spec("liger_kernel") is None:
        reasons["Liger, chunked"] = "liger_kernel is not installed (pip install --no-deps liger-kernel)"
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        reasons["full logits, compiled"] = "torch.compile needs a C++ compiler"
    return reasons


def loss_variants(fast: Precision) -> list[LossVariant]:
    """List the variants: naive in both precisions, the others in the faster one."""
    others: list[Maker] = ["full logits, compiled", "Liger, chunked", "ours", *_HARD]
    return [
        LossVariant("naive", "fp32"),
        LossVariant("naive", "bf16"),
        *(LossVariant(maker, fast) for maker in others if maker not in absent()),
    ]


def build_loss(variant: LossVariant, heads: Heads) -> Callable[[], None]:
    """Return a function that runs a forward and a backward pass."""
    device = heads.labels.device.type
    makers: dict[Maker, Callable[[Heads], Tensor]] = {
        "naive": naive_head_loss,
        "full logits, compiled": full_logits_loss,
        "Liger, chunked": liger_head_loss,
        "ours": our_head_loss,
        "torch, hard targets": torch_hard_loss,
        "ours, hard targets": our_hard_loss,
    }
    compute = makers[variant.maker]
    if variant.maker == "full logits, compiled":
        compute = torch.compile(compute)
    if variant.maker in _HARD:
        words = torch.arange(len(heads.labels), device=heads.labels.device) % len(heads.student.weight)
        heads = Heads(student=heads.student, teacher=heads.teacher, labels=words)
    in_chunks = variant.maker in ("Liger, chunked", "torch, hard targets")
    if in_chunks and variant.precision == "bf16":  # autocast does not apply inside them
        heads = Heads(student=_cast(heads.student), teacher=_cast(heads.teacher), labels=heads.labels)

    def run() -> None:
        heads.forget_gradients()
        with torch.autocast(device, DTYPES["bf16"]) if variant.precision == "bf16" else nullcontext():
            loss = compute(heads)
        loss.backward()

    return run


def _cast(head: Head) -> Head:
    """Cast to bfloat16 leaves."""
    cast = (None if part is None else part.detach().bfloat16().requires_grad_(part.requires_grad) for part in head)
    return Head(*cast)  # type: ignore[arg-type]


def time_losses(
    num_tokens: int, vocabulary: int, width: int, fast: Precision, rounds: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Time the variants in turn after a warm-up, one record each; emulated bf16 runs once on 1/64 of the tokens."""
    heads = draw_heads(num_tokens, vocabulary=vocabulary, width=width, device=device)
    few = draw_heads(max(1, num_tokens // 64), vocabulary=vocabulary, width=width, device=device)
    runs: dict[LossVariant, tuple[Callable[[], None], int]] = {}
    for variant in loss_variants(fast):
        slow = _emulated(variant, fast, device)
        runs[variant] = build_loss(variant, few if slow else heads), len(few.labels) if slow else num_tokens
        if not slow and variant.maker != "naive":  # these compile in their first run
            runs[variant][0]()
    timings = in_turn(
        {variant.name: run for variant, (run, _) in runs.items()},
        rounds=rounds,
        device=device,
        once=frozenset(variant.name for variant in runs if _emulated(variant, fast, device)),
    )
    records = []
    for variant, (_, tokens) in runs.items():
        timing = timings[variant.name]
        seconds = timing.wall_seconds if device == "cuda" else timing.core_seconds
        records.append(
            {
                "variant": variant.name,
                "maker": variant.maker,
                "precision": variant.precision,
                "tokens": tokens,
                "rounds": timing.rounds,
                "core_seconds": timing.core_seconds,
                "wall_seconds": timing.wall_seconds,
                "tokens_per_core_second": tokens / timing.core_seconds,
                "tokens_per_second": tokens / timing.wall_seconds,
                "gflops": 1e-9
                * tokens
                * flops_per_token(vocabulary=vocabulary, width=width, hard=variant.maker in _HARD)
                / seconds,
            }
        )
    return records


def weigh_loss(
    variant: LossVariant, num_tokens: int, vocabulary: int, width: int, device: str = "cpu"
) -> dict[str, Any]:
    """Measure the peak memory of a variant in MB, without hidden states and weights, with gradients.

    On a CPU the naive variants skip their matrix products, as in ``step.weigh_step``.
    """
    heads = draw_heads(num_tokens, vocabulary=vocabulary, width=width, device=device)
    run = build_loss(variant, heads)
    products = device == "cuda" or variant.maker != "naive"
    with nullcontext() if products else NoProducts():
        if variant.maker != "naive":  # compile, then free the gradients
            run()
            heads.forget_gradients()
        peak = peak_megabytes(run, device=device)
    return {"variant": variant.name, "tokens": num_tokens, "peak_mb": peak, "products": products}


def _emulated(variant: LossVariant, fast: Precision, device: str) -> bool:
    return device == "cpu" and variant.precision == "bf16" and fast == "fp32"
