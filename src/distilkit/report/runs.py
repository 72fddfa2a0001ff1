"""The training runs: how each was trained, its loss curve, what scoring cost, and the comparison of a sweep."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter
from omegaconf import DictConfig, OmegaConf

from distilkit.cli import all_failures, quiet
from distilkit.records import read_metrics, read_results, read_runs, write_json
from distilkit.report.ablation import Run
from distilkit.report.drawing import COLOURS, WIDTH, finish, plain, png
from distilkit.report.frame import Scores, gather, task_label
from distilkit.report.page import Plot, Table, markdown, markdown_table, print_table, tabulate
from distilkit.report.versus import equal_rows, task_columns, training_seconds, with_teacher

_REACHED = ("nll", "teacher_nll", "accuracy", "agreement")  # of a training run, on held-out documents


def teacher_label(teacher: Mapping[str, Any] | None) -> str:
    """Name a run's teacher: the student of another run by that run's folder, any other by its name."""
    path = PurePath(str(teacher["name"]) if teacher else "none")
    return path.parent.name if path.name == "student" and path.parent.name else str(path)


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return unique names of runs: their labels, with several sweeps also the run's name and the sweep's folder."""
    labels = [str(run["label"]) for run in runs]
    if len(set(labels)) < len(runs):
        labels = [f"{run.get('name')}: {run['label']}" for run in runs]
    if len(set(labels)) < len(runs):
        labels = [f"{run.get('name')}: {run['label']} ({PurePath(run['folder']).parent.name})" for run in runs]
    return labels


def _layers(run: Run) -> str:
    """Return the teacher's layers that a student began with, or whether its config asked for fresh weights."""
    if run.get("layers") is not None:
        return " ".join(map(str, run["layers"]))
    file = Path(run["folder"]) / ".hydra" / "config.yaml"
    student = OmegaConf.select(OmegaConf.load(file), "student", default={}) if file.is_file() else {}
    fresh = student.get("init") == "random" or str(student.get("_target_")).endswith(".new_student")
    return "random init" if fresh else "-"


def training_table(runs: Sequence[Run], scores: Scores) -> Table | None:
    """Build the table of how each student was trained, at what cost, and what it reached, the best one first."""
    given, runs = runs, sorted(runs, key=lambda run: run["after"].get("val/nll", math.inf))
    columns = {"run": "{}", **dict.fromkeys(("before", "after"), "{:.3f}"), "teacher_cross_entropy": "teacher's {:.3f}"}
    columns |= {"accuracy": "{:.3f}", "agreement": "{:.3f}"}
    columns |= {"teacher": "{}", "layers": "{}", "tokens": "{:,}", "hours": "{:.2f}"}
    columns |= {"tokens_per_second": "tokens/s {:,.0f}", "objective": "{}"}
    records, (tasks, reached) = [], task_columns(scores, runs)
    for label, run, own in zip(run_labels(runs), runs, reached, strict=True):
        untrained = run.get("optimizer_steps") == 0  # as it was cut
        objective = {} if untrained else run.get("objective") or {}
        terms = [f"{name.removeprefix('alpha_')} {value}" for name, value in objective.items()]
        read = any(objective.get(f"alpha_{name}") for name in ("ce", "cos", "mse", "rel"))
        taught = (not objective or read) and not untrained
        seconds = training_seconds(run)
        hours = None if seconds is None else seconds / 3600
        memory = max((run.get("peak_memory_mb") or {}).values(), default=None)
        values = [label, run["before"].get("val/nll"), *(run["after"].get(f"val/{name}") for name in _REACHED)]
        values += [teacher_label(run.get("teacher") if taught else None), _layers(run), run["tokens_seen"], hours]
        record = dict(zip(columns, [*values, run.get("tokens_per_second"), ", ".join(terms) or "-"], strict=True))
        more = {"parameters": run["student_parameters"], "peak_memory_mb": memory, "folder": run["folder"]}
        records.append(record | more | own)
    note = (
        "The best run stands first. Before, after and teacher's: cross-entropy in nats per labelled token on held-out "
        "documents. Agreement: share of labelled tokens for which student and teacher predict the same. Hours are of "
        "training without validation."
    )
    sweeps = itertools.groupby(given, key=lambda run: PurePath(run["folder"]).parent)
    said = {folder: lines for folder, sweep in sweeps if (lines := equal_rows([*sweep], scores))}
    of_each = [line for lines in said.values() for line in lines]
    if len(said) > 1:  # whose scores on tasks are whose is not known
        of_each = [f"{folder.name}: {line}" for folder, lines in said.items() for line in lines[:-1]]
    return tabulate("training", "Training runs", records, columns | tasks, note, *of_each)


def cost_table(scores: Scores) -> Table | None:
    """Build the table of what fine-tuning and scoring took: tokens and hours over all seeds and settings."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for each in scores.results.itertuples(index=False):
        if each.cost:
            groups.setdefault((each.row, each.task, str(each.cost.get("machine", "-"))), []).append(each.cost)
    records: list[dict[str, Any]] = []
    for (model, task, machine), costs in groups.items():
        days = sorted(str(cost.get("date", "-"))[:10] for cost in costs)
        versions = dict.fromkeys(", ".join(map(" ".join, cost.get("versions", {}).items())) for cost in costs)
        record = {
            "model": model,
            "task": task,
            "results": len(costs),
            "tokens": sum(x.get("tokens") or 0 for x in costs),
        }
        record |= {"hours": sum((cost.get("seconds") or 0) / 3600 for cost in costs), "machine": machine}
        dates = " to ".join(dict.fromkeys((days[0], days[-1])))
        records.append(record | {"dates": dates, "versions": "; ".join(versions)})
    tokens, hours = (sum(each[name] for each in records) for name in ("tokens", "hours"))
    columns = {"model": "{}", "task": "{}", "results": "{}", "tokens": "{:,}", "hours": "{:.2f}"}
    columns |= {"machine": "{}", "dates": "date {}"}
    notes = [f"All seeds and settings together: {tokens:,} tokens in {hours:.2f} hours."]
    notes += [f"Versions: {each}." for each in dict.fromkeys(each["versions"] for each in records)]
    cells = [{**each, "task": task_label(each["task"])} for each in records]
    return tabulate("cost", "Cost of fine-tuning and scoring", records, columns, *notes, cells=cells, folded=True)


def _curves(run: Run, axis: str) -> dict[str, list[tuple[float, float]]]:
    """Read the held-out cross-entropy of a run and of its teacher over ``tokens`` or ``hours`` of training.

    Where a run has not logged these, they grow evenly with its steps.
    """
    file = Path(run["folder"]) / "metrics.csv"
    metrics = read_metrics(file) if file.is_file() else {}
    end = run["tokens_seen"] if axis == "tokens" else (training_seconds(run) or 0.0) / 3600
    per_step, known = end / max(1, run.get("optimizer_steps") or 1), dict(metrics.get(f"progress/{axis}", ()))
    names = [name for name in ("val/nll", "val/teacher_nll") if name in metrics]
    return {name: [(known.get(step, step * per_step), value) for step, value in metrics[name]] for name in names}


def loss_plot(runs: Sequence[Run]) -> Plot | None:
    """Plot the held-out cross-entropy of all runs over tokens and time, and that of their teachers as dashed lines."""
    read = {x: zip(run_labels(runs), [_curves(run, x) for run in runs], strict=True) for x in ("tokens", "hours")}
    curves = {x: {label: each for label, each in own if "val/nll" in each} for x, own in read.items()}
    last = max((points[-1][0] for own in curves["hours"].values() for points in own.values()), default=0.0)
    if not curves["tokens"]:
        return None
    panels = ["tokens", "hours"] if last else ["tokens"]
    figure = Figure(figsize=(WIDTH, 3.4 * len(panels) + 0.8 + 0.15 * len(curves["tokens"])), layout="constrained")
    for x, axis in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
        unit, size = ("minutes", 60.0) if x == "hours" and last < 2 else (x, 1.0)
        for index, (label, found) in enumerate(curves[x].items()):
            row, column = divmod(index, len(COLOURS))
            places, values = zip(*found["val/nll"], strict=True)
            short = plain(re.sub(r"(?:\w+\.)+(?=\w+=)", "", label), width=60)  # keys without their groups
            look: Any = {"color": COLOURS[column], "markersize": 4, "label": short}
            axis.plot([size * place for place in places], values, ("-o", "--o", "-.o", ":o")[row % 4], **look)
        levels = {round(each["val/teacher_nll"][-1][1], 3) for each in curves[x].values() if "val/teacher_nll" in each}
        for index, level in enumerate(sorted(levels)):
            axis.axhline(level, color="gray", linestyle="--", linewidth=1, label=None if index else "a teacher")
        axis.set(xlabel=f"{unit} of training", ylabel="held-out cross-entropy (nats)")
        axis.xaxis.set_major_formatter(EngFormatter(sep="") if x == "tokens" else ScalarFormatter())
        finish(axis)
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = 1 if max(map(len, names)) > 26 else 2
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    caption = "Held-out cross-entropy of each training run over tokens, and over time without validation."
    return Plot(name="held_out_loss", caption=caption, png=png(figure))


def measure_latency(folders: Sequence[str], *, block_size: int, rounds: int = 15) -> list[float]:
    """Time one forward pass of one block on this CPU for each model, in turn; return the medians in milliseconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    from distilkit.language_model import lm_of
    from distilkit.timing import latency, seconds_in_turn

    models = []
    for folder in folders:
        config = AutoConfig.from_pretrained(folder)
        causal = lm_of(config.model_type, config.architectures) == "clm"
        models.append((AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_pretrained(folder).eval())
    ids = torch.randint(10, min(model.config.vocab_size for model in models), (1, block_size))
    with torch.inference_mode():
        passes = [[partial(model, input_ids=ids)] for model in models]
        return [latency(seconds)["latency_ms"] for seconds in seconds_in_turn(passes, warm_up=3, rounds=rounds)]


def comparison_table(runs: Sequence[Run], scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the comparison of a sweep's runs; columns that no run fills are left out.

    The teacher is a row too, where all runs have the same one.
    """
    runs = with_teacher(runs)
    seconds = [training_seconds(run) for run in runs]
    unit, size = ("hours", 3600) if max((each or 0 for each in seconds), default=0) > 7200 else ("minutes", 60)
    columns = {"label": "run {}", "student_parameters": "parameters {:,.0f}", "tokens_seen": "{:,.0f}"}
    columns |= {"tokens_per_second": "tokens/s {:,.0f}", "time": f"{unit} {{:.2f}}", "val/nll": "cross-entropy {:.3f}"}
    columns |= {"val/accuracy": "accuracy {:.3f}", "val/agreement": "agreement {:.3f}"}
    columns |= {"before": "untrained {:.3f}", "latency_ms": "latency ms {:.1f}"}
    tasks, reached = task_columns(scores, runs)
    columns |= tasks
    records = [{**run["after"], **run, "before": run["before"].get("val/nll")} for run in runs]
    for record, each, own in zip(records, seconds, reached, strict=True):
        record |= {"time": None if each is None else each / size, **own}
    filled = {"label"} | {key for record in records for key, value in record.items() if value is not None}
    columns = {key: form for key, form in columns.items() if key in filled}
    table = tabulate("comparison", "Comparison", records, columns)
    return (table.header, table.rows) if table else (["run"], [])


def plot_runs(runs: Sequence[Run], out: Path) -> None:
    """Plot the held-out cross-entropy and accuracy of each scored run as bars."""
    runs = [run for run in runs if {"val/nll", "val/accuracy"} <= run["after"].keys()]
    if not runs:
        return
    labels = [plain(str(run["label"])) for run in runs]
    colours = ["tab:gray" if label == "teacher" else "tab:blue" for label in labels]
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(runs)), layout="constrained")
    titles = {"val/nll": "cross-entropy (nats per token), lower is better"}
    titles |= {"val/accuracy": "accuracy at labelled tokens, higher is better"}
    for axis, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axis.bar_label(axis.barh(labels, [run["after"][key] for run in runs], color=colours), fmt="%.3f", padding=3)
        axis.margins(x=0.15)
        axis.set(xlabel=title, xlim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle("held-out documents after training")
    figure.savefig(out, dpi=120)


def compare(sweep: Path, *, latency: bool, failed: Sequence[str] = (), wandb: Mapping[str, Any] | None = None) -> None:
    """Print the table of a sweep, and write comparison.json, .md and .png into its folder; ``failed`` are its notes.

    Scores of the sweep's students on tasks, which lie in its folder ``scores``, join the table. Table and plot also go to
    a run of Weights & Biases in the sweep's group, of which ``wandb`` has the settings.
    """
    notes = "".join(f"\n{markdown(failure)}\n" for failure in failed)
    runs = read_runs(sweep)
    if not runs:
        if notes:
            (sweep / "comparison.md").write_text(notes.lstrip(), "utf-8")
        return
    if latency:
        block_size = min(int(run["block_size"]) for run in runs)
        with quiet():
            measured = measure_latency([f"{run['folder']}/student" for run in runs], block_size=block_size)
        runs = [{**run, "latency_ms": milliseconds} for run, milliseconds in zip(runs, measured, strict=True)]
    scores = gather(read_results([sweep / "scores"]) if (sweep / "scores").is_dir() else [])
    if "teacher" in scores.rows:
        scores = dataclasses.replace(scores, teacher="teacher")
    header, rows = comparison_table(runs, scores)
    said = equal_rows(runs, scores)
    # A table of few runs fits better on its side.
    first, *others = [header, *rows] if len(rows) > len(header) else zip(header, *rows, strict=True)
    print_table(f"runs of {sweep.name}, on held-out documents", first, others)
    print(*said, sep="\n", end="\n" * bool(said))
    write_json(sweep / "comparison.json", {"runs": runs, "failed": list(failed), "verdict": said})
    about = "".join(f"\n{markdown(line)}\n" for line in said)
    (sweep / "comparison.md").write_text(markdown_table(header, rows) + about + notes, "utf-8")
    plot_runs(with_teacher(runs), sweep / "comparison.png")
    folders = [f"{run['label']}: {run['folder']}/student" for run in runs]
    print(f"table and plot: {sweep / 'comparison'}.md, .json, .png", *folders, sep="\n")
    if wandb:
        from distilkit.watch.tracking import wandb_logger  # imports wandb and Lightning

        own = {key: wandb[key] for key in wandb if key not in ("_target_", "save_dir", "name", "id", "log_model")}
        group, name = own.pop("group", None) or sweep.name, f"comparison {sweep.name}"
        logger = wandb_logger(save_dir=str(sweep.resolve()), name=name, group=group, job_type="comparison", **own)
        logger.log_table("comparison", columns=header, data=rows)
        if (sweep / "comparison.png").is_file():
            logger.log_image("comparison_plot", [str(sweep / "comparison.png")])
        logger.experiment.finish()


@dataclass(kw_only=True)
class SweepReport(Callback):
    """Hydra callback: compare the runs of a sweep when it has ended, with each student's latency if asked."""

    measure_latency: bool

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the comparison."""
        logger = OmegaConf.select(config, "logger.wandb")
        folder, failed = Path(config.hydra.sweep.dir), all_failures()
        compare(folder, latency=self.measure_latency, failed=failed, wandb=logger)
