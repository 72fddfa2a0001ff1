"""The report over scored models and training runs: ``python -m distilkit.report``."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath

import hydra
from omegaconf import DictConfig, ListConfig

from distilkit.cli import check_added, explain_keys, report_errors
from distilkit.errors import UserError
from distilkit.records import Result, distinct, find_runs, processor, read_results
from distilkit.report import ablation, published, quality, retention, runs, settings, speed
from distilkit.report.ablation import Run
from distilkit.report.frame import Scores, gather
from distilkit.report.page import Block, Plot, Table, html_page, markdown_page, write_csv

_NAMES = (  # of the tables and plots that a report may have written
    *("summary", "quality", "retention", "published", "each_metric", "speed", "speed_*", "published_speed", "ablation"),
    *("training", "cost", "fidelity", "finetuning"),
    *("quality_parameters", "quality_latency", "held_out_loss", "settings_*"),
)


def find_teacher(scores: Scores, trained: Sequence[Run]) -> list[str]:
    """List the rows that a run or a second distillation calls its teacher, by name, folder or weights' hash."""
    teachers = [each for each in (*(run.get("teacher") for run in trained), *scores.results["teacher"]) if each]
    named = [str(each["name"]) for each in teachers if "name" in each]
    known = {"teacher", *named, *(runs.teacher_label({"name": name}) for name in named)}
    # A fine-tuned teacher lies in <row>/<task>/<seed>/model.
    known |= {PurePath(name).parts[-4] for name in named if PurePath(name).match("*/*/*/model")}
    known |= {each["sha256"] for each in teachers if each.get("sha256")}
    results = [each for each in scores.results.itertuples(index=False) if each.teacher is None]
    names = [(each.row, {each.name, each.model, each.sha256, each.details.get("weights_sha256")}) for each in results]
    return list(dict.fromkeys(row for row, own in names if known & own))


def assign_roles(
    scores: Scores, trained: Sequence[Run], *, teacher: str | None, baseline: str | None
) -> tuple[Scores, list[str]]:
    """Set the rows of the teacher and the baseline, and return a note if the teacher is not known."""
    rows = list(dict.fromkeys([*scores.results["row"], *scores.frame["row"]]))
    for key, name in (("teacher", teacher), ("baseline", baseline)):
        if name is not None and name not in rows:
            known = ", ".join(rows) or "none, because no results.json was found"
            raise UserError(f"{key}={name!r} is no row of the report; its rows are {known}")
    if teacher is not None and teacher == baseline:
        raise UserError(f"teacher and baseline are both {teacher!r}; the baseline is the student without distillation")
    notes = []
    if teacher is None and rows:
        some = [row for row in find_teacher(scores, trained) if row != baseline]
        why = f"{len(some)} rows may be the teacher ({', '.join(some)})" if some else "no row is known as the teacher"
        if len(some) == 1:
            teacher = some[0]
        else:
            notes = [f"What is kept of the teacher is left out: {why}; set teacher=<one of {', '.join(rows)}>."]
    return dataclasses.replace(scores, teacher=teacher, baseline=baseline), notes


def sections(scores: Scores, trained: Sequence[Run]) -> list[Block]:
    """Return the report's tables and plots in their order, without the empty ones."""
    blocks = [
        *(retention.summary_table(scores), retention.retention_table(scores) or retention.nothing_kept(scores)),
        *(quality.quality_table(scores), retention.retention_plot(scores), quality.size_plot(scores)),
        *(retention.fidelity_table(scores), *speed.speed_tables(scores), speed.latency_plot(scores)),
        *(published.published_table(scores), published.published_speed(scores)),
        *(ablation.ablation_table(scores, trained), runs.training_table(trained, scores), runs.loss_plot(trained)),
        *settings.settings_plots(trained),
        *(quality.finetuning_table(scores), quality.metrics_table(scores), runs.cost_table(scores)),
    ]
    return [block for block in blocks if block is not None]


def about() -> str:
    """Return the command, the date, the version of the code and the machine of this report."""
    command = shlex.join(["python", *sys.orig_argv[1:]])
    now = datetime.now(UTC).isoformat(sep=" ", timespec="minutes")
    return f"{command} · {now} · distilkit {version('distilkit')} · {processor('cpu')}"


def write_report(
    results: Sequence[Result],
    trained: Sequence[Run],
    *,
    out: Path,
    teacher: str | None,
    baseline: str | None,
    title: str,
    wandb: str | None,
) -> Path:
    """Write report.md, report.html, a CSV file for each table and a PNG file for each plot; return report.md.

    ``trained`` are summaries as ``find_runs`` reads them. The files of an earlier report in ``out`` are removed.
    ``wandb`` is the project of a Weights & Biases run that takes the same tables and plots, or None.
    """
    if not results and not trained:
        raise UserError(
            "there is nothing to report; score a model with python -m distilkit.evaluate model=<folder> task=glue, or "
            "train one with python -m distilkit.train experiment=demo, and give its folder in runs=[...]"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"out={str(out)!r} is a file; give the name of a folder")
    if (out / "summary.json").exists():
        raise UserError(f"out={str(out)!r} is the folder of a training run; give another one, such as {out / 'report'}")
    scores, notes = assign_roles(gather(results), trained, teacher=teacher, baseline=baseline)
    blocks = [*notes, *sections(scores, trained)]
    out.mkdir(parents=True, exist_ok=True)
    for file in [file for name in _NAMES for kind in ("csv", "png") for file in out.glob(f"{name}.{kind}")]:
        file.unlink()
    tables = [block for block in blocks if isinstance(block, Table)]
    plots = [block for block in blocks if isinstance(block, Plot)]
    for table in tables:
        write_csv(out / f"{table.name}.csv", table.records)
    for plot in plots:
        (out / f"{plot.name}.png").write_bytes(plot.png)
    (out / "report.html").write_text(html_page(title, about(), blocks), "utf-8")
    (out / "report.md").write_text(markdown_page(title, about(), blocks), "utf-8")
    if wandb is not None:
        from distilkit.watch import tracking  # imports wandb and Lightning

        logger = tracking.wandb_logger(save_dir=str(out), project=wandb, name=title, group=None, job_type="report")
        for table in tables:
            logger.log_table(f"tables/{table.name}", columns=table.header, data=table.rows)
        for plot in plots:
            logger.log_image(f"plots/{plot.name}", [str(out / f"{plot.name}.png")], caption=[plot.caption])
        logger.experiment.finish()
    return out / "report.md"


@explain_keys
@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.evaluate", config_name="report")
@report_errors
def main(cfg: DictConfig) -> None:
    """Report on all results and runs below the folders ``runs``."""
    check_added(cfg, config="evaluate/report.yaml")
    if not cfg.runs:
        raise UserError("runs is not set: python -m distilkit.report 'runs=[outputs/evaluate,outputs/demo]'")
    given = cfg.runs if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    folders = distinct(Path(str(folder)).expanduser() for folder in given)
    results, trained = read_results(folders), find_runs(folders)
    options = {name: cfg[name] for name in ("teacher", "baseline", "title", "wandb")}
    file = write_report(results, trained, out=Path(cfg.out).expanduser(), **options)
    models = gather(results).results["row"].nunique()
    print(json.dumps({"report": str(file.resolve()), "models": models, "training_runs": len(trained)}))


if __name__ == "__main__":
    main()
