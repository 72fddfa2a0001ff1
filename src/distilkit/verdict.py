"""The verdict of a training: what the student keeps of its teacher, what training gained, and what to change.

All of it is measured on held-out text. That cannot decide about quality on tasks: see distilkit.evaluate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy import special
from torch import Tensor

from distilkit.records import Array, Rows

Curve = Sequence[tuple[int, float]]  # optimizer steps done, value

_BY = {"mlm": "masked accuracy", "clm": "next-token accuracy"}
_FEWEST = 8  # held-out blocks that give an interval
_HITS = 20  # right predictions of a teacher of which a share is said
_SAME_TEXT = 0.9  # of the blocks of two runs; other numbers of ranks leave out some
_SAMPLED = 256  # entries of each weight, at least, unless it has fewer
_MOVED = 1e-4  # relative change of the weights; one step of AdamW at the default learning rate makes about 1e-2
_STEPS = 50  # before which no loss is called flat
_FALL = 0.02  # of the soft-target KL on the same blocks
_POINTS, _LAST, _ERRORS = 3, 0.2, 3.0  # of a fifth of a curve; share of the fall in the last fifth; standard errors
_STABLE, _LATE = 0.9, 0.7  # a learning rate near its peak; where such a part ends, if the decay comes late


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How good a student is on held-out text, as far as it is known; None is unknown.

    ``kept`` is its share of the teacher's accuracy, ``by`` masked or next-token accuracy. ``better_than_cut`` and
    ``better_than_baseline`` say by how many nats per labelled token its cross-entropy is below that of the student
    before training and of the ``baseline``, a run's folder; negative numbers are above it. ``margins`` are halves of
    their intervals of 95 % over held-out blocks, which do not cover other seeds. ``line`` says it in one sentence, and
    each of ``warnings`` has a cure.
    """

    kept: float | None = None
    by: str | None = None
    better_than_cut: float | None = None
    better_than_baseline: float | None = None
    baseline: str | None = None
    margins: dict[str, float | None] = field(default_factory=dict)
    line: str = "not scored on held-out text (trainer.limit_val_batches=0)"
    warnings: tuple[str, ...] = ()


def judge(
    *,
    lm: Literal["mlm", "clm"],
    before: Rows | None,
    after: Rows | None,
    steps: int,
    start: str = "cut student",
    baseline: Rows | None = None,
    baseline_folder: str | None = None,
    warnings: Sequence[str] = (),
) -> Verdict:
    """Build the verdict from the scores of each held-out block before and after training, and from a baseline's.

    Rows hold sums over a block's labelled tokens: ``tokens``, ``nll`` and ``accuracy``, and where the teacher is scored
    ``teacher_nll`` and ``teacher_accuracy``. Their ids tell blocks apart. ``start`` says what the
    student was before training. After 0 ``steps`` nothing is said of a gain.
    """
    if after is None or not np.isfinite(after.sums["nll"]).all():
        return Verdict(warnings=tuple(warnings))
    found: dict[str, Any] = {}
    margins: dict[str, float | None] = {}
    hits, tokens = float(after.sums["accuracy"].sum()), float(after.sums["tokens"].sum())
    said = f"{_BY[lm]} {hits / tokens:.3f}"
    if "teacher_accuracy" in after.sums:
        right = float(after.sums["teacher_accuracy"].sum())
        if right < _HITS:
            said += f" (the teacher's {right / tokens:.3f} is too low to say what is kept)"
        else:
            found["kept"], margins["kept"] = _ratio(after.sums["accuracy"], after.sums["teacher_accuracy"])
            found["by"] = _BY[lm]
            said = f"kept {100 * found['kept']:.1f}{_margin(margins['kept'], 100, '.1f')} % of the teacher's {_BY[lm]}"
            said += f" ({hits / tokens:.3f} of {right / tokens:.3f})"
    else:
        said += " (no teacher was scored)"
    parts = []
    for key, name, other in (("cut", start, before if steps else None), ("baseline", "baseline", baseline)):
        pair = _same_blocks(other, after)
        if pair is not None and np.isfinite(pair[0].sums["nll"]).all():
            gain, margin = _ratio(pair[0].sums["nll"] - pair[1].sums["nll"], pair[1].sums["tokens"])
            found[f"better_than_{key}"], margins[f"better_than_{key}"] = gain, margin
            parts.append(f"{abs(gain):.3f}{_margin(margin)} nats {'below' if gain >= 0 else 'above'} the {name}")
            if margin is not None and abs(gain) <= margin:
                parts[-1] += " (no clear difference)"
    line = f"the {start}, not trained: {said}" if not steps else said
    if parts:
        line += f"; cross-entropy {', '.join(parts)}"
    if baseline_folder is not None and "better_than_baseline" not in found:
        line += "; not compared with the baseline, whose held-out text is another"
    if any(margin is None for margin in margins.values()):
        line += f"; {len(after)} held-out blocks are too few for intervals"
    return Verdict(**found, baseline=baseline_folder, margins=margins, line=line, warnings=tuple(warnings))


def _margin(margin: float | None, scale: float = 1, form: str = ".3f") -> str:
    return "" if margin is None else f" ± {scale * margin:{form}}"


def _ratio(values: Array, sizes: Array) -> tuple[float, float | None]:
    """Return the ratio of two sums over blocks (blocks,), and half of its 95 % interval by linearisation."""
    ratio, count = float(values.sum() / sizes.sum()), len(values)
    if count < _FEWEST:
        return ratio, None
    error = np.sqrt(np.square(values - ratio * sizes).sum() * count / (count - 1)) / abs(sizes.sum())
    return ratio, float(special.stdtrit(count - 1, 0.975) * error)


def _same_blocks(one: Rows | None, other: Rows) -> tuple[Rows, Rows] | None:
    """Pair the rows of the same blocks; None where the blocks differ."""
    if one is None:
        return None
    _, mine, theirs = np.intersect1d(one.ids, other.ids, return_indices=True)
    pair = one.take(mine), other.take(theirs)
    return pair if len(mine) >= _SAME_TEXT * max(len(one), len(other)) else None


def find_faults(
    *,
    lm: Literal["mlm", "clm"],
    steps: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
    rows: Rows | None,
    curves: Mapping[str, Curve],
    moved: float,
    copied: bool,
    reads_teacher: bool,
    packing: str,
) -> list[str]:
    """Return what went wrong in a training, one sentence with a cure each.

    ``before`` and ``after`` are held-out metrics, ``rows`` the scores of ``judge``, ``curves`` what was logged.
    ``moved`` is the relative change of the weights. A student that was ``copied`` began as its teacher.
    """
    faults = []
    if copied and reads_teacher:
        found = "teacher and student had the same weights before training, so that soft targets teach nothing"
        faults.append(f"{found}; keep fewer layers, as student=half_depth does, or choose another student")
    if steps and moved < _MOVED:
        found = f"the student hardly moved: training changed its weights by {moved:.1g} of their size"
        return [*faults, f"{found}; raise optimizer.lr, or train longer"]
    name = "val/loss_ce"
    if steps >= _STEPS and not copied and name in before and after.get(name, 0.0) > (1 - _FALL) * before[name]:
        found = f"the soft-target KL is flat: {before[name]:.4g} before training, {after[name]:.4g} after it"
        faults.append(f"{found}; change optimizer.lr or objective.temperature, or train on text like the teacher's")
    share = last_fifth(curves, steps=steps)
    if share is not None and share > _LAST:
        found = f"the loss still falls: the last fifth of the steps brought {share:.0%} of its fall"
        faults.append(f"{found}; train longer, by trainer.max_steps or trainer.max_epochs")
    if reads_teacher and rows is not None and "teacher_nll" in rows.sums:
        excess, margin = _ratio(rows.sums["teacher_nll"] - rows.sums["nll"], rows.sums["tokens"])
        if margin is not None and excess > margin:
            found = "the teacher is not better than its student: its held-out cross-entropy is"
            cure = f"set objective={lm}" + ", data.packing=documents," * (packing == "blocks")
            faults.append(f"{found} {excess:.3f} ± {margin:.3f} nats higher; {cure} or take text like the teacher's")
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
        points = [(step, value) for step, value in curves.get(name, ()) if 0 < step <= end and np.isfinite(value)]
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
