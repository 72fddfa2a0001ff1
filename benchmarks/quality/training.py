"""The stages that train: the seconds of a step, the learning rates, and each row at its whole budget."""

import json
import statistics
import threading
from pathlib import Path
from typing import Any

from benchmarks.quality import scoring
from benchmarks.quality.experiment import Experiment, Row, seconds
from distilkit.errors import UserError
from distilkit.records import write_json

_GUARD = threading.Lock()
SHORTEST = 10  # steps


def _trained(experiment: Experiment) -> list[Row]:
    """Return the rows that are trained with a cost and a learning rate of their own."""
    return [row for row in experiment.rows.values() if row.train and not row.best_of and not row.tuned_as]


def measure_speed(experiment: Experiment) -> None:
    """Measure the core-seconds of a step of each row, the rows in turn, into speed.json; the clock on the wall needs none."""
    own = experiment.settings
    if own.clock == "wall":
        return
    if own.trainer != "cpu":
        raise UserError(f"clock=cpu times steps on a CPU, but trainer={own.trainer}; run stage=[speed,tune] without it")
    rows, folders = _trained(experiment), range(own.speed_runs)

    def run(each: tuple[int, Row]) -> None:
        turn, row = each
        overrides = [*experiment.overrides(row.name), "+trainer.limit_val_batches=0"]
        folder = experiment.out / "speed" / f"{row.name}-{turn}"
        experiment.runner.run(experiment.training(f"speed/{row.name}-{turn}", folder, overrides, steps=own.speed_steps))

    experiment.runner.each(run, [(turn, row) for turn in folders for row in rows])
    found = {}
    for row in rows:
        files = [experiment.out / "speed" / f"{row.name}-{turn}" / "clock.json" for turn in folders]
        times = [json.loads(file.read_text("utf-8")).get("core_seconds_per_step") for file in files]
        if None in times:
            raise UserError(
                f"speed_steps={own.speed_steps} are too few to be timed; set more than 5, and delete speed/"
            )
        found[row.name] = {"seconds_per_step": statistics.median(times), "measured": times}
    write_json(experiment.out / "speed.json", {**experiment.read("speed.json"), **found})


def seconds_per_step(experiment: Experiment, name: str) -> float:
    """Return the core-seconds of a step of a row, measured by the stage speed."""
    row, speeds = experiment.every[name], experiment.read("speed.json")
    if row.tuned_as or row.best_of:
        return seconds_per_step(experiment, row.tuned_as or experiment.read("tuning.json")[name]["best"])
    if name not in speeds:
        raise UserError(f"the steps of row {name} are not timed; add stage=speed")
    return float(speeds[name]["seconds_per_step"])


def limits(experiment: Experiment, name: str, share: float) -> tuple[int | None, list[str]]:
    """Return the steps of a row for a share of the budget, or for the clock on the wall the override of its time."""
    time, row = seconds(experiment.settings.budget) * share, experiment.every[name]
    if not row.train:
        return 0, []
    if experiment.settings.clock == "wall":
        return None, [f"budget={round(time)}s"]
    steps = round(time / seconds_per_step(experiment, name))
    if steps < SHORTEST:
        raise UserError(f"{time:g} seconds are {steps} steps of row {name}, but it takes {SHORTEST}; raise the budget")
    return steps, []


def tune(experiment: Experiment) -> None:
    """Choose the learning rate of each row by short runs, and the best candidate of a row, into tuning.json."""
    experiment.runner.each(lambda row: _tune(experiment, row), _trained(experiment))
    tuning = experiment.read("tuning.json")
    for row in experiment.rows.values():
        if row.best_of:
            best = min(row.best_of, key=lambda name: float(tuning[name]["held_out"]))
            _note(experiment, row.name, {**tuning[best], "best": best, "among": list(row.best_of)})
    for row in experiment.rows.values():
        if row.tuned_as:
            _note(experiment, row.name, {**experiment.read("tuning.json")[row.tuned_as], "as": row.tuned_as})


def _note(experiment: Experiment, name: str, found: dict[str, Any]) -> None:
    with _GUARD:
        write_json(experiment.out / "tuning.json", {**experiment.read("tuning.json"), name: found})


def _tune(experiment: Experiment, row: Row) -> None:
    """Try learning rates, and while the best one is at an edge the next beyond it."""
    own, tried, held_out = experiment.settings, {}, {}
    waiting, left = sorted(map(float, own.learning_rates)), int(own.extensions)
    while waiting:
        for rate in waiting:
            tried[rate], held_out[rate] = _try(experiment, row, rate)
        best = min(tried, key=lambda rate: tried[rate])
        waiting = [next_ for next_, edge in ((best / 2, min(tried)), (best * 2, max(tried))) if best == edge and left]
        waiting, left = waiting[: len(tried) > 1], left - 1 if waiting else left
    _note(
        experiment,
        row.name,
        {
            "learning_rate": best,
            "by": row.select or "held-out cross-entropy",
            "tried": {f"{rate:g}": tried[rate] for rate in sorted(tried)},
            "held_out": held_out[best],
        },
    )


def _try(experiment: Experiment, row: Row, rate: float) -> tuple[float, float]:
    """Train a short run, and return what chooses its learning rate, and its held-out cross-entropy."""
    folder = experiment.out / "tune" / row.name / f"{rate:g}"
    steps, more = limits(experiment, row.name, experiment.settings.tune_share)
    overrides = [*experiment.overrides(row.name), f"optimizer.lr={rate:g}", *more]
    experiment.runner.run(experiment.training(f"tune/{row.name}-{rate:g}", folder, overrides, steps=steps))
    held_out = scoring.held_out(experiment, row.name, folder / "student", folder / "held_out")
    if row.select is None:
        return held_out, held_out
    after = json.loads((folder / "summary.json").read_text("utf-8"))["after"]
    if row.select not in after:
        raise UserError(f"row {row.name} selects by {row.select}, but the run has {', '.join(after)}")
    return float(after[row.select]), held_out


def train(experiment: Experiment) -> None:
    """Train each row at its whole budget, and score it and the teacher on held-out text."""
    own = experiment.settings
    scoring.held_out(experiment, "teacher", own.teacher, experiment.out / "scores" / "teacher" / scoring.HELD_OUT)
    experiment.runner.each(
        lambda row: _train(experiment, row), [row for row in experiment.rows.values() if not row.tune_only]
    )


def _train(experiment: Experiment, row: Row) -> None:
    folder = run_folder(experiment, row.name)
    steps, more = limits(experiment, row.name, 1)
    experiment.runner.run(experiment.training(row.name, folder, [*tuned(experiment, row.name), *more], steps=steps))
    scores = experiment.out / "scores" / row.name / scoring.HELD_OUT
    scoring.held_out(experiment, row.name, folder / "student", scores)


def tuned(experiment: Experiment, name: str) -> list[str]:
    """Return the overrides of a row with its tuned learning rate."""
    if not experiment.every[name].train:
        return experiment.overrides(name)
    tuning = experiment.read("tuning.json")
    if name not in tuning:
        raise UserError(f"the learning rate of row {name} is not tuned; add stage=tune")
    return [*experiment.overrides(name), f"optimizer.lr={tuning[name]['learning_rate']:g}"]


def run_folder(experiment: Experiment, name: str) -> Path:
    """Return the folder of a row's training at its whole budget."""
    return experiment.out / "runs" / name
