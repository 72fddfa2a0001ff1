"""The report over scored models and training runs: tables beside the paper's figures, and plots."""

import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import hydra
import matplotlib.image
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig

from distilkit.cli import report_errors
from distilkit.errors import UserError
from distilkit.records import Result, read_results
from distilkit.report import plots, published_tables, run_tables, speed_tables, tables
from distilkit.report.comparison import read_runs
from distilkit.report.medians import Score, choose, name_alike, row_names
from distilkit.report.page import Block, Plot, Table, html_page, markdown_page, print_table, write_csv
from distilkit.report.run_tables import Run, teacher_label
from distilkit.report.tables import Roles
from distilkit.tracking import wandb_logger

log = logging.getLogger(__name__)

_NEEDED = ("before", "after", "student_parameters", "tokens_seen")  # of a summary.json
_NAMES = (  # of the tables and plots that a report may have written
    *("quality", "retention", "published", "each_metric", "speed", "published_speed", "ablation", "training", "cost"),
    *("quality_parameters", "quality_latency", "held_out_loss"),
)


def distinct(folders: Iterable[Path]) -> list[Path]:
    """Leave out folders that are given twice or lie in another one, so that nothing counts twice."""
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [folder for folder in resolved if not any(other in folder.parents for other in resolved)]


def find_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the summaries of all training runs below some folders, each with its ``label`` and ``folder``.

    Raises:
        UserError: a summary is damaged, or it is none of distilkit.train.
    """
    runs = []
    for folder in folders:
        found = {str(file.parent) for file in folder.rglob("summary.json")}
        for sweep in sorted({PurePath(run).parent for run in found}):
            try:
                some = read_runs(Path(sweep), only=found)
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
                raise UserError(f"a summary.json below {sweep} is damaged ({error}); delete it") from error
            if len(some) == 1 and ", " in some[0]["label"]:  # no other run tells what is special about this one
                some[0]["label"] = f"{some[0].get('name', '')}/{Path(some[0]['folder']).name}"
            runs += some
    for run in runs:
        missing = [name for name in _NEEDED if name not in run]
        if missing:
            raise UserError(
                f"{run['folder']}/summary.json has no {', '.join(missing)} and is not one of distilkit.train; give other "
                "folders in runs, or delete it"
            )
    return runs


def _called_teacher(results: Sequence[Result], runs: Sequence[Run]) -> list[Mapping[str, Any]]:
    """List what training runs and second distillations say of their teachers."""
    said = [run.get("teacher") for run in runs] + [result.teacher for result in results]
    return [each for each in said if each]


def find_teacher(results: Sequence[Result], runs: Sequence[Run]) -> list[str]:
    """List the rows that a training run or a result calls the teacher: by name, by folder or by the weights' hash."""
    said = _called_teacher(results, runs)
    names = {str(each["name"]) for each in said if "name" in each} | {"teacher"}
    names |= {teacher_label(each) for each in said if "name" in each}
    # A fine-tuned teacher lies in <row>/<task>/<seed>/model.
    paths = [PurePath(str(each["name"])).parts for each in said if "name" in each]
    names |= {parts[-4] for parts in paths if len(parts) >= 4 and parts[-1] == "model"}
    hashes = {each["sha256"] for each in said if each.get("sha256")}
    named = zip(row_names(results), results, strict=True)
    return list(
        dict.fromkeys(
            row
            for row, result in named
            if result.teacher is None
            and (
                result.name in names
                or result.model in names
                or hashes & {result.sha256, result.details.get("weights_sha256")}
            )
        )
    )


def assign_roles(
    results: Sequence[Result], runs: Sequence[Run], *, teacher: str | None, baseline: str | None
) -> tuple[Roles, list[str]]:
    """Return which row is the teacher and which the baseline, and what there is to say of it.

    Raises:
        UserError: a name is no row, or both are the same.
    """
    rows = list(dict.fromkeys(row_names(results)))
    rows += [score.row for score in choose(results) if score.row not in rows]
    for key, name in (("teacher", teacher), ("baseline", baseline)):
        if name is not None and name not in rows:
            known = ", ".join(dict.fromkeys(rows)) or "none, for no results.json was found"
            raise UserError(f"{key}={name!r} is no row of the report; its rows are {known}")
    if teacher is not None and teacher == baseline:
        raise UserError(f"teacher and baseline are both {teacher!r}; the baseline is the student without distillation")
    if teacher is None and rows:
        found = [row for row in find_teacher(results, runs) if row != baseline]
        if len(found) == 1:
            return Roles(teacher=found[0], baseline=baseline), []
        candidates = (
            f"{len(found)} rows may be the teacher ({', '.join(found)})" if found else "no row is known as the teacher"
        )
        note = f"What is kept of the teacher is left out, for {candidates}; set teacher=<one of {', '.join(rows)}>."
        return Roles(teacher=None, baseline=baseline), [note]
    return Roles(teacher=teacher, baseline=baseline), []


def lay_out(results: Sequence[Result], runs: Sequence[Run], roles: Roles) -> list[Block]:
    """Return the report's tables and plots in their order; what would be empty is left out."""
    scores: list[Score] = choose(results)
    timings = speed_tables.speeds(results, teacher=roles.teacher)
    blocks = (
        tables.quality(scores, roles),
        plots.quality_parameters(scores, roles),
        plots.quality_latency(scores, timings, roles),
        tables.kept(scores, roles) or tables.nothing_kept(scores, roles),
        plots.retention_bars(scores, roles),
        published_tables.beside_published(scores, roles),
        speed_tables.speed(results, roles),
        published_tables.published_speed(results),
        run_tables.ablation(scores, runs),
        run_tables.training(runs),
        plots.loss_curves(runs),
        tables.metrics(scores, roles),
        run_tables.cost(results),
    )
    return [block for block in blocks if block is not None]


def write_report(
    results: Sequence[Result],
    runs: Sequence[Run],
    *,
    out: Path,
    teacher: str | None,
    baseline: str | None,
    title: str,
    wandb: str | None,
) -> Path:
    """Write report.md, report.html, a CSV file for each table and a PNG file for each plot; return report.md.

    ``runs`` are summaries as ``find_runs`` reads them. What an earlier report left in ``out`` goes. ``wandb`` is the
    project of a Weights & Biases run that takes the same tables and plots, or None.

    Raises:
        UserError: there is nothing to report, a name is no row, or ``out`` is a file or the folder of a training run.
    """
    if not results and not runs:
        raise UserError(
            "there is nothing to report; score a model with python -m distilkit.evaluate model=<folder> task=glue, or train "
            "one with python -m distilkit.train experiment=demo, and give its folder in runs=[...]"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"out={str(out)!r} is a file; give the name of a folder")
    if (out / "summary.json").exists():
        raise UserError(f"out={str(out)!r} is the folder of a training run; give another one, such as {out / 'report'}")
    results = name_alike(results)
    roles, notes = assign_roles(results, runs, teacher=teacher, baseline=baseline)
    blocks = [*notes, *lay_out(results, runs, roles)]
    out.mkdir(parents=True, exist_ok=True)
    for name in _NAMES:
        for file in (out / f"{name}.csv", out / f"{name}.png"):
            file.unlink(missing_ok=True)
    for block in blocks:
        if isinstance(block, Table):
            write_csv(out / f"{block.name}.csv", block.records)
        elif isinstance(block, Plot):
            (out / f"{block.name}.png").write_bytes(block.png)
    (out / "report.html").write_text(html_page(title, blocks), "utf-8")
    (out / "report.md").write_text(markdown_page(title, blocks), "utf-8")
    if wandb is not None:
        log_report(blocks, out=out, project=wandb, title=title)
    return out / "report.md"


def log_report(blocks: Sequence[Block], *, out: Path, project: str, title: str) -> None:
    """Log tables and plots to a run of Weights & Biases, offline where it cannot be reached."""
    logger = wandb_logger(save_dir=str(out), project=project, name=title, group=None, job_type="report")
    for block in blocks:
        if isinstance(block, Table):
            logger.log_table(key=f"tables/{block.name}", columns=block.header, data=[list(row) for row in block.rows])
        elif isinstance(block, Plot):
            picture = matplotlib.image.imread(io.BytesIO(block.png))
            logger.log_image(key=f"plots/{block.name}", images=[picture], caption=[block.caption])
    logger.experiment.finish()


class SweepScores(Callback):
    """Hydra callback: when a sweep of evaluations has ended, print all scores below its folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print medians over seeds, a row for each model."""
        out = Path(config.output_dir).expanduser()
        scores = choose(read_results([out])) if out.is_dir() else []
        table = tables.quality(scores, Roles(teacher=None, baseline=None))
        if table is None:
            return
        print_table(f"{table.title}, below {out}", table.header, table.rows)


@hydra.main(version_base="1.3", config_path="pkg://distilkit.conf.evaluate", config_name="report")
@report_errors
def main(cfg: DictConfig) -> None:
    """Report on what lies below the folders ``runs``."""
    if cfg.runs is None or not cfg.runs:
        raise UserError("runs is not set: python -m distilkit.report 'runs=[outputs/evaluate,outputs/demo]'")
    given = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    folders = [Path(str(folder)).expanduser() for folder in given]
    results = read_results(distinct(folders))  # says which folder does not exist
    runs = find_runs(distinct(folders))
    file = write_report(
        results,
        runs,
        out=Path(cfg.out).expanduser(),
        teacher=cfg.teacher,
        baseline=cfg.baseline,
        title=cfg.title,
        wandb=cfg.wandb,
    )
    scored, trained = len(set(row_names(name_alike(results)))), len(runs)
    print(json.dumps({"report": str(file.resolve()), "models": scored, "training_runs": trained}))


if __name__ == "__main__":
    main()
