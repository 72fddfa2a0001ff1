"""The stage curve: what is kept after so many tokens, from one run at a constant rate that is decayed at each point.

The trunk goes on from point to point, and a branch leaves it before each, whose learning rate falls to zero at the point:
warmup, stable, decay (arXiv 2404.06395, section 4). Weights and masking rates that change over a training would change
within each part, so that ``curve_overrides`` sets them to one value.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a row's curve: the overrides of the trunk up to its branch, and of the branch."""

    name: str
    tokens: float
    leaves: int  # steps
    ends: int
    trunk: list[str]
    branch: list[str]


def measure_curve(experiment: Experiment) -> None:
    """Train the trunk of each row of the curve, then the branches that leave what is trained of it, and score these."""
    own, ready, failed = experiment.settings, list[Point](), None
    rows = [name for name in own.curve_rows if name in experiment.rows] if own.curve else []

    def go(name: str) -> None:
        for point in points_of(experiment, name):
            train_trunk(experiment, point)
            ready.append(point)

    try:
        experiment.runner.each(go, rows)
    except UserError as error:
        failed = error
    experiment.runner.each(lambda point: decay(experiment, point), ready)
    if failed:
        raise failed


def branch(experiment: Experiment, name: str, tokens: float) -> Path:
    """Return the folder of the training that ends at a point."""
    return experiment.out / "curve" / name / f"{tokens:.0f}"


def _trunk(experiment: Experiment, name: str, tokens: float) -> Path:
    return branch(experiment, name, tokens).with_name(f"{tokens:.0f}-trunk")


def _last(folder: Path) -> str:
    return f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"


def points_of(experiment: Experiment, name: str) -> list[Point]:
    """Return the points of a row's curve, in their order."""
    own, summary = experiment.settings, run_folder(experiment, name) / "summary.json"
    if not summary.is_file():
        raise UserError(f"the tokens of a step of row {name} are not known; add stage=train")
    trained = json.loads(summary.read_text("utf-8"))
    per_step = trained["tokens_seen"] / trained["optimizer_steps"]
    pairs = steps_of(own.curve, tokens_per_step=per_step, decay_share=own.decay_share)
    warmup = max(1, round(_WARMUP * pairs[0][1]))
    shared, found, before = [*tuned(experiment, name), *own.curve_overrides], list[Point](), list[str]()
    for tokens, (leaves, ends) in zip(sorted(own.curve), pairs, strict=True):
        constant, decayed = schedules(leaves, ends, warmup=warmup)
        last = [_last(_trunk(experiment, name, tokens))]
        trunk, end = [*shared, *constant, *before], [*shared, *decayed, *last]
        found.append(Point(name=name, tokens=tokens, leaves=leaves, ends=ends, trunk=trunk, branch=end))
        before = last
    return found


def train_trunk(experiment: Experiment, point: Point) -> None:
    """Train the trunk from the point before to the step at which the branch of this one leaves it."""
    folder, label = _trunk(experiment, point.name, point.tokens), f"curve/{point.name}-{point.tokens:.0f}-trunk"
    experiment.runner.run(experiment.training(label, folder, point.trunk, steps=point.leaves))


def decay(experiment: Experiment, point: Point) -> None:
    """Train the branch of a point, and score it."""
    folder, label = branch(experiment, point.name, point.tokens), f"curve/{point.name}-{point.tokens:.0f}"
    experiment.runner.run(experiment.training(label, folder, point.branch, steps=point.ends))
    student, scores = folder / "student", folder / "scores"
    scoring.held_out(experiment, point.name, student, scores / scoring.HELD_OUT)
    if experiment.settings.similarity:
        scoring.evaluate(experiment, point.name, student, out=scores, tasks=["similarity"], seeds=[None])
