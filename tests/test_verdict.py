"""What a run says at its end: shares, differences and their intervals against plain loops, and warnings by table."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from distilkit.records import Rows
from distilkit.verdict import find_faults, judge, last_fifth, relative_change, weight_sample

TOKENS, BLOCKS = 20, 40


def rows(
    nll: float = 2.0,
    accuracy: float = 0.5,
    *,
    teacher: tuple[float, float] | None = (1.8, 0.6),
    noise: float = 0.0,
    seed: int = 0,
    blocks: int = BLOCKS,
    first: int = 0,
) -> Rows:
    """Blocks of 20 labelled tokens; ``noise`` is added to the cross-entropy of each block."""
    rng = np.random.default_rng(seed)
    sums = {"tokens": np.full(blocks, float(TOKENS)), "nll": TOKENS * (nll + noise * rng.standard_normal(blocks))}
    sums["accuracy"] = np.full(blocks, TOKENS * accuracy)
    if teacher is not None:
        sums |= {
            "teacher_nll": np.full(blocks, TOKENS * teacher[0]),
            "teacher_accuracy": np.full(blocks, TOKENS * teacher[1]),
        }
    return Rows(ids=np.arange(first, first + blocks), sums=sums)


def line(**given: Any) -> str:
    settings: dict[str, Any] = {"lm": "mlm", "steps": 100, "before": rows(2.6, 0.3), "after": rows()}
    return judge(**{**settings, **given}).line


# -------------------------------------------------------------------------------- the line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            {},
            "kept 83.3 ± 0.0 % of the teacher's masked accuracy (0.500 of 0.600); "
            "cross-entropy 0.600 ± 0.000 nats below the cut student",
            id="a healthy run",
        ),
        pytest.param(
            {"baseline": rows(2.12), "baseline_folder": "runs/base"},
            "kept 83.3 ± 0.0 % of the teacher's masked accuracy (0.500 of 0.600); cross-entropy 0.600 ± 0.000 nats below "
            "the cut student, 0.120 ± 0.000 nats below the baseline",
            id="a baseline",
        ),
        pytest.param(
            {"baseline": rows(1.9), "baseline_folder": "runs/base", "before": rows(1.95)},
            "kept 83.3 ± 0.0 % of the teacher's masked accuracy (0.500 of 0.600); cross-entropy 0.050 ± 0.000 nats above "
            "the cut student, 0.100 ± 0.000 nats above the baseline",
            id="worse than both",
        ),
        pytest.param(
            {"baseline": rows(2.1, first=20), "baseline_folder": "runs/base"},
            "kept 83.3 ± 0.0 % of the teacher's masked accuracy (0.500 of 0.600); cross-entropy 0.600 ± 0.000 nats below "
            "the cut student; not compared with the baseline, whose held-out text is another",
            id="a baseline on other text",
        ),
        pytest.param(
            {"before": rows(2.0001)},
            "kept 83.3 ± 0.0 % of the teacher's masked accuracy (0.500 of 0.600); "
            "cross-entropy 0.000 ± 0.000 nats below the cut student (no clear difference)",
            id="a difference that would be shown as 0",
        ),
        pytest.param(
            {"lm": "clm", "start": "student before training"},
            "kept 83.3 ± 0.0 % of the teacher's next-token accuracy (0.500 of 0.600); "
            "cross-entropy 0.600 ± 0.000 nats below the student before training",
            id="a causal student of any shape",
        ),
        pytest.param(
            {"before": None},
            "kept 83.3 ± 0.0 % of the teacher's masked accuracy (0.500 of 0.600)",
            id="not scored before training",
        ),
        pytest.param(
            {"steps": 0},
            "without training: kept 83.3 ± 0.0 % of the teacher's masked accuracy (0.500 of 0.600)",
            id="the cut student itself",
        ),
        pytest.param(
            {"after": rows(teacher=None)},
            "masked accuracy 0.500 (no teacher was scored); cross-entropy 0.600 ± 0.000 nats below the cut student",
            id="without a teacher's scores",
        ),
        pytest.param(
            {"after": rows(teacher=(5.0, 0.02))},
            "masked accuracy 0.500 (the teacher's 0.020 is too low to say what is kept); "
            "cross-entropy 0.600 ± 0.000 nats below the cut student",
            id="a teacher that knows nothing",
        ),
        pytest.param(
            {"before": rows(2.6, blocks=6), "after": rows(blocks=6)},
            "kept 83.3 % of the teacher's masked accuracy (0.500 of 0.600); cross-entropy 0.600 nats below the cut student; "
            "6 held-out blocks are too few for intervals",
            id="few blocks",
        ),
        pytest.param({"after": None}, "not scored", id="validation off"),
        pytest.param({"after": rows(math.nan)}, "the held-out loss is not finite", id="not finite"),
        pytest.param(
            {"before": rows(math.inf)},
            "kept 83.3 ± 0.0 % of the teacher's masked accuracy (0.500 of 0.600)",
            id="not finite before training",
        ),
    ],
)
def test_the_line_says_what_is_known_and_leaves_out_the_rest(given: dict[str, Any], expected: str) -> None:
    assert line(**given) == expected


def test_the_numbers_are_those_of_plain_loops_over_blocks() -> None:
    rng = np.random.default_rng(3)
    ids, tokens = np.arange(30), rng.integers(5, 30, 30).astype(float)
    sums = {"tokens": tokens, "nll": tokens * rng.normal(3, 0.3, 30), "accuracy": np.floor(tokens * rng.random(30))}
    sums["teacher_accuracy"] = np.floor(tokens * (0.5 + rng.random(30) / 2))
    earlier = {"tokens": tokens, "nll": sums["nll"] + tokens * rng.normal(0.4, 0.2, 30), "accuracy": sums["accuracy"]}
    shuffled = rng.permutation(30)
    found = judge(
        lm="mlm",
        steps=9,
        before=Rows(ids=ids, sums=earlier).take(shuffled),  # blocks are paired by their ids
        after=Rows(ids=ids, sums=sums),
        baseline=Rows(ids=ids, sums=earlier),
        baseline_folder="runs/base",
    )
    hits = sum(sums["accuracy"].tolist())
    right = sum(sums["teacher_accuracy"].tolist())
    assert found.kept == pytest.approx(hits / right)
    gain = (sum(earlier["nll"].tolist()) - sum(sums["nll"].tolist())) / sum(tokens.tolist())
    assert found.better_than_cut == found.better_than_baseline == pytest.approx(gain)
    assert (found.by, found.baseline) == ("masked accuracy", "runs/base")
    # A jackknife over blocks has nearly the interval of the linearisation.
    for name, over, under in (
        ("kept", sums["accuracy"], sums["teacher_accuracy"]),
        ("better_than_cut", earlier["nll"] - sums["nll"], tokens),
    ):
        left_out = [(over.sum() - over[i]) / (under.sum() - under[i]) for i in range(30)]
        error = math.sqrt(29 / 30 * sum((each - np.mean(left_out)) ** 2 for each in left_out))
        assert found.margins[name] == pytest.approx(stats.t.ppf(0.975, 29) * error, rel=0.05)


def test_intervals_hold_the_truth_in_95_of_100_held_out_sets() -> None:
    held = unclear = 0
    for seed in range(400):
        before, after = rows(2.0, noise=0.5, seed=2 * seed), rows(2.0, noise=0.5, seed=2 * seed + 1)
        found = judge(lm="mlm", steps=9, before=before, after=after)
        held += abs(found.better_than_cut or 0) <= found.margins["better_than_cut"]
        unclear += "(no clear difference)" in found.line
    assert 0.92 < held / 400 < 0.98
    assert held == unclear


def test_a_few_blocks_that_only_one_run_has_do_not_count() -> None:
    """A run on two processes leaves out the last block of an odd number."""
    found = judge(
        lm="mlm", steps=9, before=None, after=rows(2.0, blocks=40), baseline=rows(2.5, blocks=41), baseline_folder="b"
    )
    assert found.better_than_baseline == pytest.approx(0.5)
    fewer = judge(
        lm="mlm", steps=9, before=None, after=rows(2.0, blocks=40), baseline=rows(2.5, blocks=48), baseline_folder="b"
    )
    assert fewer.better_than_baseline is None


# -------------------------------------------------------------------------------- warnings


def faults(**given: Any) -> list[str]:
    settings: dict[str, Any] = {"lm": "mlm", "steps": 150, "rows": rows(), "curves": {}, "moved": 0.1, "copied": False}
    settings |= {"before": {"val/loss_ce": 0.232}, "after": {"val/loss_ce": 0.070}}
    settings |= {"spikes": {"loss": 0, "gradient_norm": 0}, "skipped": 0}
    return find_faults(**{**settings, "reads_teacher": True, "reads_logits": True, "packing": "blocks", **given})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, [], id="a healthy run"),
        pytest.param({"spikes": {"loss": 0, "gradient_norm": 1}}, [], id="one spike of the gradient in 150 steps"),
        pytest.param(
            {"spikes": {"loss": 1, "gradient_norm": 0}},
            [
                "the loss spiked at 1 and the gradient's norm at 0 of 150 steps; lower optimizer.lr or "
                "trainer.gradient_clip_val, or raise scheduler.warmup_share"
            ],
            id="a spike of the loss",
        ),
        pytest.param(
            {"spikes": {"loss": 0, "gradient_norm": 2}, "skipped": 3},
            [
                "3 of 150 optimizer steps were left out, because their loss or gradient was not finite; look at their "
                "batches, and lower optimizer.lr",
                "the loss spiked at 0 and the gradient's norm at 2 of 150 steps; lower optimizer.lr or "
                "trainer.gradient_clip_val, or raise scheduler.warmup_share",
            ],
            id="many spikes of the gradient, and steps left out",
        ),
        pytest.param(
            {"copied": True},
            [
                "teacher and student had the same weights before training, so that soft targets teach nothing; keep fewer "
                "layers, as student=half_depth does, or choose another student"
            ],
            id="the same weights",
        ),
        pytest.param({"copied": True, "reads_teacher": False}, [], id="the same weights, trained without soft targets"),
        pytest.param(
            {"moved": 6e-8, "after": {"val/loss_ce": 0.232}},
            [
                "the student hardly moved: its weights changed by 6e-08 of their size; raise optimizer.lr, or train longer"
            ],
            id="a tiny learning rate",
        ),
        pytest.param({"moved": 0.0, "steps": 0, "after": {"val/loss_ce": 0.232}}, [], id="no training"),
        pytest.param(
            {"reads_logits": False, "lm": "clm"},
            [
                "no term of the loss reads the student's predictions, so that accuracy and cross-entropy say little; "
                "compare on tasks, or add objective.alpha_clm=1"
            ],
            id="relations alone",
        ),
        pytest.param(
            {"after": {"val/loss_ce": 0.231}},
            [
                "the soft-target KL is flat: 0.232 before training, 0.231 after it; change optimizer.lr or "
                "objective.temperature, or train on text like the teacher's"
            ],
            id="a flat KL",
        ),
        pytest.param({"after": {"val/loss_ce": 0.231}, "steps": 20}, [], id="a flat KL after a few steps"),
        pytest.param({"before": {}, "after": {"val/loss_ce": 0.231}}, [], id="a KL that was not scored before"),
        pytest.param({"before": {"val/loss_mlm": 3.0}, "after": {"val/loss_mlm": 3.0}}, [], id="no KL"),
        pytest.param(
            {"rows": rows(1.5, noise=0.1)},
            [
                "the teacher's held-out cross-entropy is 0.306 ± 0.025 nats above its student's, so that soft targets teach "
                "little; set objective=mlm, data.packing=documents, or take text like the teacher's"
            ],
            id="a teacher that is worse",
        ),
        pytest.param(
            {"rows": rows(1.5), "lm": "clm", "packing": "documents"},
            [
                "the teacher's held-out cross-entropy is 0.300 ± 0.000 nats above its student's, so that soft targets teach "
                "little; set objective=clm or take text like the teacher's"
            ],
            id="a worse causal teacher on documents",
        ),
        pytest.param({"rows": rows(1.79, noise=0.2)}, [], id="a teacher that is as good"),
        pytest.param({"rows": rows(1.5, blocks=6)}, [], id="too few blocks to tell"),
        pytest.param({"rows": rows(1.5), "reads_teacher": False}, [], id="a worse teacher that is not read"),
        pytest.param({"rows": rows(1.5, teacher=None)}, [], id="a teacher that is not scored"),
        pytest.param({"rows": None, "before": {}, "after": {}}, [], id="validation off"),
    ],
)
def test_warnings_name_the_fault_and_a_cure(given: dict[str, Any], expected: list[str]) -> None:
    assert faults(**given) == expected


def curve(
    form: Any, *, points: int = 40, steps: int = 2000, noise: float = 0.0, seed: int = 0
) -> list[tuple[int, float]]:
    rng = np.random.default_rng(seed)
    at = [round(steps * (index + 1) / points) for index in range(points)]
    return [(step, form(step / steps) + noise * rng.standard_normal()) for step in at]


FALLING = {
    "a straight line": lambda t: 5 - 2 * t,
    "a line after a short fall": lambda t: 4 + math.exp(-80 * t) - t,
    "faster and faster": lambda t: 5 - t**2,
}
SETTLED = {
    "the logarithm of the steps": lambda t: 4 - 0.3 * math.log(t),
    "a power of the steps": lambda t: 3 + t**-0.3,
    "an exponential": lambda t: 3 + math.exp(-5 * t),
    "flat": lambda t: 3.0,
    "u-shaped": lambda t: 3 + (2 * t - 1) ** 2,
    "rising": lambda t: 3 + t,
}


@pytest.mark.parametrize("name", ["val/nll", "train/loss_ce", "train/loss_mlm", "train/loss_clm"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_loss_that_still_falls_is_told_from_one_that_has_settled(name: str, noise: float) -> None:
    for label, form in FALLING.items():
        for seed in range(10):
            share = last_fifth({name: curve(form, noise=noise, seed=seed)}, steps=2000)
            assert share is not None and share > 0.2, (label, share)
    for label, form in SETTLED.items():
        for seed in range(10):
            share = last_fifth({name: curve(form, noise=noise, seed=seed)}, steps=2000)
            assert share is None or share <= 0.2, (label, share)
    assert (
        "the loss still falls: the last fifth of the steps brought 25% of its fall; train longer, by budget, trainer.max_steps"
        in (faults(steps=2000, curves={name: curve(FALLING["a straight line"])})[0])
    )


def test_noise_alone_is_no_fall() -> None:
    alarms = 0
    for seed in range(300):
        share = last_fifth({"train/loss_ce": curve(SETTLED["flat"], noise=0.3, points=15, seed=seed)}, steps=2000)
        alarms += share is not None and share > 0.2
    assert alarms <= 6


def test_few_points_and_curves_without_their_beginning_say_nothing() -> None:
    line = FALLING["a straight line"]
    assert last_fifth({"val/nll": curve(line, points=14)}, steps=2000) is None
    assert last_fifth({"val/nll": curve(line, points=15)}, steps=2000) == pytest.approx(0.25)
    resumed = [(step, value) for step, value in curve(line, points=100) if step > 1000]
    assert last_fifth({"train/loss_ce": resumed}, steps=2000) is None
    assert last_fifth({}, steps=2000) is None
    assert last_fifth({"val/nll": [(0, 9.0)]}, steps=0) is None
    broken = [(step, math.nan) for step, _ in curve(line)]
    assert last_fifth({"val/nll": broken}, steps=2000) is None


def test_the_score_before_the_first_step_is_no_part_of_the_curve() -> None:
    points = curve(FALLING["a straight line"])
    assert last_fifth({"val/nll": [(0, 90.0), *points]}, steps=2000) == last_fifth({"val/nll": points}, steps=2000)


def test_held_out_scores_come_before_training_losses_if_there_are_enough() -> None:
    training = curve(FALLING["a straight line"])
    held_out = curve(SETTLED["an exponential"])
    assert last_fifth({"val/nll": held_out, "train/loss_ce": training}, steps=2000) == pytest.approx(0.05, abs=0.03)
    assert last_fifth({"val/nll": held_out[::10], "train/loss_ce": training}, steps=2000) == pytest.approx(0.25)


def test_a_fall_by_the_decay_of_the_learning_rate_at_the_end_is_none() -> None:
    """A warm-up, a stable rate and a decay over the last tenth, in which any loss falls."""
    rates = curve(lambda t: min(1.0, 20 * t, 10 * (1 - t) + 1e-9), points=100)
    losses = curve(lambda t: 3 + 0.3 * math.exp(-8 * t) - 5 * max(0.0, t - 0.9), points=100)
    share = last_fifth({"train/loss_ce": losses}, steps=2000)
    assert share is not None and share > 0.2
    share = last_fifth({"train/loss_ce": losses, "train/lr": rates}, steps=2000)
    assert share is None or share < 0.1
    linear = curve(lambda t: 1 - t, points=100)  # a decay over the whole run is no end
    line = curve(FALLING["a straight line"], points=100)
    assert last_fifth({"train/loss_ce": line, "train/lr": linear}, steps=2000) == pytest.approx(0.25)


# --------------------------------------------------------------------------------- weights


def test_the_change_of_the_weights_is_that_of_all_entries() -> None:
    torch.manual_seed(0)
    state = {"large": torch.randn(300, 40), "small": torch.randn(7), "scale": torch.tensor(3.0), "ids": torch.arange(9)}
    start = weight_sample(state)
    assert sum(part.numel() for part in start.values()) < 900
    assert "ids" not in start
    assert torch.equal(start["small"], state["small"])
    for name in ("large", "small", "scale"):
        state[name] += 0.01 * torch.randn_like(state[name])  # in place, as an optimizer does
    names = ("large", "small", "scale")
    whole = torch.cat([state[name].flatten() for name in names])
    change = relative_change(start, weight_sample(state))
    assert change == pytest.approx(0.01 * math.sqrt(whole.numel()) / float(whole.norm()), rel=0.2)
    assert relative_change(start, start) == 0
