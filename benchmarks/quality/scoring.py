"""The stages that score: held-out text, and tasks after fine-tuning and without."""

from pathlib import Path

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.runner import Command
from distilkit.records import FILE, read_file, read_results

HELD_OUT = "held_out"


def held_out(experiment: Experiment, name: str, model: Path | str, folder: Path) -> float:
    """Score a model on the held-out text, and return its cross-entropy in nats per labelled token."""
    arguments = [*map(str, (folder, name, model)), *experiment.common(), f"objective={experiment.lm}"]
    experiment.runner.run(
        Command(
            name=str(folder.relative_to(experiment.out)).replace("/", "-"),
            module="benchmarks.quality.held_out",
            arguments=arguments,
            done=(folder / FILE).is_file,
        )
    )
    (result,) = read_file(folder / FILE)
    return result.scores["masked_cross_entropy"]


def score_tasks(experiment: Experiment) -> None:
    """Score the teacher and each trained row on all tasks."""
    from benchmarks.quality.training import run_folder

    rows = [name for name, row in experiment.rows.items() if not row.tune_only]
    models = {name: run_folder(experiment, name) / "student" for name in rows}
    found = {name: model for name, model in models.items() if model.is_dir()}
    for name in models.keys() - found.keys():
        print(f"row {name} is not trained yet, and is left out")
    models = {"teacher": experiment.settings.teacher, **found}
    experiment.runner.each(lambda name: _score(experiment, name, models[name]), models)


def _score(experiment: Experiment, name: str, model: Path | str) -> None:
    own = experiment.settings
    if own.similarity:
        evaluate(experiment, name, model, out=experiment.out / "scores", tasks=["similarity"], seeds=[None])
    if own.tasks:
        evaluate(
            experiment, name, model, out=experiment.out / "scores", tasks=list(own.tasks), seeds=list(own.task_seeds)
        )


def evaluate(
    experiment: Experiment, name: str, model: Path | str, *, out: Path, tasks: list[str], seeds: list[int | None]
) -> None:
    """Run ``distilkit.evaluate`` on some tasks and seeds, unless all scores are there."""
    own = experiment.settings
    wanted = {(task, seed) for task in tasks for seed in seeds}

    def done() -> bool:
        folder = out / name
        return folder.is_dir() and wanted <= {(result.task, result.seed) for result in read_results([folder])}

    data = [] if own.data_dir is None else [f"task.data_dir={own.data_dir}"]
    tuned = [
        *(f"seed={','.join(map(str, seeds))}", f"task.max_train_rows={own.max_train_rows}"),
        *(f"trainer={own.trainer}", f"trainer.precision={own.precision}", "trainer.enable_progress_bar=false"),
        *own.finetune,
    ]
    experiment.runner.run(
        Command(
            name=f"{out.relative_to(experiment.out)}-{name}-{'-'.join(tasks)}".replace("/", "-"),
            module="distilkit.evaluate",
            arguments=[
                *(["--multirun"] if None not in seeds else []),
                *(f"model={model}", f"name={name}", f"task={','.join(tasks)}", f"output_dir={out}", *data),
                *(tuned if None not in seeds else [f"task.device={'cpu' if own.trainer == 'cpu' else 'auto'}"]),
            ],
            done=done,
        )
    )
