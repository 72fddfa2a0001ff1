"""The stage report: tables of what is there, with intervals, and whether a row reaches the target."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import drawing
from benchmarks.quality.curve import branch
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.runner import Command
from benchmarks.quality.scoring import HELD_OUT
from benchmarks.quality.training import seconds_per_step
from distilkit.errors import UserError
from distilkit.records import processor, read_results, write_json
from distilkit.report.frame import Scores, gather, task_label
from distilkit.report.intervals import Interval, interval
from distilkit.report.page import Table, markdown_page, print_table, tabulate

NLL, ACCURACY = "masked_cross_entropy", "masked_accuracy"
TEACHER, COSINE = "teacher", "similarity"
BASELINES = ("lm", "triple")  # which the target is to beat

Record = dict[str, Any]


def ranged(value: float | None, range_: Interval | None, form: str) -> str | None:
    """Write a value with half the width of its interval."""
    if value is None:
        return None
    return form.format(value) + (f" ± {form.format(range_.half)}" if range_ else "")


def difference(range_: Interval | None, form: str) -> str | None:
    """Write an interval of a difference."""
    return None if range_ is None else f"[{form.format(range_.low)}, {form.format(range_.high)}]"


def metric_interval(scores: Scores, rows: Sequence[str], metric: str) -> Interval | None:
    """Return the interval of a held-out metric of a row, or with two rows of the first less the second."""
    samples = [scores.samples(HELD_OUT).of(row, metric) if scores.line(row, HELD_OUT) else None for row in rows]
    known = [each for each in samples if each is not None]
    if len(known) < len(rows) or len({each.rows for each in known}) > 1:
        return None
    own: Callable[..., Any] = (lambda mine: mine) if len(rows) == 1 else (lambda mine, theirs: mine - theirs)
    return interval(own, *known)


def read_scores(experiment: Experiment) -> Scores:
    """Read all scores of teacher and rows; a UserError says if there are none."""
    folder = experiment.out / "scores"
    results = read_results([folder]) if folder.is_dir() else []
    if not results:
        raise UserError(f"{folder} has no scores yet; run the stages train and tasks first")
    scores = gather(results)
    known = set(scores.frame["row"])
    roles: dict[str, Any] = {"teacher": TEACHER, "baseline": BASELINES[0]}
    return dataclasses.replace(scores, **{role: name for role, name in roles.items() if name in known})


def records_of(experiment: Experiment, scores: Scores) -> list[Record]:
    """Return the figures of the teacher and of each row, as far as they are there, unrounded and with intervals."""
    tasks, tuning, found = list(experiment.settings.tasks), experiment.read("tuning.json"), []
    for name in [TEACHER, *(name for name, row in experiment.rows.items() if not row.tune_only)]:
        record: Record = {"row": name, **_training(experiment, name)}
        if name in tuning and experiment.every[name].train:
            record |= {key: tuning[name][key] for key in ("learning_rate", "tried", "by")}
            record |= {key: tuning[name][key] for key in ("best", "as") if key in tuning[name]}
        for metric in (NLL, ACCURACY, "agreement"):
            record[metric] = scores.metric(name, HELD_OUT, metric)
            record[f"{metric}_interval"] = metric_interval(scores, [name], metric)
        for task in (COSINE, *tasks):
            line = scores.line(name, task)
            record[task] = None if line is None else float(line.median)
            record[f"{task}_interval"] = line and scores.interval(name, [task])
        record |= {"mean": scores.mean(name, tasks), "seeds": scores.seeds([name], tasks)}
        record["mean_interval"] = record["mean"] and scores.interval(name, tasks)
        if name != TEACHER:
            record |= _compared(scores, name, tasks)
        found.append(record)
    return found


def _training(experiment: Experiment, name: str) -> Record:
    """Return tokens and hours of a row's training, and its parameters."""
    folder = experiment.out / "runs" / name
    if not (folder / "summary.json").is_file():
        return {}
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    clock, steps, spent = folder / "clock.json", summary["optimizer_steps"], 0.0
    if experiment.settings.clock == "cpu" and steps:  # of the CPU on which steps were timed, wherever they were trained
        spent = steps * seconds_per_step(experiment, name)
    elif clock.is_file():
        spent = json.loads(clock.read_text("utf-8")).get("wall_seconds", 0.0)
    names = ("optimizer_steps", "tokens_seen", "student_parameters", "layers", "machine")
    return {"hours": spent / 3600, **{key: summary.get(key) for key in names}}


def _compared(scores: Scores, name: str, tasks: Sequence[str]) -> Record:
    """Return what a row keeps of the teacher, and its differences to the baselines."""
    record: Record = {}
    for key, some in (("kept", tasks), ("kept_cosine", [COSINE])):
        known = scores.mean(name, some) is not None and scores.mean(TEACHER, some) is not None
        record[key] = scores.kept(name, *some) if known else None
        record[f"{key}_interval"] = scores.kept_interval(name, *some) if known else None
    for other in [each for each in BASELINES if each != name]:
        both = all(scores.mean(each, tasks) is not None for each in (name, other))
        record |= {
            f"nll_less_{other}": metric_interval(scores, [name, other], NLL),
            f"mean_less_{other}": scores.difference(name, other, tasks) if both and tasks else None,
        }
        pair = all(scores.line(each, COSINE) for each in (name, other))
        record[f"cosine_less_{other}"] = scores.difference(name, other, [COSINE]) if pair else None
    return record


def verdict(records: Sequence[Record]) -> str:
    """Say which rows beat both baselines, on held-out cross-entropy and on the mean of the tasks, beyond the intervals.

    The student that is only cut, without a step of training, is not judged.
    """
    reached, unknown = [], []
    rivals = [each for each in records if each["row"] not in (TEACHER, *BASELINES) and each.get("optimizer_steps") != 0]
    for record in rivals:
        pairs = [(record.get(f"nll_less_{other}"), record.get(f"mean_less_{other}")) for other in BASELINES]
        if None in [each for pair in pairs for each in pair]:
            unknown.append(record["row"])
        elif all(nll.high < 0 and mean.low > 0 for nll, mean in pairs if nll and mean):
            reached.append(record["row"])
    what = f"{' and '.join(BASELINES)}, on held-out cross-entropy and on the mean of the tasks, beyond the intervals"
    text = f"{', '.join(reached) if reached else 'No row'} beats {what}."
    return text + (f" Not known yet for {', '.join(unknown)}." if unknown else "")


def missing(experiment: Experiment, records: Sequence[Record]) -> str | None:
    """Say what is not there yet."""
    own, found = experiment.settings, []
    tasks, seeds = list(own.tasks), len(own.task_seeds)
    for record in records:
        lacks = [] if record["row"] == TEACHER or "hours" in record else ["training"]
        lacks += [] if record[NLL] is not None else ["held-out text"]
        lacks += [task_label(task) for task in [COSINE] * own.similarity + tasks if record[task] is None]
        if tasks and record["mean"] is not None and (record["seeds"] or 0) < seeds:
            lacks += [f"{seeds - record['seeds']} of {seeds} seeds"]
        found += [f"{record['row']} ({', '.join(lacks)})"] if lacks else []
    return f"Partial results; missing are {'; '.join(found)}." if found else None


def tables(experiment: Experiment, records: Sequence[Record]) -> list[Table]:
    """Build the tables of trainings, of tasks and of differences."""
    own, cells = experiment.settings, []
    for record in records:
        tried = f" of {len(record['tried'])}" if record.get("tried") and "as" not in record else ""
        like = {key: f"as {record[key]}" for key in ("best", "as") if key in record}
        cell = {
            "row": record["row"] + (f" ({like['best'].removeprefix('as ')})" if "best" in like else ""),
            "tokens": record.get("tokens_seen") and f"{record['tokens_seen'] / 1e6:.2f} M",
            "hours": f"{record['hours']:.2f}" if "hours" in record else None,
            "rate": f"{record['learning_rate']:g}{tried}" if "learning_rate" in record else None,
            "nll": ranged(record[NLL], record[f"{NLL}_interval"], "{:.3f}"),
            "accuracy": ranged(_percent(record[ACCURACY]), _points(record[f"{ACCURACY}_interval"]), "{:.1f}"),
            "agreement": None if record["row"] == TEACHER else ranged(_percent(record["agreement"]), None, "{:.1f}"),
        }
        for task in (COSINE, *own.tasks, "mean"):
            cell[task] = ranged(_percent(record[task]), _points(record[f"{task}_interval"]), "{:.1f}")
        cell |= {
            key: ranged(record.get(key), record.get(f"{key}_interval"), "{:.1f}") for key in ("kept", "kept_cosine")
        }
        for other in BASELINES:
            cell[f"nll_{other}"] = difference(record.get(f"nll_less_{other}"), "{:+.3f}")
            for key in ("mean", "cosine"):
                cell[f"{key}_{other}"] = difference(_points(record.get(f"{key}_less_{other}")), "{:+.1f}")
        cells.append(cell)
    clock = "core-hours" if own.clock == "cpu" else "hours"
    words = "masked " if experiment.lm == "mlm" else ""
    training = {"row": "{}", "tokens": "{}", "hours": f"{clock} {{}}", "rate": "learning rate {}"}
    training |= {"nll": "cross-entropy {}", "accuracy": f"{words}accuracy {{}}", "agreement": "{}"}
    labels = {task: f"{task_label(task)} {{}}" for task in (COSINE, *own.tasks)}
    scored = {
        "row": "{}",
        **labels,
        "mean": "mean of tasks {}",
        "kept": "kept, % {}",
        "kept_cosine": "cosine kept, % {}",
    }
    against = {f"{key}_{other}": f"{label} less {other} {{}}" for other in BASELINES for key, label in _DIFFERENCES}
    about = [
        "Held-out cross-entropy in nats, accuracy and agreement with the teacher in percent, on the same blocks and masks.",
        "The learning rate is the best of those that were tried by short runs.",
    ]
    columns = {"training": training, "tasks": scored, "differences": {"row": "{}", **against}}
    titles = {"training": "Training and held-out text", "tasks": "Tasks", "differences": "Differences to the baselines"}
    seeds = f"{len(own.task_seeds)} seed{'s' * (len(own.task_seeds) != 1)}"
    notes = {
        "training": about,
        "tasks": [f"Percent; medians of {seeds}. ±: half of a 95 % interval, over rows and seeds."],
        "differences": ["95 % intervals: nats for the cross-entropy, points for the tasks. Paired by blocks or rows."],
    }
    filled = {key for cell in cells for key, value in cell.items() if value is not None}
    built = []
    for name, every in columns.items():
        shown = {key: column for key, column in every.items() if key in filled}
        if len(shown) > 1 and (
            table := tabulate(name, titles[name], records, shown, *notes[name], cells=cells[name == "differences" :])
        ):  # the teacher is first
            built.append(table)
    return built


_DIFFERENCES = (("nll", "cross-entropy"), ("mean", "mean of tasks"), ("cosine", "cosine"))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _points(range_: Interval | None) -> Interval | None:
    return None if range_ is None else Interval(100 * range_.low, 100 * range_.high)


def curve_records(experiment: Experiment) -> list[Record]:
    """Return the figures of each point of the curve that is there, with their shares of the teacher's."""
    found = []
    for name in experiment.settings.curve_rows:
        for tokens in sorted(experiment.settings.curve):
            folder = branch(experiment, name, tokens)
            if not (folder / "scores" / HELD_OUT).is_dir():
                continue
            both = [*read_results([folder / "scores"]), *read_results([experiment.out / "scores" / TEACHER])]
            scores = dataclasses.replace(gather(both), teacher=TEACHER)
            summary = json.loads((folder / "summary.json").read_text("utf-8"))
            record: Record = {"row": name, "tokens": summary["tokens_seen"], NLL: scores.metric(name, HELD_OUT, NLL)}
            mine, theirs = (scores.metric(row, HELD_OUT, ACCURACY) for row in (name, TEACHER))
            record["kept_accuracy"] = 100 * mine / theirs if mine is not None and theirs else None
            cosine = scores.line(name, COSINE)
            record["kept_cosine"] = scores.kept(name, COSINE) if cosine else None
            record["kept_cosine_interval"] = scores.kept_interval(name, COSINE) if cosine else None
            record |= {"nll_interval": metric_interval(scores, [name], NLL), COSINE: cosine and float(cosine.median)}
            found.append(record)
    return found


def curve_table(records: Sequence[Record]) -> Table | None:
    """Build the table of the curve."""
    cells = [
        {
            "row": record["row"],
            "tokens": f"{record['tokens'] / 1e6:.2f} M",
            "nll": ranged(record[NLL], record["nll_interval"], "{:.3f}"),
            "kept_accuracy": ranged(record["kept_accuracy"], None, "{:.1f}"),
            "kept_cosine": ranged(record["kept_cosine"], record["kept_cosine_interval"], "{:.1f}"),
        }
        for record in records
    ]
    columns = {"row": "{}", "tokens": "{}", "nll": "cross-entropy {}", "kept_accuracy": "accuracy kept, % {}"}
    columns |= {"kept_cosine": "STS-B by cosine kept, % {}"}
    note = "One run at a constant learning rate, decayed to zero at each point; ±: half of a 95 % interval."
    return tabulate("curve", "What is kept after so many tokens", records, columns, note, cells=cells)


def report(experiment: Experiment) -> Path:
    """Write table.md, table.json and the plots, and the report of ``distilkit.report``; return table.md."""
    own, scores = experiment.settings, read_scores(experiment)
    records, curve = records_of(experiment, scores), curve_records(experiment)
    built = [*tables(experiment, records), *([table] if (table := curve_table(curve)) else [])]
    for table in built:
        print_table(table.title, table.header, table.rows)
    lines = [verdict(records), *([partial] if (partial := missing(experiment, records)) else [])]
    print(*lines, sep="\n")
    about = f"Teacher {own.teacher}; {own.budget} a row by clock={own.clock}; "
    machines = sorted({record["machine"] for record in records if record.get("machine")})
    about += f"{own.threads} thread{'s' * (own.threads != 1)} of " if own.trainer == "cpu" else ""
    about += f"{', '.join(machines) or processor('cpu')}; {own.precision}; "
    about += f"seed {own.seed} of trainings, {', '.join(map(str, own.task_seeds))} of tasks."
    write_json(experiment.out / "table.json", {"rows": records, "curve": curve})
    file = experiment.out / "table.md"
    file.write_text(markdown_page("Quality", about, [*lines, *built]), "utf-8")
    (experiment.out / "rows.png").write_bytes(drawing.draw_rows(records, own.tasks))
    if curve:
        (experiment.out / "curve.png").write_bytes(drawing.draw_curve(curve, records))
    runs = [str(experiment.out / name) for name in ("scores", "runs") if (experiment.out / name).is_dir()]
    roles = [f"{role}={name}" for role, name in (("teacher", scores.teacher), ("baseline", scores.baseline)) if name]
    page = experiment.out / "report"
    own_report = [f"runs=[{','.join(runs)}]", *roles, f"out={page}"]
    (page / "report.md").unlink(missing_ok=True)
    done = (page / "report.md").is_file
    experiment.runner.run(Command(name="report", module="distilkit.report", arguments=own_report, done=done))
    return file
