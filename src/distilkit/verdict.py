"""The verdict of a training: what the student keeps of its teacher, what training gained, and what to change.

All of it is measured on held-out text. That cannot decide about quality on tasks: see distilkit.evaluate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilkit.language_model import LM
from distilkit.metrics import nats_below, ratio_of_sums
from distilkit.records import Rows

Curve = Sequence[tuple[int, float]]  # optimizer steps done, value

_BY = {"mlm": "masked accuracy", "clm": "next-token accuracy"}
_HITS = 20  # right predictions of a teacher, to keep a share of
_SAMPLED = 256  # entries of each weight, at least, unless it has fewer
_MOVED = 1e-4  # relative change of the weights; one step of AdamW at the default learning rate makes about 1e-2
_STEPS, _FALL = 50, 0.02  # after so many, the soft-target KL on the same blocks has fallen by this share
_NATS = 5e-4  # smaller differences are shown as 0.000
_POINTS, _LAST, _ERRORS = 3, 0.2, 3.0  # of a fifth of a curve; share of the fall in the last fifth; standard errors
_SPIKES = 0.01  # share of steps whose gradient may spike, which clipping bounds
_STABLE, _LATE = 0.9, 0.7  # a learning rate near its peak; where such a part ends, if the decay comes late


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How good a student is on held-out text, as far as it is known; None is unknown.

    ``kept`` is its share of the teacher's accuracy, ``by`` masked or next-token accuracy. ``better_than_cut`` and
    ``better_than_baseline`` say by how many nats per labelled token its cross-entropy is below that of the student
    before training and of the ``baseline``, a run's folder; negative numbers are above it. ``margins`` are halves of
    their 95 % intervals over held-out blocks, which do not cover other seeds. ``line`` says it in one sentence.
    """

    kept: float | None = None
    by: str | None = None
    better_than_cut: float | None = None
    better_than_baseline: float | None = None
    baseline: str | None = None
    margins: dict[str, float] = field(default_factory=dict)
    line: str
    warnings: tuple[str, ...] = ()


def judge(
    *,
    lm: LM,
    steps: int,
    before: Rows | None,
    after: Rows | None,
    baseline: Rows | None = None,
    baseline_folder: str | None = None,
    start: str = "cut student",
    warnings: Sequence[str] = (),
) -> Verdict:
    """Build the verdict from the scores of each held-out block before and after training, and of a baseline.

    Rows hold sums over a block's labelled tokens: ``tokens``, ``nll`` and ``accuracy``, and where the teacher is scored
    ``teacher_nll`` and ``teacher_accuracy``. Their ids tell blocks apart. ``start`` is what the student was before
    training. After 0 ``steps`` nothing is said of a gain.
    """
    found: dict[str, Any] = {"baseline": baseline_folder, "warnings": tuple(warnings)}
    if after is None or not np.isfinite(after.sums["nll"]).all():
        return Verdict(line="not scored" if after is None else "the held-out loss is not finite", **found)
    ratios: dict[str, tuple[float, float | None]] = {}
    tokens, right = after.sums["tokens"].sum(), after.sums.get("teacher_accuracy", np.array([np.nan])).sum()
    accuracy = after.sums["accuracy"].sum() / tokens
    line = f"{_BY[lm]} {accuracy:.3f}"
    if np.isnan(right):
        line += " (no teacher was scored)"
    elif right < _HITS:
        line += f" (the teacher's {right / tokens:.3f} is too low to say what is kept)"
    else:
        kept, margin = ratios["kept"] = ratio_of_sums(after.sums["accuracy"], after.sums["teacher_accuracy"])
        found["by"], interval = _BY[lm], "" if margin is None else f" ± {100 * margin:.1f}"
        line = f"kept {100 * kept:.1f}{interval} % of the teacher's {_BY[lm]} ({accuracy:.3f} of {right / tokens:.3f})"
    line = line if steps else f"without training: {line}"
    gains = []
    for key, name, other in (("cut", start, before if steps else None), ("baseline", "baseline", baseline)):
        if (ratio := nats_below(other, after)) is not None:
            gain, margin = ratios[f"better_than_{key}"] = ratio
            interval = "" if margin is None else f" ± {margin:.3f}"
            unclear = " (no clear difference)" * (margin is not None and abs(gain) <= max(margin, _NATS))
            gains.append(f"{abs(gain):.3f}{interval} nats {'below' if gain >= 0 else 'above'} the {name}{unclear}")
    line += f"; cross-entropy {', '.join(gains)}" * bool(gains)
    if baseline_folder is not None and "better_than_baseline" not in ratios:
        line += "; not compared with the baseline, whose held-out text is another"
    if any(margin is None for _, margin in ratios.values()):
        line += f"; {len(after)} held-out blocks are too few for intervals"
    margins = {name: margin for name, (_, margin) in ratios.items() if margin is not None}
    found |= {name: ratio for name, (ratio, _) in ratios.items()}
    return Verdict(line=line, margins=margins, **found)


def find_faults(
    *,
    lm: LM,
    steps: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
    rows: Rows | None,
    curves: Mapping[str, Curve],
    moved: float,
    copied: bool,
    reads_teacher: bool,
    reads_logits: bool,
    packing: str,
    spikes: Mapping[str, int],
    skipped: int,
) -> list[str]:
    """Return what went wrong in a training, one sentence with a cure each.

    ``before`` and ``after`` are held-out metrics, ``rows`` the scores of ``judge``, ``curves`` what was logged.
    ``spikes`` are numbers of steps with a spike of the ``loss`` and the ``gradient_norm``, ``skipped`` of those that were
    left out. ``moved`` is the relative change of the weights. A student that was ``copied`` began as its teacher. With
    ``reads_logits`` a term reads the student's predictions.
    """
    faults = []
    if skipped:
        found = f"{skipped} of {steps} optimizer steps were left out, because their loss or gradient was not finite"
        faults.append(f"{found}; look at their batches, and lower optimizer.lr")
    if spikes["loss"] or spikes["gradient_norm"] > _SPIKES * steps:
        found = (
            f"the loss spiked at {spikes['loss']} and the gradient's norm at {spikes['gradient_norm']} of {steps} steps"
        )
        faults.append(f"{found}; lower optimizer.lr or trainer.gradient_clip_val, or raise scheduler.warmup_share")
    if copied and reads_teacher:
        found = "teacher and student had the same weights before training, so that soft targets teach nothing"
        faults.append(f"{found}; keep fewer layers, as student=half_depth does, or choose another student")
    if steps and moved < _MOVED:
        found = f"the student hardly moved: its weights changed by {moved:.1g} of their size"
        return [*faults, f"{found}; raise optimizer.lr, or train longer"]
    if steps and not reads_logits:
        found = "no term of the loss reads the student's predictions, so that accuracy and cross-entropy say little"
        faults.append(f"{found}; compare on tasks, or add objective.alpha_{lm}=1")
    name = "val/loss_ce"
    if steps >= _STEPS and not copied and name in before and after.get(name, 0.0) > (1 - _FALL) * before[name]:
        found = f"the soft-target KL is flat: {before[name]:.4g} before training, {after[name]:.4g} after it"
        faults.append(f"{found}; change optimizer.lr or objective.temperature, or train on text like the teacher's")
    if (share := last_fifth(curves, steps=steps)) is not None and share > _LAST:
        found = f"the loss still falls: the last fifth of the steps brought {share:.0%} of its fall"
        faults.append(f"{found}; train longer, by budget, trainer.max_steps or trainer.max_epochs")
    if reads_teacher and rows is not None and "teacher_nll" in rows.sums:
        excess, margin = ratio_of_sums(rows.sums["teacher_nll"] - rows.sums["nll"], rows.sums["tokens"])
        if margin is not None and excess > margin:
            found = (
                f"the teacher's held-out cross-entropy is {excess:.3f} ± {margin:.3f} nats above its student's, so that"
            )
            cure = f"set objective={lm}" + ", data.packing=documents," * (packing == "blocks")
            faults.append(f"{found} soft targets teach little; {cure} or take text like the teacher's")
    return faults


def last_fifth(curves: Mapping[str, Curve], *, steps: int) -> float | None:
    """Return which share of a loss's fall the last fifth of the steps brought, None where that is not clear.

    It is the difference of the means of the last two fifths, divided by that of the first and the last. A straight line
    has 0.25, a fall with the logarithm of the steps about 0.1. Held-out cross-entropy comes before training losses,
    whose points vary by batch. A late decay of the learning rate, which lowers any loss, is left out.
    """
    rates = curves.get("train/lr", ())
    stable = [step for step, rate in rates if rate >= _STABLE * max(rate for _, rate in rates)]
    end = stable[-1] if stable and stable[-1] >= _LATE * steps else steps
    for name in ("val/nll", "train/loss_ce", "train/loss_mlm", "train/loss_clm"):
        points = [(step, value) for step, value in curves.get(name, ()) if step <= end and np.isfinite(value)]
        fifths = [[value for step, value in points if n * end < 5 * step <= (n + 1) * end] for n in range(5)]
        if min(map(len, fifths)) < _POINTS:
            continue
        first, *_, fourth, last = (float(np.mean(part)) for part in fifths)
        error = _ERRORS * float(np.sqrt(sum(np.var(part, ddof=1) / len(part) for part in fifths[3:])))
        return (fourth - last) / (first - last) if min(fourth, first) - last > error else None
    return None


def weight_sample(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy some entries of each weight of a state dict, evenly spread, to float32 on the CPU."""
    spread = {name: weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)] for name, weight in state.items()}
    return {name: part.to("cpu", torch.float32, copy=True) for name, part in spread.items() if part.is_floating_point()}


def relative_change(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
    """Return the norm of the change from one sample of weights to another, divided by the norm of the first."""
    first, second = (torch.cat([sample[name] for name in start if name in end]).double() for sample in (start, end))
    return float((second - first).norm() / first.norm())
