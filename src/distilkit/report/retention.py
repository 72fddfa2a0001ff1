"""What each model keeps of its teacher: percent of the teacher's score, with intervals, and what they show."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from distilkit.report.ablation import ablation_row
from distilkit.report.drawing import COLOURS, WIDTH, finish, plain, png
from distilkit.report.frame import Scores, task_label
from distilkit.report.intervals import Interval, ends
from distilkit.report.page import Plot, Table, figure, tabulate
from distilkit.report.quality import first_average, plus_minus, task_header
from distilkit.report.samples import fidelity

MAX_ROWS = 7  # of one task: COLOURS has as many colours and the baseline's

_PERCENT = "{:.1f}"

Kept = dict[str, dict[str, tuple[float | None, Interval | None]]]


def _kept(scores: Scores, averages: Mapping[str, Sequence[str]]) -> Kept:
    """Return the percentages that rows keep: of the averages, then of the teacher's tasks; empty rows are left out."""
    shares = {**averages, **{task: (task,) for task in scores.of(scores.teacher)}}
    rows = [row for row in scores.rows if row != scores.teacher]
    both = {
        row: {name: (scores.kept(row, *t), scores.kept_interval(row, *t)) for name, t in shares.items()} for row in rows
    }
    return {row: each for row, each in both.items() if any(value is not None for value, _ in each.values())}


def summary_table(scores: Scores) -> Table | None:
    """Build the narrow table of the first average: each row's score, what it keeps, and its difference to the teacher."""
    label, tasks = first_average(scores)
    rows = [row for row in scores.rows if scores.mean(row, tasks) is not None]
    if len(rows) < 2 or scores.teacher not in rows or not scores.line(rows[0], tasks[0]).share:
        return None
    records, cells, every = [], [], _kept(scores, {label: tasks})
    for row in rows:
        mean, own = scores.mean(row, tasks), scores.interval(row, tasks)
        kept, share = every.get(row, {}).get(label, (None, None))
        comparable = row != scores.teacher and not scores.unlike(row, *tasks)
        less = scores.difference(row, scores.teacher, tasks) if comparable else None
        record = {"model": row, "score": mean, **ends(own), "kept": kept}
        sides = {"kept": share, "less": less}
        records.append(record | {f"{name}_{end}": x for name, each in sides.items() for end, x in ends(each).items()})
        texts = {"score": plus_minus(mean, own), "kept": plus_minus(kept, share, form=_PERCENT)}
        cells.append({"model": scores.label(row), **texts, "less": _points(less, 100)})
    columns = {
        "model": "{}",
        "score": f"{task_label(label)} {{}}",
        "kept": "kept, % {}",
        "less": "minus the teacher {}",
    }
    note = f"{task_label(label)}, in percent; kept of {scores.teacher}; ± and brackets: 95 % intervals, in points."
    note += " With 1 seed they are over rows alone." if scores.seeds(rows, tasks) == 1 else ""
    return tabulate("summary", "Summary", records, columns, note, *verdicts(scores), cells=cells)


def _points(range_: Interval | None, unit: float = 1) -> str:
    return "-" if range_ is None else f"[{unit * range_.low:+.1f}, {unit * range_.high:+.1f}]"


def retention_table(scores: Scores) -> Table | None:
    """Build the table of what each row keeps of the teacher on each task and on average, in percent."""
    kept = _kept(scores, scores.columns)
    rows = [[scores.label(row), *(plus_minus(*x, form=_PERCENT) for x in own.values())] for row, own in kept.items()]
    found = [(row, task, *each) for row, values in kept.items() for task, each in values.items() if each[0] is not None]
    about = {"teacher": scores.teacher}
    records = [{"model": row, **about, "task": task, "percent": x, **ends(range_)} for row, task, x, range_ in found]
    if not rows:
        return None
    first = f"Percent of the score of {scores.teacher}; for a perplexity the teacher's divided by the student's."
    first += " On average: the ratio of the averages, as in the paper." if scores.columns else ""
    header = ["model", *scores.columns, *(task_header(scores, task) for task in scores.of(scores.teacher))]
    notes, title = (
        [first, *_uncompared(scores), *_at_chance(scores), *_protocols(scores)],
        "What is kept of the teacher",
    )
    return Table(name="retention", title=title, header=header, rows=rows, records=records, notes=notes)


def _at_chance(scores: Scores) -> Iterator[str]:
    """Describe where the teacher or a student is not shown to be above the commonest class or no correlation."""
    low = {row: [task_label(task) for task in scores.of(row) if scores.at_chance(row, [task])] for row in scores.rows}
    if any(low.values()):
        where = "; ".join(f"{row} on {', '.join(names)}" for row, names in low.items() if names)
        so = f" Nothing is kept of {scores.teacher} there." if low.get(scores.teacher or "") else ""
        yield f"Not shown to be above the majority class or no correlation: {where}.{so}"


def _protocols(scores: Scores) -> Iterator[str]:
    """Describe which settings of fine-tuning differ from the teacher's, once for each row."""
    for row in [row for row in scores.rows if row != scores.teacher]:
        tasks = [task for task, line in scores.of(row).items() if line.kind != "language_model"]
        if differing := scores.unlike(row, *tasks):
            pairs = ", ".join(f"{name} ({one}, not {other})" for name, (one, other) in differing.items())
            yield f"{row} was fine-tuned or scored differently from {scores.teacher}: {pairs}."


def verdicts(scores: Scores) -> list[str]:
    """Describe whether each student keeps more than the baseline, over the first average or task that both have."""
    teacher, baseline, lines = scores.teacher, scores.baseline, []
    if teacher is None or baseline is None:
        return []
    for row in [row for row in scores.rows if row not in (teacher, baseline)]:
        three = scores.only(teacher, row, baseline)
        averages = {**three.averages(row), **{task: (task,) for task in three.tasks}}
        pairs = {name: (three.kept(row, *tasks), three.kept(baseline, *tasks)) for name, tasks in averages.items()}
        found = ((name, kept, base) for name, (kept, base) in pairs.items() if kept is not None and base is not None)
        for name, kept, base in [each for each in found if not np.isnan(each[1] + each[2])][:1]:
            where = "the GLUE average" if name == "GLUE average" else task_label(name)
            theirs = f"{baseline}, which was trained without a teacher, {base:.1f} %"
            lines.append(
                f"On {where} {row} keeps {kept:.1f} % of {teacher}, and {theirs}: {_shown(three, row, averages[name])}."
            )
    return lines


def _shown(scores: Scores, row: str, tasks: Sequence[str]) -> str:
    """Return what the interval of the difference to the baseline shows, or why there is no verdict."""
    if differing := scores.unlike(row, *tasks, other=scores.baseline) | scores.unlike(row, *tasks):
        return f"no verdict, because they were fine-tuned or scored differently ({', '.join(differing)})"
    more = scores.kept_interval(row, *tasks, less=scores.baseline)
    if more is None:
        return "no verdict, because there are no rows files of the same rows"
    seeds = scores.seeds([scores.teacher, row, scores.baseline], tasks)
    number = "" if seeds is None else f" ({seeds} seed{'s' * (seeds != 1)})"
    if more.holds(0):
        return f"no difference shown, {_points(more)} points{number}"
    if seeds == 1:
        return f"{_points(more)} points over rows, but no verdict, because 1 seed does not tell how seeds spread"
    return f"{row if more.low > 0 else scores.baseline} keeps more, {_points(more)} points{number}"


def _uncompared(scores: Scores) -> list[str]:
    """Describe which rows cannot be compared with the teacher on a task, and why."""
    notes, teacher = [], scores.teacher
    for score in scores.frame[scores.frame["metric"] == ""].itertuples(index=False):
        where = f"{score.row} on {task_label(score.task)}"
        differing = scores.unlike(score.row, score.task) if score.kind == "language_model" else {}
        pairs = (f"{name} ({one}, not {other})" for name, (one, other) in differing.items())
        if differing and scores.kept(score.row, score.task) is not None:
            notes.append(f"{where}: by the perplexity per word, because its tokenizer is not that of {teacher}.")
        elif differing:
            notes.append(f"{where} is not compared, because it differs from {teacher} in {', '.join(pairs)}.")
        elif score.row.startswith(f"{teacher} (") and scores.line(teacher, score.task) is None:
            why = f"Without held-out scores none of them is chosen; set teacher={score.row!r} or remove the others."
            notes.append(f"{score.row} is one of several settings of {teacher} on {task_label(score.task)}. {why}")
    return notes


def nothing_kept(scores: Scores) -> str | None:
    """Describe why there is no table although the teacher and other rows are known."""
    if scores.teacher is None or all(row == scores.teacher for row in scores.rows):
        return None
    why = [*_uncompared(scores), *_at_chance(scores)]
    why = why or ["No other row has a score on a task on which the teacher has one above zero."]
    return " ".join([f"What is kept of {scores.teacher} is left out.", *why])


def fidelity_table(scores: Scores) -> Table | None:
    """Build the table of how often each row says the same as the teacher, and of its KL divergence from the teacher."""
    records, cells = [], []
    for row in [row for row in scores.rows if row != scores.teacher]:
        pairs = [(task, line, scores.line(scores.teacher, task)) for task, line in scores.of(row).items()]
        found = {task: own for task, line, other in pairs if other is not None and (own := fidelity(line, other))}
        records += [{"model": row, "task": task, **own} for task, own in found.items()]
        texts = {
            task: figure(own.get("agreement"), "{:.1%}").rstrip("%") + (f" ({own['kl']:.3f})" if "kl" in own else "")
            for task, own in found.items()
        }
        cells += [{"model": scores.label(row), **texts}] if texts else []
    tasks = [task for task in scores.tasks if any(task in each for each in cells)]
    columns = {"model": "{}"} | {task: f"{task_label(task)} {{}}" for task in tasks}
    note = f"Percent of rows of which {scores.teacher} says the same class (KL divergence from it in nats), medians of seeds."
    return tabulate("fidelity", "Agreement with the teacher", records, columns, note, cells=cells)


def retention_plot(scores: Scores) -> Plot | None:
    """Plot what each row keeps with intervals, the baseline last, an ablation's rows only without others."""
    kept = _kept(scores, dict(list(scores.columns.items())[:1]))
    ours = [row for row in kept if ablation_row(row) is None] or list(kept)
    if not ours:
        return None
    last = [row for row in ours if row == scores.baseline]  # always has room
    drawn = [*[row for row in ours if row not in last][: MAX_ROWS - len(last)], *last]
    names = [name for name in kept[ours[0]] if any(kept[row][name][0] is not None for row in drawn)]
    step, sides = len(drawn) + 1, [100.0]
    picture = Figure(figsize=(WIDTH, 1.7 + 0.13 * len(names) * step), layout="constrained")
    axis = picture.subplots()
    for index, row in enumerate(drawn):
        found = {place * step + index: kept[row][name] for place, name in enumerate(names)}
        points = {y: (value, range_ or (value, value)) for y, (value, range_) in found.items() if value is not None}
        colour = COLOURS[7 if row == scores.baseline else index]
        axis.plot(
            [x for x, _ in points.values()], [*points], "o", color=colour, markersize=5, label=plain(scores.label(row))
        )
        for y, (_, (low, high)) in points.items():
            axis.hlines(y, low, high, color=colour, linewidth=1.5)
            sides += [low, high]
    axis.axvline(
        100, color="black", linestyle="--", linewidth=1, label=plain(scores.label(scores.teacher or "")), zorder=0
    )
    axis.set_yticks(
        [place * step + step / 2 - 1 for place in range(len(names))], [plain(task_label(name)) for name in names]
    )
    pad = 0.03 * (max(sides) - min(sides) + 1)
    axis.set(xlabel="share of the teacher's score (%)", xlim=(min(sides) - pad, max(sides) + pad))
    axis.set_ylim(len(names) * step - 0.5, -1)
    finish(axis)
    axis.grid(visible=False, axis="y")
    picture.legend(loc="outside upper center", ncols=2, frameon=False)
    left_out = f" {MAX_ROWS} of {len(ours)} rows." if len(ours) > MAX_ROWS else ""
    caption = f"What is kept of {scores.teacher} on each task, with 95 % intervals.{left_out}"
    return Plot(name="retention", caption=caption, png=png(picture))
