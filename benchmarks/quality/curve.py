"""The stage curve: what is kept after so many tokens, from one run at a constant rate that is decayed at each point.

The trunk goes on from point to point, and a branch leaves it before each, whose learning rate falls to zero at the point:
warmup, stable, decay (arXiv 2404.06395, section 4). Weights and masking rates that change over a training would change
within each part, so that ``curve_overrides`` sets them to one value.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import scoring
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.training import run_folder, tuned
from distilkit.errors import UserError

_WARMUP = 0.05  # of the steps of the first point


def steps_of(points: Sequence[float], *, tokens_per_step: float, decay_share: float) -> list[tuple[int, int]]:
    """Return for each point the step at which its branch leaves the trunk, and the step at which it ends."""
    ends = [round(tokens / tokens_per_step) for tokens in sorted(points)]
    pairs = [(end - max(1, round(decay_share * end)), end) for end in ends]
    if not pairs or pairs[0][0] < 1 or any(later[0] <= leaves[0] for leaves, later in itertools.pairwise(pairs)):
        steps = f"of {tokens_per_step:.0f} tokens a step"
        raise UserError(f"curve={list(points)} are the steps {ends} {steps}; give points that are further apart")
    return pairs


def schedules(leaves: int, ends: int, *, warmup: int) -> tuple[list[str], list[str]]:
    """Return the overrides of the schedule of a trunk, up to the step ``leaves``, and of its branch up to ``ends``."""
    may = "may_change=[scheduler]"  # a checkpoint of the trunk goes on with another one
    trunk = [may, "scheduler.name=constant_with_warmup", f"scheduler.warmup_share={warmup / leaves:.8f}"]
    decay = f"+scheduler.kwargs.decay_share={(ends - leaves) / ends:.8f}"
    return trunk, [may, "scheduler.name=wsd", f"scheduler.warmup_share={warmup / ends:.8f}", decay]


def measure_curve(experiment: Experiment) -> None:
    """Train trunk and branches of each row of the curve, and score the branches."""
    own = experiment.settings
    rows = [name for name in own.curve_rows if name in experiment.rows]
    if own.curve:
        experiment.runner.each(lambda name: _measure(experiment, name), rows)


def branch(experiment: Experiment, name: str, tokens: float) -> Path:
    """Return the folder of the training that ends at a point."""
    return experiment.out / "curve" / name / f"{tokens:.0f}"


def _measure(experiment: Experiment, name: str) -> None:
    own, summary = experiment.settings, run_folder(experiment, name) / "summary.json"
    if not summary.is_file():
        raise UserError(f"the tokens of a step of row {name} are not known; add stage=train")
    trained = json.loads(summary.read_text("utf-8"))
    per_step = trained["tokens_seen"] / trained["optimizer_steps"]
    points = sorted(own.curve)
    pairs = steps_of(points, tokens_per_step=per_step, decay_share=own.decay_share)
    warmup = max(1, round(_WARMUP * pairs[0][1]))
    before: list[str] = []
    for tokens, (leaves, ends) in zip(points, pairs, strict=True):
        folder, label = branch(experiment, name, tokens), f"curve/{name}-{tokens:.0f}"
        trunk = folder.with_name(f"{tokens:.0f}-trunk")
        constant, decayed = schedules(leaves, ends, warmup=warmup)
        shared = [*tuned(experiment, name), *own.curve_overrides]
        last = [f"ckpt_path={trunk / 'checkpoints' / 'last.ckpt'}"]
        run = experiment.runner.run
        run(experiment.training(f"{label}-trunk", trunk, [*shared, *constant, *before], steps=leaves))
        run(experiment.training(label, folder, [*shared, *decayed, *last], steps=ends))
        before = last
        scoring.held_out(experiment, name, folder / "student", folder / "scores" / scoring.HELD_OUT)
        if own.similarity:
            scoring.evaluate(
                experiment, name, folder / "student", out=folder / "scores", tasks=["similarity"], seeds=[None]
            )
