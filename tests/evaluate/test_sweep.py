"""The tasks of a sweep, from its command to its report."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

import distilkit.evaluate.sweep
import distilkit.train
from distilkit import cli
from distilkit.errors import UserError
from distilkit.evaluate.sweep import SweepTasks, evaluation
from distilkit.export.card import add_scores
from distilkit.records import read_results
from distilkit.report.quality import results_markdown
from distilkit.report.runs import SweepReport
from jobs import QUIET, SMALL, call, only, spawn, write_rows
from scores import said, scored, with_rows, write_training

ROWS = ("full", "no_ce", "no_mlm", "no_cos", "random_init")


@pytest.fixture
def command(save_teacher: Callable[..., Path], text_file: Path, tmp_path: Path) -> list[str]:
    return [
        *("-m", "distilkit.train", "sweep=ablation", "teacher=hf", f"teacher.name={save_teacher('bert')}"),
        *SMALL,
        *QUIET,
        f"data.corpus.paths={text_file}",
        f"cache_dir={tmp_path}/cache",
        "trainer.max_steps=2",
        "ablation.tasks=[sst2,rte]",
    ]


SHORT = (
    'ablation.overrides=["trainer.enable_progress_bar=false","finetune.epochs=1","finetune.lr=1e-3",'
    '"task.max_length=60","card=true"]'
)


@pytest.mark.slow
def test_the_sweep_ends_in_a_report_of_what_each_term_is_worth(command: list[str], tmp_path: Path) -> None:
    data = tmp_path / "glue"
    write_rows(data / "SST-2")
    write_rows(data / "other")
    (data / "RTE").mkdir()
    for name in ("train", "dev"):
        lines = (data / "other" / f"{name}.tsv").read_text("utf-8").splitlines()[1:]
        pairs = [f"{line.split(chr(9))[0]}\tba\t{line[-1]}" for line in lines]
        (data / "RTE" / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *pairs]) + "\n", "utf-8")
    done = spawn(*command, SHORT, f"ablation.data_dir={data}", "hydra.sweep.dir=ablation", cwd=tmp_path)
    assert done.code == 0, done.err
    sweep = tmp_path / "ablation"
    found = read_results([sweep / "scores"])
    assert {(result.name, result.task) for result in found} == {
        (name, task) for name in ("teacher", *ROWS) for task in ("sst2", "rte")
    }
    text = (sweep / "report" / "report.md").read_text("utf-8")
    for name in ROWS:
        assert name in text
    assert "-2.96" in text  # the paper's change without soft targets
    assert "report: " in done.out
    card = (only(sweep, "0/student") / "README.md").read_text("utf-8")
    assert "## Scores" in card and "SST-2" in card


def test_what_is_wrong_with_a_task_is_said_before_anything_is_trained(command: list[str], tmp_path: Path) -> None:
    arguments = command[2:]  # without -m distilkit.train
    done = call(distilkit.train.main, "-m", *arguments, SHORT, f"ablation.data_dir={tmp_path}/nowhere", cwd=tmp_path)
    assert done.code == 1
    assert "nowhere is no folder" in done.err
    assert not list(tmp_path.glob("outputs/**/checkpoints"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+ablation.task=rte", "ablation.task is unknown; ablation takes tasks, data_dir, seeds, overrides"),
        ("+ablation.baseline_lr=1", "ablation.baseline_lr is unknown"),
        ("ablation.tasks=[nothing]", "task 'nothing' with overrides"),
        ("ablation.tasks=rte", "ablation.tasks=rte is no list; set it in brackets, as ablation.tasks=[...]"),
        ("ablation.seeds=1", "ablation.seeds=1 is no list"),
        ("ablation.seeds=null", "ablation.seeds=None is no list"),
        ('ablation.overrides=["finetune.lr=0"]', "finetune.lr=0, but it must be a number above 0"),
        ('ablation.overrides=["finetune.learning_rate=1"]', "finetune.learning_rate"),
    ],
)
def test_settings_that_cannot_be_are_named_before_anything_is_trained(
    override: str, message: str, tmp_path: Path
) -> None:
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        cfg = compose("train", ["sweep=ablation", "ablation.tasks=[sst2]", override], return_hydra_config=True)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        SweepTasks(group="ablation").on_multirun_start(cfg)
    assert stopped.value.code == 1
    assert message in err.getvalue()


def test_a_student_that_cannot_be_scored_leaves_the_others_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, label in enumerate(("full", "no_ce")):
        write_training(tmp_path, label, [9.0, 6.0 + index, 5.0])
    scored_models: list[str] = []

    def evaluate(cfg: Any) -> None:
        scored_models.append(cfg.name)
        if cfg.name == "teacher":
            raise UserError("the teacher has no head")

    monkeypatch.setattr(distilkit.evaluate.sweep, "evaluate", evaluate)
    monkeypatch.setattr(cli, "failures", [])
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        given = [
            "sweep=ablation",
            "ablation.tasks=[sst2]",
            "teacher=hf",
            "teacher.name=t",
            f"hydra.sweep.dir={tmp_path}",
        ]
        cfg = compose("train", given, return_hydra_config=True)
    SweepTasks(group="ablation").on_multirun_end(cfg)
    assert len(scored_models) == 3
    assert cli.failures == ["teacher on sst2, seed 1, failed: the teacher has no head"]
    assert (tmp_path / "report" / "report.md").is_file()


VERSUS = ("cut", "distilled", "baseline", "baseline_time")
SHARES = {"teacher": 0.85, "cut": 0.6, "distilled": 0.8, "baseline": 0.7, "baseline_time": 0.72, "random_init": 0.55}


def score(cfg: DictConfig) -> None:
    """Score a model as ``evaluate`` would, but on classes drawn for its row."""
    rows = said(SHARES[cfg.name], seed=10 * [*SHARES].index(cfg.name) + cfg.seed)
    with_rows(Path(cfg.output_dir), cfg.name, cfg.task.name, rows, seed=cfg.seed)


def test_the_tasks_of_equal_rows_join_the_table_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, label in enumerate(VERSUS):
        after = {"val/nll": 5.0 - index / 4, "val/accuracy": 0.4, "val/teacher_nll": 4.0, "val/teacher_accuracy": 0.5}
        file = write_training(tmp_path, label, [9.0, 6.0, 5.0], training_seconds=60.0) / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"after": after}), "utf-8")
        os.utime(file, (index, index))
    monkeypatch.setattr(distilkit.evaluate.sweep, "evaluate", score)
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        given = ["sweep=versus", "versus.tasks=[rte,stsb]", "versus.seeds=[1,2,3]", f"hydra.sweep.dir={tmp_path}"]
        cfg = compose("train", given, return_hydra_config=True)
    # Hydra calls callbacks in reverse at the end, so that the scores are there when the table is made.
    assert list(cfg.hydra.callbacks) == [
        "credentials",
        "failures",
        "home",
        "folder",
        "share_teacher",
        "sweep_report",
        "tasks",
    ]
    SweepTasks(group="versus").on_multirun_end(cfg)
    SweepReport(measure_latency=False).on_multirun_end(cfg)
    assert {(each.name, each.task, each.seed) for each in read_results([tmp_path / "scores"])} == {
        (name, task, seed) for name in ("teacher", *VERSUS) for task in ("rte", "stsb") for seed in (1, 2, 3)
    }
    header, _, *rows = (tmp_path / "comparison.md").read_text("utf-8").partition("\n\n")[0].splitlines()
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    table = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[1:-1]] for row in rows}
    assert list(table) == ["teacher", *VERSUS]
    assert columns[-3:] == ["RTE", "STS-B", "kept, %"]
    assert {name: row[-3:] for name, row in table.items()} == {
        "teacher": ["85.0", "85.0", "100.0"],
        "cut": ["60.0", "60.0", "70.6"],
        "distilled": ["80.0", "80.0", "94.1"],
        "baseline": ["70.0", "70.0", "82.4"],
        "baseline_time": ["72.0", "72.0", "84.7"],
    }
    report = (tmp_path / "report" / "report.md").read_text("utf-8")
    line = "On average of 2 tasks distilled keeps 94.1 % of teacher, and baseline_time, which was trained without"
    assert line in report
    assert "| baseline_time (baseline) |" in report
    assert report.startswith("# Versus: distil\n")
    assert line in capsys.readouterr().out


def test_the_teacher_of_a_sweep_that_trains_its_own_is_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_training(tmp_path, "teacher", [9.0, 6.0, 5.0], parameters=1)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    (folder / "summary.json").write_text(json.dumps(summary | {"teacher": None}), "utf-8")
    student = write_training(tmp_path, "distilled", [9.0, 6.0, 5.0])
    own = {"name": str(folder / "student"), "revision": "main", "sha256": "0"}
    (student / "summary.json").write_text(json.dumps(summary | {"teacher": own}), "utf-8")
    models: list[tuple[str, str, str, Any]] = []

    def evaluate(cfg: DictConfig) -> None:
        models.append((cfg.name, cfg.model, cfg.revision, cfg.tokenizer))
        score(cfg)

    monkeypatch.setattr(distilkit.evaluate.sweep, "evaluate", evaluate)
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        given = ["experiment=demo", "versus.tasks=[rte]", f"hydra.sweep.dir={tmp_path}"]
        SweepTasks(group="versus").on_multirun_end(compose("train", given, return_hydra_config=True))
    assert models == [
        ("teacher", f"{folder}/student", "main", None),
        ("distilled", f"{student}/student", "main", None),
    ]


def test_composing_an_evaluation_leaves_the_configs_in_use_as_they_were() -> None:
    given = ["sweep=ablation", "ablation.data_dir=there", 'ablation.overrides=["finetune.lr=1e-4"]']
    with initialize_config_module("distilkit.conf.train", version_base="1.3"):
        cfg = evaluation(compose("train", given), "rte", group="ablation", model="m", seed=3)
        assert compose("train", ["objective.temperature=3"]).objective.temperature == 3
    assert (cfg.task.name, cfg.task.data_dir, cfg.finetune.lr) == ("rte", "there", 1e-4)
    assert (cfg.model, cfg.seed, cfg.trainer.accelerator, cfg.save_model) == ("m", 3, "auto", False)


def test_scores_come_into_the_card_once_and_only_into_our_cards(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert not add_scores(tmp_path, results_markdown(scored(rte=[0.6])), {})
    card.write_text("# Someone else's\n", "utf-8")
    assert not add_scores(tmp_path, results_markdown(scored(rte=[0.6])), {})
    assert card.read_text("utf-8") == "# Someone else's\n"
    card.write_text("---\ntags: [knowledge-distillation, distilkit]\n---\n# mine\n\nText.\n", "utf-8")
    assert add_scores(tmp_path, results_markdown(scored(rte=[0.6])), {})
    assert add_scores(tmp_path, results_markdown(scored(rte=[0.7, 0.7], sst2=[0.9])), {})
    text = card.read_text("utf-8")
    assert text.count("## Scores") == 1
    assert "70.0" in text and "90.0" in text and "60.0" not in text
    assert text.startswith("---\ntags") and "Text." in text
